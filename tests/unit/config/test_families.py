"""What each backbone and detector is, and what is said of a user's own that does not fit."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import pytest

from bigdet.cli import make_shards
from bigdet.config.describe import describe_options
from bigdet.config.families import BACKBONES, DETECTOR_OPTIONS, DETECTORS, backbone_facts
from bigdet.config.load import load_config, parse_config
from bigdet.config.model import ModelConfig, settle_sections
from bigdet.config.own import import_own
from bigdet.config.rules import ConfigError
from bigdet.models.build import build_detector
from bigdet.run_dir import RunDir
from bigdet.training.same_hosts import own_code
from bigdet.training.showing import open_boards
from tests.shipped import CONFIGS

ROOT = Path(__file__).parents[3]
NETS = """
import torch
from torch import nn
from bigdet.config.families import describe_detector
from bigdet.models.backbone_base import Backbone
from bigdet.models.build import build_retinanet
from bigdet.models.norms import make_norm

class Net(Backbone):
    def __init__(self, make, channels=(8, 8, 8, 8), stages=5, kept=4):
        super().__init__()
        self.channels, self.num_stages, self.kept = list(channels), stages, kept
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3 if n == 0 else 8, 8, 3, 2, 1), make(8)) for n in range(5)
        )
    @property
    def stages(self):
        return [[block] for block in self.blocks][:self.num_stages]
    def forward(self, images):
        features = []
        for block in self.blocks:
            images = block(images)
            features.append(images)
        return features[-self.kept:]

def plain(norm): return Net(lambda n: make_norm(norm, n))
def bare(): return Net(lambda n: nn.Identity())
def nothing(): pass
def module(): return nn.Conv2d(3, 8, 3)
def torch_norm(): return Net(nn.BatchNorm2d)
def own_norm(): return Net(lambda n: make_norm("bn", n))
def no_norm(norm): return Net(lambda n: nn.Identity())
def few_stages(): return Net(lambda n: nn.Identity(), stages=4)
def three(): return Net(lambda n: nn.Identity(), channels=(8, 8, 8))
def wide(): return Net(lambda n: nn.Identity(), channels=(8, 8, 8, 16))
def three_maps(): return Net(lambda n: nn.Identity(), kept=3)
def wants(depth): pass
def many(*args): pass
number = 3

def silent(config, num_classes, backbone): pass
of_retina = dict(parts=("backbone", "fpn", "retina_head"), options=("width", "retina"))
retina = describe_detector(**of_retina)(lambda config, num_classes, backbone:
    build_retinanet(config, num_classes, backbone))
empty = describe_detector(**of_retina)(lambda config, num_classes, backbone: None)
no_section = describe_detector(parts=("backbone", "fpn", "retina_head"), options=("width",))(
    lambda config, num_classes, backbone: build_retinanet(config, num_classes, backbone))
other = describe_detector(parts=("backbone", "neck"), options=("width", "retina"))(retina_like :=
    lambda config, num_classes, backbone: build_retinanet(config, num_classes, backbone))
def with_more(norm):
    def build(config, num_classes, backbone):
        detector = build_retinanet(config, num_classes, backbone)
        detector.retina_head.more = norm
        return detector
    return describe_detector(**of_retina)(build)
