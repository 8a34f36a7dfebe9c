"""Which checkpoints are a run's own: however its folder is written, linked to or moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bigdet.config.load import dump_config
from bigdet.config.run import RunConfig
from bigdet.data.format.shard_set import ShardSet
from bigdet.engine import checkpoint, writing
from bigdet.engine.parts import Piece, Share
from bigdet.pieces.tensor_file import Spec
from bigdet.run_dir import RunDir
from bigdet.training.forks import changed_options, is_fork
from bigdet.training.resume import begin
from bigdet.training.starting_point import find_checkpoint
from bigdet.training.state import RunState
from tests.shipped import unchecked

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
WORDS = [
    "log.tensorboard=false",
    "phases.pretrain.images_per_step=4",
    "phases.pretrain.steps=9",
    "phases.pretrain.images_per_gpu=2",
]
SPELLED = ["./run/", "other/../run", "ABSOLUTE", "link/"]


def config_of(output: str, resume: str = "auto") -> RunConfig:
    return unchecked(CONFIG, [*WORDS, f"output={output}", f"resume={resume}"])


def save(output: str, step: int, is_old: bool = False) -> None:
    """Write a checkpoint as a run does, with the best one so far."""
    state = RunState("pretrain", step=step, best_ap=0.5, best_checkpoint="pretrain-2").to_json()
    if is_old:
        del state["interval"]
    run = {"config": dump_config(config_of(output)), "run": state}
    folder = RunDir(Path(output)).checkpoint("pretrain", step)
    share = Share(
        [Piece("model", "weight", 0, torch.zeros(1))], {"model": {"weight": Spec("F32", (1,))}}
    )
    number = writing.next_number(folder.parent)
    writing.write(writing.Save(folder, number, writing.Disks(), {}, run), share)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a run, a link to it, and another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("run")
    for step in (2, 4, 6):
        save("run", step)
    RunDir(tmp_path / "run").config.write_text(dump_config(config_of("run")))
    return tmp_path


def start(config: RunConfig) -> tuple[Path, RunState]:
    """Begin as the command does; return the checkpoint and the state."""
    run_dir = RunDir(Path(config.output))
    found = find_checkpoint(config, run_dir)
    assert found is not None
    shards: ShardSet = None  # type: ignore[assignment]  # read only where the batch changes
    state, metrics = begin(config, run_dir, shards, checkpoint.load(found))
    assert metrics is not None
    metrics.close()
    return found, state


@pytest.mark.parametrize(
    ("spelled", "is_old"), [("ABSOLUTE", False), *((each, True) for each in SPELLED)]
)
def test_the_best_stays_with_a_run_that_continues_however_its_folder_is_written(
    folder: Path, spelled: str, is_old: bool
) -> None:
    save("run", 4, is_old)
    word = spelled.replace("ABSOLUTE", str(folder / "run"))
    found, state = start(config_of(word, f"{folder}/link/checkpoints/pretrain-4/"))
    assert found.resolve() == folder / "run/checkpoints/pretrain-4"
    assert (state.best_ap, state.best_checkpoint) == (0.5, "pretrain-2")
    resume = f"{word.rstrip('/')}/checkpoints/pretrain-4"
    assert not is_fork(config_of("run", resume), checkpoint.load(found))


def test_a_moved_run_continues_as_itself(folder: Path) -> None:
    (folder / "run").rename(folder / "moved")
    for word in ("moved", str(folder / "moved")):
        _, state = start(config_of(word, f"{word}/checkpoints/pretrain-4"))
        assert (state.step, state.best_checkpoint) == (4, "pretrain-2")


@pytest.mark.parametrize("spelled", SPELLED)
def test_a_checkpoint_that_is_asked_for_again_in_other_words_does_not_take_the_run_back(
    folder: Path, spelled: str
) -> None:
    assert start(config_of("run", "run/checkpoints/pretrain-2"))[1].step == 2
    save("run", 4)  # it has gone on since
    word = spelled.replace("ABSOLUTE", str(folder / "run")).rstrip("/")
    assert start(config_of(word, f"{word}/checkpoints/pretrain-2"))[1].step == 4
    (folder / "run").rename(folder / "moved")
    assert start(config_of("moved", "moved/checkpoints/pretrain-2"))[1].step == 4
    assert start(config_of("moved", "moved/checkpoints/pretrain-4"))[1].step == 4
    assert start(config_of("moved", "moved/checkpoints/pretrain-2"))[1].step == 2  # asked anew


def test_a_fork_leaves_the_best_behind_once(folder: Path) -> None:
    _, state = start(config_of("fork", "link/checkpoints/pretrain-4"))
    assert (state.step, state.best_ap, state.best_checkpoint) == (4, None, None)
    assert [path.name for path in (folder / "fork/checkpoints").iterdir() if path.is_dir()] == [
        "pretrain-4"
    ]
    # Killed before its first checkpoint, it begins there once more.
    assert start(config_of("fork", "run/checkpoints/pretrain-4"))[1].best_checkpoint is None
    save("fork", 6)  # with a best of its own
    for output in ("fork", str(folder / "fork")):
        found, state = start(config_of(output, "link/checkpoints/pretrain-4/"))
        assert (found.name, state.best_checkpoint) == ("pretrain-6", "pretrain-2")
    (folder / "fork").rename(folder / "moved")
    assert start(config_of("moved", "run/checkpoints/pretrain-4"))[1].best_ap == 0.5


def test_a_fork_that_continues_with_auto_is_still_one_until_its_first_checkpoint(
    folder: Path,
) -> None:
    start(config_of("fork", "run/checkpoints/pretrain-4"))
    assert start(config_of("fork"))[1].best_checkpoint is None
    save("fork", 6)
    assert start(config_of("fork"))[1].best_checkpoint == "pretrain-2"


def test_a_run_in_the_old_place_of_the_one_it_begins_in_is_a_fork(folder: Path) -> None:
    (folder / "run").rename(folder / "before")
    _, state = start(config_of("run", "before/checkpoints/pretrain-4"))
    assert (state.step, state.best_ap) == (4, None)


def test_a_fork_that_an_earlier_version_began_is_one(folder: Path) -> None:
    save("run", 4, is_old=True)
    start(config_of("fork", "run/checkpoints/pretrain-4"))
    copied = folder / "fork/checkpoints/pretrain-4"
    (copied / "adopted").unlink()  # which it did not write
    saved = checkpoint.load(copied)
    assert is_fork(config_of("fork", "run/checkpoints/pretrain-4"), saved)
    assert not is_fork(config_of("fork"), saved)


def test_a_lost_latest_is_no_reason_to_copy_a_checkpoint_onto_itself(folder: Path) -> None:
    RunDir(folder / "run").latest.unlink()
    found, state = start(config_of("run", str(folder / "link/checkpoints/pretrain-4")))
    assert (found, state.best_checkpoint) == (Path("run/checkpoints/pretrain-4"), "pretrain-2")
    assert RunDir(folder / "run").latest.read_text() == "pretrain-4\n"


def test_weights_to_start_from_are_the_same_file_by_any_path(folder: Path) -> None:
    def start_from(source: str) -> RunConfig:
        return unchecked(
            CONFIG, [*WORDS, "output=x", f"phases.pretrain.start_from.source={source}"]
        )

    before = start_from("run/checkpoints/pretrain-4")
    for source in (f"{folder}/link/checkpoints/pretrain-4", "./run/checkpoints/pretrain-4/"):
        assert changed_options(start_from(source), before, []) == []
    (changed,) = changed_options(start_from("run/checkpoints/pretrain-2"), before, [])
    assert changed.startswith("phases.pretrain.start_from.source (was run/checkpoints/pretrain-4,")
    assert len(changed_options(start_from("random"), start_from("previous"), [])) == 1


def test_an_option_without_effect_may_be_removed_from_a_run() -> None:
    # Earlier versions took the rates of a frozen backbone's layers; now they are refused.
    off = [*WORDS, "output=x", "phases.pretrain.freeze=backbone"]
    before = unchecked(CONFIG, [*off, "phases.pretrain.layer_decay=0.5"])
    assert changed_options(unchecked(CONFIG, off), before, []) == []
    on = unchecked(CONFIG, [*off, "phases.pretrain.freeze=null"])
    changed = changed_options(on, before, [])
    assert [each.partition(" ")[0] for each in changed] == [
        "phases.pretrain.freeze",
        "phases.pretrain.layer_decay",
    ]
