"""Evaluations scored during training: their results, and that no end of a run loses one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import popen_fork
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from bigdet.data.format.phase_sets import DataSets
from bigdet.data.format.shard_set import ShardSet
from bigdet.evaluation.saved import SavedResults
from bigdet.evaluation.scoring import evaluate_detections
from bigdet.logs.log import MetricsWriter
from bigdet.run_dir import RunDir
from bigdet.training import background_scoring as scorer
from bigdet.training import measuring
from bigdet.training.background_scoring import Scorer
from bigdet.training.state import RunState, Unscored
from tests.shipped import unchecked
from tests.unit.data.small_shards import record_of, write_set

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


class Fixed:
    """A run at pretrain step 30 of some, whose detections are half of the objects."""

    def __init__(self, folder: Path) -> None:
        words = ["phases.pretrain.steps=40", "model.detector=faster_rcnn"]
        self.config = unchecked(CONFIG, words)
        self.run_dir = RunDir(folder / "run")
        self.val_set: ShardSet = write_set(folder / "val", num_shards=1, per_shard=4)
        self.writer = MetricsWriter(self.run_dir.metrics)
        self.run_dir.checkpoints.mkdir()
        self.state = RunState("pretrain", step=30, total_steps=30)
        self.file = self.run_dir.detections("pretrain", 30)

    def scorer(self) -> Scorer:
        sets = dict.fromkeys(self.config.phases, DataSets(self.val_set, self.val_set))
        return Scorer(self.config, self.run_dir, sets, self.writer, self.state)

    def results(self, category_id: int | None = None) -> SavedResults:
        results = SavedResults()
        for image_id in (4, 3, 2, 1):
            annotation = record_of(image_id)["annotations"][0]
            label = 1 + annotation["label"] if category_id is None else category_id
            found = {"image_id": image_id, "bbox": annotation["bbox"], "score": 0.5}
            results.add(image_id, [found | {"category_id": label}] if image_id > 2 else [])
        return results

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.run_dir.metrics.read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Fixed]:
    run = Fixed(tmp_path)
    yield run
    run.writer.close()


def collect(beside: Scorer) -> None:
    deadline = time.monotonic() + 100
    while beside._process is not None:
        assert time.monotonic() < deadline
        beside.collect()
        time.sleep(0.01)


@pytest.fixture
def late_reaping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has ended counts as alive for half a second, as on a busy machine."""
    poll, ended = popen_fork.Popen.poll, {}

    def late_poll(self: popen_fork.Popen, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is not None or flag != os.WNOHANG or not wait([self.sentinel], 0):
            return poll(self, flag)
        seconds = time.monotonic() - ended.setdefault(self.pid, time.monotonic())
        return None if seconds < 0.5 else poll(self, flag)

    monkeypatch.setattr(popen_fork.Popen, "poll", late_poll)


def test_a_process_that_is_reaped_late_is_waited_for(run: Fixed, late_reaping: None) -> None:
    beside = run.scorer()
    for step, total in ((30, 30), (40, 40)):  # the next evaluation, and the end of the run
        run.state.step, run.state.total_steps = step, total
        assert beside.finish(lambda: False)
        beside.start(run.results())
    assert beside.finish(lambda: False)
    assert [(line["step"], line["bbox/AP50"]) for line in run.lines()] == [
        (30, pytest.approx(51 / 101)),
        (40, pytest.approx(51 / 101)),
    ]
    assert run.state.unscored is None
    assert not run.run_dir.all_detections()


def test_a_process_that_dies_and_is_reaped_late_is_no_end_of_an_evaluation(
    run: Fixed, late_reaping: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "evaluate_detections", lambda *_, **__: os._exit(3))
    beside = run.scorer()
    beside.start(run.results())
    with pytest.raises(ValueError, match=r"pretrain-30\.detections: .* exit code 3\. The next"):
        beside.finish(lambda: False)
    assert run.file.exists()
    assert run.state.unscored is not None
    monkeypatch.undo()
    again = run.scorer()
    again.resume()
    assert again.finish(lambda: False)
    assert [line["step"] for line in run.lines()] == [30]


def test_a_run_does_not_go_on_while_numbers_are_missing(run: Fixed) -> None:
    beside = run.scorer()
    beside.start(run.results())
    beside.end()  # as if it were done
    with pytest.raises(AssertionError, match=r"must not continue as if .*step=30.* were scored"):
        beside.finish(lambda: False)


def test_lost_detections_of_the_current_step_are_made_again(
    run: Fixed, caplog: pytest.LogCaptureFixture
) -> None:
    for step, is_due in ((31, False), (30, True)):
        run.state.step = 30
        beside = run.scorer()
        beside.start(run.results())
        beside.end()
        run.file.unlink()
        run.state.step = step
        run.scorer().resume()
        assert run.state.needs_evaluation is is_due
        assert run.state.unscored is None
    assert "step 30: its detections are not in this run folder, so it is evaluated" in caplog.text


@pytest.mark.parametrize("change", ["cut", "image", "text"])
def test_detections_that_were_cut_short_are_not_scored(run: Fixed, change: str) -> None:
    beside = run.scorer()
    beside.start(run.results())
    beside.end()
    if change == "image":  # whole lines of one image of four
        results = SavedResults()
        results.add(4, [])
        results.write(run.file)
    else:
        run.file.write_bytes(run.file.read_bytes()[:-2] if change == "cut" else b"abc\n")
    again = run.scorer()
    again.resume()
    with pytest.raises(ValueError, match=r"pretrain-30\.detections: .*Remove the file and start"):
        again.finish(lambda: False)
    assert not run.lines()
    assert run.file.exists()


def test_the_numbers_are_written_down_when_they_are_there(run: Fixed) -> None:
    beside = run.scorer()
    beside.start(run.results())
    run.state.step, run.state.total_steps = 31, 31  # training continues
    assert run.state.unscored.step == 30
    collect(beside)
    expected = evaluate_detections(run.val_set, run.results(), ["bbox"])
    (line,) = run.lines()
    assert {**line, **measuring.flat_metrics(expected)} == line
    assert (line["phase"], line["step"], line["seen/images"]) == ("pretrain", 30, 0)
    assert line["bbox/AP50"] == pytest.approx(51 / 101, abs=1e-9)  # one of two cats, and of dogs
    assert json.loads(run.run_dir.evaluation("pretrain", 30).read_text()) == expected
    assert run.state.best_checkpoint == run.run_dir.best.read_text().strip() == "pretrain-30"
    assert run.state.best_ap == expected["bbox"]["AP"]
    assert run.state.unscored is None
    assert not run.file.exists()


def test_what_was_under_way_at_the_end_of_a_run_is_scored_by_the_next_start(
    run: Fixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scorer, "evaluate_detections", lambda *_, **__: time.sleep(100))
        beside = run.scorer()
        beside.start(run.results())
        beside.collect()  # does not wait
        assert not run.lines()
        beside.end()
    run.state = RunState.from_json(json.loads(json.dumps(run.state.to_json())))
    stale = run.run_dir.detections("pretrain", 40)
    stale.touch()  # of a later step than that of the checkpoint
    again = run.scorer()
    again.resume()
    assert not stale.exists()
    collect(again)
    assert [line["step"] for line in run.lines()] == [30]
    assert run.state.unscored is None


def test_what_was_scored_after_the_checkpoint_counts_for_the_best(run: Fixed) -> None:
    beside = run.scorer()
    beside.start(run.results())
    saved = json.loads(json.dumps(run.state.to_json()))  # a checkpoint meanwhile
    collect(beside)
    best_ap = run.state.best_ap
    run.state = RunState.from_json(saved)
    again = run.scorer()
    again.resume()
    assert again._process is None
    assert run.state.unscored is None
    assert (run.state.best_ap, run.state.best_checkpoint) == (best_ap, "pretrain-30")
    assert len(run.lines()) == 1


def test_detections_that_stayed_elsewhere_are_reported(
    run: Fixed, caplog: pytest.LogCaptureFixture
) -> None:
    beside = run.scorer()
    beside.start(run.results())
    beside.end()
    run.file.unlink()
    run.scorer().resume()
    assert run.state.unscored is None
    assert "pretrain step 30: its detections are not in this run folder" in caplog.text


def test_what_a_user_has_to_fix_ends_the_run_with_a_message(run: Fixed) -> None:
    beside = run.scorer()
    beside.start(run.results(category_id=77))
    with pytest.raises(ValueError, match=r"evaluation at pretrain step 30: .*77"):
        collect(beside)
    assert run.file.exists()


def test_a_process_that_is_killed_ends_the_run_and_leaves_the_detections(
    run: Fixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "evaluate_detections", lambda *_, **__: time.sleep(100))
    beside = run.scorer()
    beside.start(run.results())
    os.kill(beside._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"pretrain-30\.detections: .* exit code -9\. The next"):
        collect(beside)
    assert run.file.exists()
    assert run.state.unscored is not None


@pytest.mark.parametrize(
    ("known", "ap", "best"),
    [
        (None, "NaN", None),
        (None, "null", None),
        (0.25, "NaN", 0.25),
        (0.25, "0.5", 0.5),
        (float("nan"), "0.5", 0.5),  # what an older version noted
    ],
)
def test_an_ap_that_is_no_number_is_never_the_best(
    run: Fixed, known: float | None, ap: str, best: float | None
) -> None:
    run.state.best_ap = known
    run.state.unscored = Unscored("pretrain", 30, 30, {})
    numbers = run.run_dir.evaluation("pretrain", 30)
    numbers.parent.mkdir()
    numbers.write_text(f'{{"bbox": {{"AP": {ap}}}}}')
    run.scorer().resume()
    assert run.state.best_ap == best
    assert run.run_dir.best.is_file() == (best == 0.5)


@pytest.mark.parametrize("is_other_set", [False, True])
def test_the_best_is_of_the_newest_validation_set(run: Fixed, is_other_set: bool) -> None:
    own = ["phases.finetune.data.val.shards=other"] if is_other_set else []
    run.config = unchecked(CONFIG, [*own, "data.val.shards=first"])
    run.state.best_ap, run.state.best_checkpoint = 0.75, "pretrain-30"
    run.state.unscored = Unscored("finetune", 10, 40, {})
    numbers = run.run_dir.evaluation("finetune", 10)
    numbers.parent.mkdir()
    numbers.write_text('{"bbox": {"AP": 0.5}}')
    run.scorer().resume()
    best = (0.5, "finetune-10") if is_other_set else (0.75, "pretrain-30")
    assert (run.state.best_ap, run.state.best_checkpoint) == best


def note(run: Fixed, step: int, ap: float) -> tuple[float | None, str | None]:
    """Let an evaluation give this AP, in a run that was started again; return the best."""
    run.state = RunState.from_json(json.loads(json.dumps(run.state.to_json())))
    run.state.unscored = Unscored("pretrain", step, step, {})
    numbers = run.run_dir.evaluation("pretrain", step)
    numbers.parent.mkdir(exist_ok=True)
    numbers.write_text(json.dumps({"bbox": {"AP": ap}}))
    run.scorer().resume()
    return run.state.best_ap, run.state.best_checkpoint


@pytest.mark.parametrize("word", ["metric=voc12", "tta.flip=false", "resize.size=64", "val_set"])
def test_the_best_begins_anew_where_ap_is_measured_in_another_way(
    run: Fixed, word: str, tmp_path: Path
) -> None:
    assert note(run, 10, 0.75) == (0.75, "pretrain-10")
    words = ["evaluation.every=7", "evaluation.pictures=2", "data.val.shards=moved"]
    run.config = unchecked(CONFIG, words)
    assert note(run, 20, 0.5) == (0.75, "pretrain-10")
    if word == "val_set":
        run.val_set = write_set(tmp_path / "other", num_shards=1, per_shard=3)
    else:
        more = ["evaluation.resize.kind=direct"] if word.startswith("resize") else []
        run.config = unchecked(CONFIG, [*words, *more, f"evaluation.{word}"])
    assert note(run, 30, 0.5) == (0.5, "pretrain-30")
    assert run.run_dir.best.read_text() == "pretrain-30\n"
    assert note(run, 40, 0.25) == (0.5, "pretrain-30")