torch_head = with_more(nn.BatchNorm2d(8))
head_norm = with_more(make_norm("bn", 8))
short = describe_detector(**of_retina)(lambda config: None)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module with those nets, another one in each test."""
    name = f"nets_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def model(**options: object) -> ModelConfig:
    chosen = ModelConfig(width=8, fc_width=8, **({"detector": "faster_rcnn"} | options))
    return settle_sections(chosen, [chosen.detector], ())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothing", r"nothing returned None, expected a Backbone"),
        ("module", r"module returned a Conv2d, expected a Backbone"),
        ("torch_norm", r"has BatchNorm2d of torch, .* Expected make_norm"),
        ("own_norm", r"has batch normalization, where it is called with no option"),
        ("no_norm", r"has no batch normalization, where it is called with \{'norm': 'bn'\}"),
        ("few_stages", r"stages has 4 lists of modules, expected 5"),
        ("three", r"channels is \[8, 8, 8\], expected four numbers"),
        (
            "wide",
            r"gives \[\(1, 8, 16, 24\), \(1, 8, 8, 12\), \(1, 8, 4, 6\), \(1, 8, 2, 3\)\], "
            r"expected a list of C2 to C5, \[.*\(1, 16, 2, 3\)\]",
        ),
        ("three_maps", r"gives \[\(1, 8, 8, 12\), \(1, 8, 4, 6\), \(1, 8, 2, 3\)\], expected"),
        (
            "wants",
            r"requires depth\. Expected parameters that are options of model \(norm, "
            r"drop_path",
        ),
        ("many", r"takes \*args, expected parameters with names only"),
        ("number", r"which is a int, expected a function or a class"),
        ("plane", r"has no plane; did you mean 'plain'\?"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(nets: str, name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.backbone: .*{nets}.*{expected}"):
        build_detector(model(backbone=f"{nets}:{name}"), 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silent", r"has no description\. Write @describe_detector"),
        ("empty", r"empty returned None, expected a Detector"),
        ("other", r"has the parts backbone, fpn, retina_head, but its .* says backbone, neck"),
        ("torch_head", r"has BatchNorm2d of torch"),
        ("head_norm", r"in backbone, retina_head, but .* it is in backbone\. List parts"),
        ("short", r"takes \(config\), expected \(config, num_classes, backbone\)"),
    ],
)
def test_a_detector_that_does_not_fit_is_refused(nets: str, name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.detector: .*{nets}.*{expected}"):
        build_detector(model(detector=f"{nets}:{name}", backbone="resnet10"), 2)


def test_a_section_that_an_own_detector_uses_has_to_be_among_its_options(nets: str) -> None:
    config = model(detector=f"{nets}:no_section", backbone="resnet10")
    with pytest.raises(ConfigError, match=r"^model\.detector: it uses .* retina\) that is null"):
        build_detector(config, 2)


def test_a_module_that_is_not_there_or_fails_is_reported(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_broken.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / "their_needy.py").write_text("import not_installed_here\n")
    with pytest.raises(
        ValueError, match=r"^key: found 'not_there\.x:y', but there is no module not"
    ):
        import_own("key", "not_there.x:y")
    expected = r"importing their_broken fails: ZeroDivisionError: .*\(their_broken\.py, line 2\)"
    with pytest.raises(ValueError, match=expected):
        import_own("key", "their_broken:y")
    with pytest.raises(ValueError, match=r"importing their_needy fails: ModuleNotFoundError"):
        import_own("key", "their_needy:y")
    for name in ("a:", ":b", "a:b:c", "a b:c", "a/b.py:c"):
        with pytest.raises(ValueError, match=r"expected package\.module:attribute"):
            import_own("key", name)


def test_a_name_that_is_none_is_refused_when_it_is_read() -> None:
    quickstart = CONFIGS / "quickstart.yaml"
    for word in ("model.backbone=resnet5", "phases.finetune.model.detector=mask_rcnm"):
        key, _, name = word.partition("=")
        with pytest.raises(ConfigError, match=rf"{key}: found '{name}'; did you mean .* Expected"):
            load_config(quickstart, [word])
    text = "model: {backbone: resnet500}"
    with pytest.raises(ConfigError, match=r"^a file: model\.backbone: found 'resnet500'"):
        parse_config(text, "a file")


def test_options_that_a_users_own_does_not_take_are_refused(nets: str) -> None:
    def check(*words: str) -> None:
        load_config(CONFIGS / "retinanet_r50_direct.yaml", words)

    check(f"model.backbone={nets}:plain")
    with pytest.raises(ConfigError, match=rf"model\.drop_path: found 0\.1, but {nets}:plain takes"):
        check(f"model.backbone={nets}:plain", "model.drop_path=0.1")
    norms = ["phases.pretrain.norm_mode=null", "phases.finetune.norm_mode=null"]
    check(f"model.backbone={nets}:bare", *norms)
    with pytest.raises(ConfigError, match=r"norm_mode: found \w+, but the model has no BN"):
        check(f"model.backbone={nets}:bare")
    check(f"model.detector={nets}:retina")
    with pytest.raises(ConfigError, match=rf"model\.rpn\.nms_iou: {nets}:retina has no proposals"):
        check(f"model.detector={nets}:retina", "model.rpn.nms_iou=0.6")
    with pytest.raises(ConfigError, match=rf"model\.norm_scope: found all, but {nets}:retina"):
        check(f"model.detector={nets}:retina", "model.norm_scope=all", "model.norm=gn", *norms)


def test_what_a_backbone_heeds_are_its_parameters(nets: str) -> None:
    assert backbone_facts(f"{nets}:plain").heeds == ("norm",)
    assert backbone_facts(f"{nets}:bare").heeds == ()
    assert backbone_facts("resnet50").heeds == ("norm", "stride_in_1x1")
    assert backbone_facts("swin_t").heeds == ("drop_path",)


BOARDS = """
class Board:
    def __init__(self, folder, first_step, options): pass
    def add_scalars(self, values, step): pass
