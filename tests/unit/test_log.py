import json
from pathlib import Path

from bigdet.log import MetricsWriter, cut_metrics


def test_metrics_are_one_object_a_line_and_scalars_of_tensorboard(tmp_path: Path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", first_step=1)
    writer.write({"phase": "train", "step": 3, "loss/total": 1.5}, total_step=3)
    writer.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"phase": "train", "step": 3, "loss/total": 1.5}
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss/total" in events.read_bytes()


def test_cutting_keeps_what_came_before_and_drops_half_a_line(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    cut_metrics(file, lambda line: line["step"] <= 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_metrics(tmp_path / "absent.jsonl", lambda line: True)
    assert not (tmp_path / "absent.jsonl").exists()
