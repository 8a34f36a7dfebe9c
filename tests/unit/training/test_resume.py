import dataclasses
from pathlib import Path

import pytest

from bigdet.config.load import ConfigError, dump_config, load_config
from bigdet.engine.checkpoint import Checkpoint
from bigdet.run_dir import RunDir
from bigdet.training.resume import find_checkpoint, settle_config

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
OPEN = ["phases.pretrain.images_per_step=null"]


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")


def saved_by(*overrides: str) -> Checkpoint:
    """A checkpoint of the first phase."""
    config = dump_config(load_config(CONFIG, overrides))
    return Checkpoint(run={"config": config, "run": {"phase": "pretrain"}})


def test_an_open_batch_size_becomes_one_micro_batch_per_rank():
    config = load_config(CONFIG, [*OPEN, "phases.finetune.images_per_step=32"])
    settled = settle_config(config, None, None)
    assert settled.phases["pretrain"].images_per_step == 4 * 8
    assert settled.phases["finetune"].images_per_step == 32


def test_a_resumed_run_keeps_its_batch_size_on_other_ranks():
    sizes = ["phases.pretrain.images_per_step=64", "phases.finetune.images_per_step=64"]
    config = load_config(CONFIG, ["phases.finetune.images_per_step=64", *OPEN])
    settled = settle_config(config, saved_by(*sizes), Path("x"))
    assert settled.phases["pretrain"].images_per_step == 64


def test_ranks_that_cannot_share_a_step_equally_are_refused():
    config = load_config(CONFIG, ["phases.pretrain.images_per_step=48"])
    with pytest.raises(ConfigError, match=r"phases\.pretrain\.images_per_step: .*4 ranks"):
        settle_config(config, None, None)


SIZES = ["phases.pretrain.images_per_step=32", "phases.finetune.images_per_step=32"]


@pytest.mark.parametrize(
    "override",
    ["data.workers=9", "data.train.shards=moved", "log.every=7", "output=other",
     "engine.zero_stage=0", "evaluation.every=10", "checkpoint.keep=9",
     "engine.offload=optimizer", "phases.finetune.lr=0.1"],
)  # fmt: skip
def test_what_does_not_change_the_training_may_change(override: str):
    config = load_config(CONFIG, [*SIZES, override])
    assert settle_config(config, saved_by(*SIZES), Path("x")) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=4", r"seed \(was 0, now 4\)"),
        ("phases.pretrain.lr=0.5", r"phases\.pretrain\.lr \(was .*, now 0\.5\)"),
        ("model.width=32", r"model\.width \(was 64, now 32\)"),
        ("engine.precision=bf16", r"engine\.precision \(was fp32, now bf16\)"),
        ("data.train.keep_empty=true", r"data\.train\.keep_empty"),
    ],
)
def test_what_changes_the_training_is_named_with_both_values(override: str, said: str):
    config = load_config(CONFIG, [*SIZES, override])
    with pytest.raises(ConfigError, match=said):
        settle_config(config, saved_by(*SIZES), Path("x"))


def test_a_phase_may_not_be_added_to_a_run():
    config = load_config(CONFIG, SIZES)
    extra = {**config.phases, "more": config.phases["finetune"]}
    with pytest.raises(ConfigError, match="pretrain, finetune, more"):
        settle_config(dataclasses.replace(config, phases=extra), saved_by(*SIZES), Path("x"))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run with one checkpoint."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.checkpoint("pretrain", 5).mkdir(parents=True)
    (run_dir.checkpoint("pretrain", 5) / "state.json").write_text("{}")
    run_dir.latest.write_text("pretrain-5\n")
    run_dir.config.write_text(dump_config(load_config(CONFIG)))
    return run_dir


def test_auto_goes_on_from_the_latest_and_never_refuses_it(run_dir: RunDir):
    newest = run_dir.checkpoint("pretrain", 5)
    assert find_checkpoint(load_config(CONFIG), run_dir) == newest
    assert find_checkpoint(load_config(CONFIG), RunDir(run_dir.root / "new")) is None
    with pytest.raises(ConfigError, match=r"resume: found never, but .* has checkpoints"):
        find_checkpoint(load_config(CONFIG, ["resume=never"]), run_dir)


def test_a_named_checkpoint_begins_a_new_folder_and_no_other(run_dir: RunDir, tmp_path: Path):
    named = run_dir.checkpoint("pretrain", 5)
    config = load_config(CONFIG, [f"resume={named}"])
    new = RunDir(tmp_path / "new")
    assert find_checkpoint(config, new) == new.checkpoint("pretrain", 5)
    assert (new.checkpoint("pretrain", 5) / "state.json").is_file()
    new.config.write_text(dump_config(config))
    assert find_checkpoint(config, new) == new.checkpoint("pretrain", 5)  # the same command again
    with pytest.raises(ConfigError, match="has checkpoints of its own"):
        find_checkpoint(config, run_dir)