class Few:
    def __init__(self, folder): pass
"""


def test_a_board_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "their_boards.py").write_text(BOARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_boards", raising=False)
    for name, expected in (
        ("Board", "returned a Board without add_picture, close, expected the methods"),
        ("Few", r"takes \(folder\), expected \(folder, first_step, options\)"),
    ):
        words = [f"log.boards=['their_boards:{name}']", "log.tensorboard=false"]
        config = load_config(CONFIGS / "quickstart.yaml", words)
        with pytest.raises(ValueError, match=rf"^log\.boards: their_boards:{name} {expected}"):
            open_boards(config, RunDir(tmp_path / "run"), 1)
    with pytest.raises(ValueError, match=r"^log\.boards: .* has no Bored; did you mean 'Board'"):
        load_config(CONFIGS / "quickstart.yaml", ["log.boards=['their_boards:Bored']"])


SOURCES = """
def no_out(root): pass
def listed(root: list[str], *, out, making, progress): pass
def forgets(number: int = 3, *, out, making, progress): return number
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["no_out"], r"takes \(root\), expected out, making, progress too"),
        (["listed", "--root", "x"], r"takes root: list\[str\], expected Path, str, int"),
        (["forgets", "--number", "4"], r"forgets returned a int, expected the Manifest"),
        (["forgotten"], r"has no forgotten; did you mean 'forgets'"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch, words: list[str], expected: str
) -> None:
    (tmp_path / "their_sources.py").write_text(SOURCES)
    monkeypatch.syspath_prepend(tmp_path)
    name, *options = words
    with pytest.raises(ValueError, match=rf"^bigdet shards: .*{expected}"):
        make_shards.main([f"their_sources:{name}", *options, "--out", str(tmp_path / "out")])


def test_help_of_the_options_lists_the_names_of_the_rows() -> None:
    head = describe_options("model.detector").split(" = ")[0].split("(")[0]
    names = re.sub(r"\s+", " ", head).removeprefix("model.detector: ").strip().split(" | ")
    assert names == [*DETECTORS, "package.module:attribute"]


def test_rows_name_options_and_parts_that_there_are() -> None:
    for name, facts in DETECTORS.items():
        assert set(facts.options) <= set(DETECTOR_OPTIONS), name
        assert set(facts.normalized) <= set(facts.parts), name
    assert set(DETECTOR_OPTIONS) <= set(vars(model(backbone="resnet10")))


def spread(words: str) -> list[str]:
    """Write out ``swin_t/s`` as ``swin_t, swin_s``."""
    first, *others = words.split("/")
    stem = re.sub(r"(\d+|[a-z])$", "", first)
    return [first, *(stem + other for other in others)]


def test_documents_list_the_names_of_the_rows() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("configs/*.md"), *ROOT.glob("bigdet/*.md")]
    text = "\n".join(file.read_text() for file in files)
    for option, rows in (("detector", DETECTORS), ("backbone", BACKBONES)):
        found = re.search(rf"^\| `model\.{option}` \| (`(?:faster|resnet10)[^|]*)\|", text, re.M)
        assert found, option
        names = [n for words in re.findall(r"`([a-z0-9_/]+)`", found[1]) for n in spread(words)]
        assert sorted(names) == sorted(rows)


def test_hosts_compare_the_code_of_a_users_own(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "their_code.py").write_text("def build(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_own("model.backbone", "their_code:build")
    digest = hashlib.sha256(b"def build(): pass\n").hexdigest()
    assert own_code(["resnet10", "their_code:build"]) == {"code of their_code": digest[:12]}
