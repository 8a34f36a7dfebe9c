import json
import logging
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bigdet.logs import log
from bigdet.logs.boards import TensorBoard
from bigdet.logs.log import MetricsWriter, cut_metrics, setup_logging


def test_metrics_are_one_object_a_line_and_scalars_of_tensorboard(tmp_path: Path):
    board = TensorBoard(tmp_path / "tensorboard", first_step=1)
    writer = MetricsWriter(tmp_path / "metrics.jsonl", [board])
    writer.write({"phase": "train", "step": 3, "loss/total": 1.5}, total_step=3)
    writer.write({"phase": "train", "step": 3, "bbox/AP": 0.5}, 3, {"bbox/AP": "train/bbox/AP"})
    writer.close()
    line, ap = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"phase": "train", "step": 3, "loss/total": 1.5}
    assert json.loads(ap) == {"phase": "train", "step": 3, "bbox/AP": 0.5}
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss/total" in events.read_bytes()
    assert b"train/bbox/AP" in events.read_bytes()


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Gives a function that lets no file grow beyond some bytes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# TensorBoard's own thread may end with a traceback.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_on_a_full_disk_numbers_wait_with_one_warning_until_there_is_room(
    tmp_path: Path,
    limit_files: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    setup_logging(rank=0)
    file = tmp_path / "metrics.jsonl"
    others = set(threading.enumerate())
    writer = MetricsWriter(file, [TensorBoard(tmp_path / "tensorboard", first_step=1)])
    (worker,) = set(threading.enumerate()) - others
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # it may fail, or find room again
    limit_files(15)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1.0}, step)
    assert file.read_text() == '{"step": 1, "lo'  # a line and more do not fit
    limit_files(1 << 20)
    writer.write({"step": 4}, 4)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]
    metrics, tensorboard = capsys.readouterr().err.splitlines()
    assert f"{file}: cannot be written ([Errno 27] File too large). The run continues" in metrics
    assert f"{tmp_path}/tensorboard: cannot be written ([Errno 27] File too large)" in tensorboard
    monkeypatch.setattr(log, "MOST_WAITING", 10)
    limit_files(15)
    for step in (5, 6, 7):
        writer.write({"step": step}, step)
    limit_files(1 << 20)
    writer.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4, 5]
    worker.join(30)


def test_a_log_on_a_full_disk_is_one_warning_on_the_console(
    tmp_path: Path, limit_files: Callable[[int], None], capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "rank-0.log"
    setup_logging(rank=0, file=file)
    logger = logging.getLogger("bigdet.training.loop")
    limit_files(10)
    logger.info("one")
    logger.info("two")
    limit_files(1 << 20)
    logger.info("three")
    one, warning, two, three = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in (one, two, three)] == ["one", "two", "three"]
    assert f"{file}: lines may be missing here, [Errno 27] File too large" in warning
    assert [line.rsplit(": ", 1)[1] for line in file.read_text().splitlines()] == [
        "one", "lines may be missing here, [Errno 27] File too large", "two", "three",
    ]  # fmt: skip


def test_cutting_keeps_what_came_before_and_drops_half_a_line(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    cut_metrics(file, lambda line: line["step"] <= 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_metrics(tmp_path / "absent.jsonl", lambda line: True)
    assert not (tmp_path / "absent.jsonl").exists()


def test_console_lines_as_json_have_the_numbers(capsys: pytest.CaptureFixture[str]):
    setup_logging(rank=0, as_json=True)
    logger = logging.getLogger("bigdet.training.loop")
    logger.info("loss %.1f", 1.5, extra={"values": {"loss/total": 1.5, "grad_norm": float("nan")}})
    logger.warning("two\nlines")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "bigdet.training.loop",
        "message": "loss 1.5",
        "values": {"loss/total": 1.5, "grad_norm": None},
    }
    assert second["message"] == "two\nlines"
    assert "values" not in second


def test_metrics_are_strict_json_and_what_older_runs_wrote_becomes_it(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss/total": NaN}\n{"step": 2, "loss/total": 1.5}\n')
    cut_metrics(file, lambda line: True)
    writer = MetricsWriter(file)
    writer.write({"step": 3, "loss/total": float("inf")}, total_step=3)
    writer.close()
    assert file.read_text() == (
        '{"step": 1, "loss/total": null}\n{"step": 2, "loss/total": 1.5}\n'
        '{"step": 3, "loss/total": null}\n'
    )
