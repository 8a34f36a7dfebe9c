"""The table of timm's networks, and what the config says of a name that is not in it."""

import pytest

from bigdet.config.describe import describe_options
from bigdet.config.families import backbone_facts
from bigdet.config.load import load_config
from bigdet.config.rules import ConfigError
from bigdet.config.timm_names import timm_row, timm_rows
from tests.timm_table import row_of

CONFIG = "configs/quickstart.yaml"


@pytest.mark.parametrize(
    "name",
    [
        "resnet18d", "regnety_002", "efficientnet_lite0", "convnextv2_atto", "tiny_vit_5m_224",
        "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "deit_tiny_patch16_224",
        "levit_128", "res2net50_26w_4s", "vit_small_patch16_18x2_224", "xcit_nano_12_p8_224",
        "skresnet18", "beit_base_patch16_224",
    ],
)  # fmt: skip
def test_rows_are_what_building_and_running_the_network_finds(name):
    assert row_of(name) == timm_rows()[name]


def test_the_table_has_parameters_without_the_classifier_and_strides():
    row = timm_rows()["resnet50d"]
    # timm's 25,576,264 less a classifier of 2048 x 1000 + 1000
    assert row.parameters == 25_576_264 - 2_049_000
    assert (row.channels, row.strides) == ([256, 512, 1024, 2048], [4, 8, 16, 32])
    row = timm_rows()["vit_large_patch16_dinov3"]
    assert (row.channels, row.strides, row.depth) == ([1024], [16], 24)
    assert row.heeds == ["drop_path", "taps", "image_windows"]  # rotary positions: no token_window
    heeds = ["drop_path", "taps", "rope_window", "global_blocks", "image_windows"]
    assert timm_rows()["eva02_large_patch14_224"].heeds == heeds
    assert "token_window" in timm_rows()["vit_large_patch14_dinov2"].heeds


def test_every_family_that_is_promised_has_usable_names():
    usable = [name for name, row in timm_rows().items() if not row.lacks]
    assert len(usable) > 1000
    words = """
        vit_ deit_ dinov2 dinov3 eva02 pe_core siglip hiera swin_ swinv2_ convnext_ convnextv2_
        resnet50d resnetrs regnet efficientnet maxvit mvitv2 tiny_vit
    """
    for word in words.split():
        assert any(word in name for name in usable), word


def test_the_last_norm_is_for_dinov2_and_dinov3():
    for name, expected in (
        ("vit_small_patch14_dinov2", True),
        ("vit_7b_patch16_dinov3", True),
        ("vit_small_patch16_224", False),
        ("eva02_large_patch14_448", False),
    ):
        assert backbone_facts(f"timm:{name}").sizes.get("final_norm", False) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50x", r"timm has no such network\. Did you mean timm:resnet50\?"),
        ("levit_128", r"that network lacks features of stride 4 and 8"),
        ("resnet50.a1_in1k", r"also names weights of resnet50\. Write model\.backbone: "),
    ],
)  # fmt: skip
def test_other_names_are_refused_with_what_is_missing(name, message):
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, [f"model.backbone=timm:{name}"])


def test_all_names_are_listed_with_parameters_and_strides():
    lines = describe_options("model.backbone").splitlines()
    cells = [line.split() for line in lines if " timm:" in line]
    assert len([line for line in cells if line[0].startswith("timm:")]) > 1000
    assert ["timm:resnet50d", "23.5", "4", "8", "16", "32", "norm", "drop_path"] in cells
    assert not any("timm:resnet50d" in line for line in describe_options("model.width").split("\n"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["timm:resnet50d", "model.taps=[3]"], r"model\.taps.*gives features of its stages"),
        (["timm:vit_small_patch16_dinov3", "model.token_window=7"], r"model\.token_window.*no win"),
        (["timm:vit_small_patch16_224", "model.rope_window=7"], r"model\.rope_window.*no rotary"),
        (["timm:eva02_tiny_patch14_224", "model.global_blocks=3"], r"global_blocks: all blocks"),
        (["timm:eva02_tiny_patch14_224", "model.rope_window=16", "model.global_blocks=13"],
         r"model\.global_blocks: found 13, expected 1 to 12"),
        (["timm:vit_small_patch16_224", "model.taps=[3,13]"], r"rising numbers from 1 to 12"),
        (["timm:vit_small_patch16_224", "model.taps=[6,3]"], r"rising numbers from 1 to 12"),
        (["resnet50", "model.image_windows=3"], r"model\.image_windows.*takes images whole"),
        (["timm:vit_small_patch16_224", "model.image_windows=0"], r"a number above 0"),
    ],
)  # fmt: skip
def test_options_of_plain_networks_are_for_them_alone(words, message):
    norms = ["model.norm=gn", "phases.pretrain.norm_mode=null", "phases.finetune.norm_mode=null"]
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, [f"model.backbone={words[0]}", *norms, *words[1:]])
    fine = ["model.taps=[3,6,9,12]", "model.token_window=null", "model.image_windows=3"]
    load_config(CONFIG, ["model.backbone=timm:vit_small_patch16_224", *norms, *fine])


def test_a_name_of_weights_is_what_timm_calls_the_network():
    assert backbone_facts("timm:regnety_002").published == "regnety_002"
    assert backbone_facts("timm:nfnet_f0").published is None
    assert timm_row("timm:regnety_002").has_weights
