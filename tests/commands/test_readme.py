"""What the documents name is there: commands, their words, options, files, links, headings."""

import argparse
import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from bigdet.cli.main import COMMANDS
from bigdet.config.describe import list_options
from bigdet.config.load import load_config
from bigdet.config.shipped import find_config
from tests.documents import DOCUMENTS, OTHERS, ROOT, Document

NAMES = {str(document): document for document in DOCUMENTS}
README, DESIGN = NAMES["README.md"], NAMES["bigdet/README.md"]
KEYS = {option.key for option in list_options()}
KEYS |= {key.removeprefix("phases.NAME.") for key in KEYS}  # tables of a phase's leave it out
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
NOT_OURS = {"model.safetensors", "model.type", "optimizer.safetensors"}  # files; mmdetection's
PLACEHOLDERS = {"CONFIG": "quickstart", "KEY": "data.train"}
COMMAND_LINES = sorted({text for document in DOCUMENTS for text in document.commands})
IMPORTS = """
from itertools import accumulate
from torch import nn
from bigdet.models.backbone_base import Backbone
from bigdet.models.norms import make_norm
"""
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=str)


def test_all_documents_are_looked_at():
    assert set(NAMES) >= {
        "README.md",
        "bigdet/README.md",
        "configs/README.md",
        "tools/README.md",
        ".github/CHANGELOG.md",
        ".github/CONTRIBUTING.md",
        ".github/ISSUE_TEMPLATE/problem.md",
    }
    assert len(COMMAND_LINES) >= 80


def test_the_readme_is_short_and_says_at_once_what_was_not_run():
    lines = README.text.splitlines()
    assert len(lines) <= 250
    assert "Not run at full length on GPUs yet" in "\n".join(lines[:20])


class ParsedError(Exception):
    """The words are as the command takes them; has its options."""


def parsed(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Return what a command reads from its words; it ends as soon as it has."""

    def stop_after(original):
        def parse(parser, words):
            options = original(parser, words)
            if set(vars(options)) == {"part"}:  # of a benchmark, which has a parser for each
                return options
            raise ParsedError(options)

        return parse

    main = importlib.import_module(module).main
    for method in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, method)
        monkeypatch.setattr(argparse.ArgumentParser, method, stop_after(original))
    with pytest.raises((ParsedError, SystemExit)) as ended:
        main(words)
    if ended.type is SystemExit:
        assert ended.value.code == 0, words  # as --options and --help
        return argparse.Namespace()
    return ended.value.args[0]


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """Return the module that a command runs and the words for it; no module for other files."""
    if words[0] == "bigdet":
        if words[1] in ("--help", "--version"):
            return "", []
        return f"bigdet.{COMMANDS[words[1]][0]}", words[2:]
    for flag in ("-m", "--module"):
        if flag in words:
            at = words.index(flag) + 1
            return words[at], words[at + 1 :]
    file = words[1]
    if words[0] == "torchrun":
        return "", []  # its options alone
    assert (ROOT / file).is_file(), words
    if file.startswith("tools/"):
        return f"bigdet.cli.{Path(file).stem}", words[2:]
    source = (ROOT / file).read_text(encoding="utf-8")
    assert all(word in source for word in words if word.startswith("--")), words
    return "", words[2:]


@pytest.mark.parametrize("text", COMMAND_LINES, ids=lambda text: text[:60])
def test_a_command_takes_its_words(text, monkeypatch, in_process):
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(text, comments=True)]
    if words[0] in OTHERS:
        return
    module, rest = split_command(words)
    if not module.startswith("bigdet.") or (not rest and words[0] == "python"):  # a name alone
        assert not module or importlib.util.find_spec(module), module
        return
    if re.match(r"my_\w+:", rest[0] if rest else ""):
        return  # a reader's own module
    options = parsed(module, rest, monkeypatch)
    for override in getattr(options, "overrides", []):
        assert is_option(override.partition("=")[0]), override
    if sweep := getattr(options, "sweep", None):
        assert find_config(sweep).is_file(), sweep
    if config := getattr(options, "config", None):
        check_options(find_config(config), options)


def check_options(file: Path, options: argparse.Namespace) -> None:
    """Check that a config that comes with bigdet takes the overrides and has the phase."""
    if not file.is_file():
        assert file.parts[0] == "runs", file
        return
    config = load_config(file, options.overrides)
    assert getattr(options, "phase", None) in {None, *config.phases}


def is_option(key: str) -> bool:
    """Whether the config has this option or section; a phase may have any name."""
    key = re.sub(r"^phases\.\w+", "phases.NAME", key)
    return any(option == key or option.startswith(f"{key}.") for option in KEYS)


@each_document
def test_config_keys_between_backticks_are_options(document: Document):
    keys = [re.split(r"[=: ]", span)[0] for span in document.spans]
    keys = [key for key in keys if re.fullmatch(r"\w+(\.\w+)+", key) and key not in NOT_OURS]
    keys = [key for key in keys if key.split(".")[0] in SECTIONS]
    assert [key for key in keys if not is_option(key)] == []


@each_document
def test_files_and_links_are_there(document: Document):
    named = r"(?<![\w./-])(?:bigdet|configs|launch|tests|tools|\.github)/[\w./]+\w"
    files = re.findall(named, re.sub(r"https?://\S+", "", document.text))
    assert [file for file in files if not (ROOT / file).exists()] == []
    for target in re.findall(r"\]\(([^)]+)\)", document.text):
        file, _, anchor = target.partition("#")
        path = (document.path.parent / file).resolve() if file else document.path
        assert path.exists(), target
        if anchor:
            assert anchor in NAMES[str(path.relative_to(ROOT))].anchors, target


@each_document
def test_the_blocks_of_python_import_what_is_there(document: Document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for language, text in document.fenced:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                exec(compile(ast.Module([node], []), str(document), "exec"), {})
        if document is DESIGN:
            exec(compile(text, str(document), "exec"), {"__name__": "block"})


@each_document
def test_lines_of_prose_are_short(document: Document):
    lines = document.text.splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith(("|", "!["))] == []


def test_the_config_is_one(tmp_path):
    (text,) = [text for language, text in README.fenced if language == "yaml"]
    config = tmp_path / "config.yaml"
    config.write_text(re.sub(r"(\w+/\w+\.yaml)", rf"{ROOT}/configs/\1", text))
    load_config(config)


@pytest.mark.parametrize("document", [README, DESIGN], ids=str)
def test_the_backbone_of_the_document_gives_four_levels(document: Document):
    import torch

    (text,) = [text for _, text in document.fenced if "class Small(Backbone)" in text]
    names: dict = {"__name__": "my_nets"}
    exec(IMPORTS + text, names)
    features = names["Small"]("gn")(torch.zeros(1, 3, 64, 96))
    # strides 4, 8, 16 and 32 of 64 x 96 pixels
    sizes = [(32, 16, 24), (64, 8, 12), (128, 4, 6), (256, 2, 3)]
    assert [tuple(feature.shape[1:]) for feature in features] == sizes
