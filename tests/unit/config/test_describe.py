import dataclasses
from pathlib import Path

import pytest

from bigdet.config.describe import describe_options, list_options
from bigdet.config.load import load_config
from bigdet.config.rules import ConfigError
from bigdet.train import parse_arguments

ROOT = Path(__file__).parents[3]
OPTIONS = {option.key: option for option in list_options()}


def test_options_have_type_default_and_unit():
    stall = OPTIONS["log.stall_seconds"]
    assert (stall.kind, stall.default) == ("float | null", "1200.0")
    assert stall.text.startswith("After this many seconds without progress")
    assert OPTIONS["engine.zero_stage"].kind == "int | null"
    assert OPTIONS["phases.NAME.optimizer"].kind == "sgd | adamw"
    assert OPTIONS["phases.NAME.betas"].kind == "[float, float]"
    assert OPTIONS["phases.NAME.drops"].kind == "[int | float, ...] | null"
    assert OPTIONS["model.rpn.anchor_sizes"].default == "[32, 64, 128, 256, 512]"
    assert OPTIONS["data.train.keep_empty"].default == "false"
    assert OPTIONS["data.train.shards"].default == ""  # required
    assert OPTIONS["evaluation.tta"].default == "null"  # a section that may be left out


def test_every_option_is_described():
    assert all(len(option.text) > 5 for option in OPTIONS.values())
    sections = {key for key, option in OPTIONS.items() if not option.kind}
    assert {"data", "data.train", "data.train.subset", "phases.NAME", "phases.NAME.resize"} <= (
        sections
    )


def test_every_key_of_a_config_is_listed():
    config = load_config(ROOT / "configs" / "r50_direct.yaml")
    keys = set(leaves(config))
    assert "phases.NAME.start_from.source" in keys
    assert keys <= set(OPTIONS)


def leaves(section, prefix=""):
    for name in (field.name for field in dataclasses.fields(section)):
        value = getattr(section, name)
        if name == "phases":
            for phase in value.values():
                yield from leaves(phase, "phases.NAME.")
        elif hasattr(value, "__dataclass_fields__"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_a_key_chooses_its_section_and_any_name_matches_a_phase():
    text = describe_options("data.val")
    assert text.splitlines() == [
        "data.val:",
        "    The validation split.",
        "data.val.shards: str (required)",
        "    Folder or address of a shard set.",
    ]
    assert describe_options("phases.finetune.lr") == describe_options("phases.NAME.lr")
    assert max(map(len, describe_options().splitlines())) <= 100


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"data\.trian.*did you mean 'data\.train'\?"):
        describe_options("data.trian")


def test_options_of_the_command_need_no_config(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--options", "data.val"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == describe_options("data.val")


def test_options_of_the_batch_say_what_else_they_change():
    assert "changes the gradient" in OPTIONS["phases.NAME.images_per_gpu"].text
    assert "changes AP a little" in OPTIONS["evaluation.images_per_gpu"].text
