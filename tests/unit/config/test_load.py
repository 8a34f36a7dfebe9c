from pathlib import Path

import pytest

from bigdet.config.load import check_phase, dump_config, load_config, parse_config
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig

EXPERIMENT = """
include: [data.yaml]
output: runs/x
model: {detector: mask_rcnn, backbone: resnet50}
phases:
  pretrain:
    {steps: 1_000, images_per_gpu: 8, lr: 4e-4, norm_mode: live, warmup_steps: 0,
    resize: {kind: direct, size: 448}}
  finetune:
    {steps: 500, images_per_gpu: 2, lr: 1e-4, norm_mode: live, warmup_steps: 0,
    resize: {kind: short_side, size: 800}}
"""
FRAGMENT = "data: {train: {shards: a}, val: {shards: b}, workers: 3}\n"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    (tmp_path / "data.yaml").write_text(FRAGMENT)
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT)
    return path


def test_experiment_overrides_fragment_and_command_line_overrides_both(experiment: Path):
    experiment.write_text(EXPERIMENT + "data: {workers: 5}\n")
    assert load_config(experiment).data.workers == 5
    config = load_config(experiment, ["data.workers=7", "phases.finetune.lr=3e-5"])
    assert config.data.workers == 7
    assert config.data.train.shards == "a"
    assert config.phases["finetune"].lr == 3e-5
    assert list(config.phases) == ["pretrain", "finetune"]
    assert config.phases["pretrain"].steps == 1000


def test_resolved_config_repeats_the_run(experiment: Path):
    config = load_config(experiment, ["phases.pretrain.drops=[10,20]"])
    again = parse_config(dump_config(config), "config.yaml")
    assert again == config
    assert isinstance(again, RunConfig)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.detctor=x", ["model.detctor", "detector"]),
        ("phases.pretrain.start_from.parts=fpn", ["start_from.parts: found one value", "a list"]),
        ("data.train.subset.ids=[1,2]", ["data.train.subset.ids: found a list", "one value"]),
        ("phases.pretrain.wramup_steps=3", ["no such option; did you mean 'warmup_steps'?"]),
        ("data.val.quux=3", ["data.val.quux: there is no such option. There are: shards"]),
        ("phases.pretran.steps=3", ["phases.pretran.steps", "did you mean 'pretrain'"]),
        ("seed=abc", ["seed", "abc", "Integer"]),
        ("phases.pretrain.steps=3e5", ["phases.pretrain.steps", "such as 300_000"]),
        ("model.detector=yolo", ["model.detector", "yolo", "faster_rcnn"]),
        ("data=3", ["data=3"]),
        ("phases.pretrain.resize.scale_range=[1.0]", ["phases.pretrain.resize.scale_range"]),
        ("--steps", ["--steps", "key=value"]),
    ],
)
def test_mistakes_on_the_command_line_name_the_key(
    experiment: Path, override: str, words: list[str]
):
    with pytest.raises(ConfigError) as caught:
        load_config(experiment, [override])
    for word in ["command line", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output: x\nphasez: {}\n", ["phasez"]),
        ("output: [", ["cannot be read as YAML"]),
        ("- a\n- b\n", ["mapping"]),
        ("include: [absent.yaml]\noutput: x\n", ["absent.yaml", "no such"]),
        ("output: x\n", ["required and not set", "data.train.shards", "phases"]),
        ("output: x\nphases: {train: {steps: 3e5}}\n", ["phases.train.steps"]),
    ],
)
def test_mistakes_in_a_file_name_the_file_and_the_key(tmp_path: Path, text: str, words: list[str]):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(tmp_path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_two_fragments_may_not_set_the_same_key(experiment: Path):
    (experiment.parent / "more.yaml").write_text("data: {workers: 1}\n")
    experiment.write_text(EXPERIMENT.replace("[data.yaml]", "[data.yaml, more.yaml]"))
    with pytest.raises(ConfigError, match=r"more\.yaml: data\.workers: .*data\.yaml sets it too"):
        load_config(experiment)


def test_a_fragment_includes_nothing(experiment: Path):
    (experiment.parent / "data.yaml").write_text("include: [more.yaml]\n" + FRAGMENT)
    with pytest.raises(ConfigError, match="a fragment includes nothing"):
        load_config(experiment)


def test_a_file_that_is_not_there_is_reported_with_the_nearest_and_with_who_includes_it(experiment):
    folder = experiment.parent
    with pytest.raises(ConfigError, match=rf"no such config file; did you mean '{experiment}'\?"):
        load_config(folder / "experimnet.yaml")
    experiment.write_text(EXPERIMENT.replace("data.yaml", "nowhere.yaml"))
    with pytest.raises(ConfigError, match=rf"^{experiment}: include: {folder}/nowhere.yaml: there"):
        load_config(experiment)


def test_a_folder_and_a_sweep_are_no_config(experiment):
    folder = experiment.parent
    with pytest.raises(
        ConfigError, match=rf"is a folder\. Give a YAML file, such as {folder}/data"
    ):
        load_config(folder)
    (folder / "sweep.yaml").write_text("output: x\nruns: {a: {}}\n")
    with pytest.raises(ConfigError, match=r"is a sweep\. Start it with `bigdet sweep"):
        load_config(folder / "sweep.yaml")


def test_a_phase_that_does_not_exist_is_reported_with_the_nearest(experiment):
    config = load_config(experiment)
    check_phase(config, "finetune")
    with pytest.raises(
        ConfigError, match=r"--phase finetuen: .* did you mean 'finetune'\? The con"
    ):
        check_phase(config, "finetuen")


def test_the_home_folder_is_known_where_no_shell_sees_it(experiment: Path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    experiment.write_text(
        EXPERIMENT.replace("runs/x", "~/runs/x") + "resume: ~/y/checkpoints/a-1\n"
    )
    config = load_config(experiment)
    assert (config.output, config.resume) == ("/home/ann/runs/x", "/home/ann/y/checkpoints/a-1")
    assert load_config(experiment, ["output=~/z"]).output == "/home/ann/z"
