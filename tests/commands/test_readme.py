"""What the README names is there: commands, their options, config keys, files, headings."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from bigdet.cli.main import COMMANDS
from bigdet.config.check import check_config
from bigdet.config.describe import list_options
from bigdet.config.load import load_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
SPANS = re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", PROSE, flags=re.MULTILINE))
KEYS = {option.key for option in list_options()}
KEYS |= {key.removeprefix("phases.NAME.") for key in KEYS}  # tables of a phase's leave it out
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
NOT_OURS = {"model.safetensors", "model.type"}  # a file; mmdetection's
OTHERS = {".", "pip", "python3", "tensorboard", "touch"}  # programs that are not ours
SUBCOMMANDS = {"bigdet.cli.make_shards", "bigdet.cli.convert_weights", "bigdet.cli.benchmark"}


def commands() -> list[list[str]]:
    """The words of each command that stands in an indented block, or alone between backticks."""
    blocks = re.findall(r"^    ((?:.*\\\n)*.*)$", PROSE, re.MULTILINE)
    starts = ("bigdet ", "python ", "deepspeed ", "torchrun ", "bash ", "sbatch ")
    typed = [text for text in blocks if text.startswith((*starts, *(f"{o} " for o in OTHERS)))]
    typed += [
        text
        for text in SPANS
        if text.startswith(starts) and (re.search(r"\.\w+ ", text) or text.split()[1] in COMMANDS)
    ]
    return [shlex.split(text.replace("\\\n", " "), comments=True) for text in typed]


@cache
def help_of(module: str, subcommand: str) -> str:
    """What ``--help`` says."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        importlib.import_module(module).main([subcommand, "--help"] if subcommand else ["--help"])
    return told.getvalue()


def is_option(key: str) -> bool:
    """Whether the config has this option or section; a phase may have any name."""
    key = re.sub(r"^phases\.\w+", "phases.NAME", key)
    return any(option == key or option.startswith(f"{key}.") for option in KEYS)


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """Return the module that a command runs and the words for it; no module for shell scripts."""
    if words[0] in ("bash", "sbatch"):
        assert (ROOT / words[1]).is_file(), words
        return "", words[2:]
    if words[0] == "bigdet":
        name, *rest = words[1:]
        return (f"bigdet.{COMMANDS[name][0]}", rest) if name in COMMANDS else ("", [])
    for flag in ("-m", "--module"):
        if flag in words:
            at = words.index(flag) + 1
            return words[at], words[at + 1 :]
    assert words[0] == "python", words
    if words[1].startswith("tools/"):
        assert (ROOT / words[1]).is_file(), words
        return f"bigdet.{Path(words[1]).stem}", words[2:]
    assert (ROOT / words[1]).is_file(), words
    return "", words[2:]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_a_command_has_its_options(words):
    if words[0] in OTHERS:
        return
    module, rest = split_command(words)
    if module.startswith("bigdet."):
        text = help_of(module, rest[0] if module in SUBCOMMANDS else "")
        for option in (word for word in rest if word.startswith("--")):
            assert re.search(rf"{option}\b", text), f"{option} is no option of {module}"
    else:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file() or not module, module
    for word in rest:
        key, is_override, _ = word.partition("=")
        if is_override and not word.startswith(("-", "[")):
            assert is_option(key), key


def test_config_keys_between_backticks_are_options():
    keys = [re.split(r"[=: ]", span)[0] for span in SPANS]
    keys = [key for key in keys if re.fullmatch(r"\w+(\.\w+)+", key) and key not in NOT_OURS]
    keys = [key for key in keys if key.split(".")[0] in SECTIONS]
    assert len(keys) > 30
    assert [key for key in keys if not is_option(key)] == []


def test_files_between_backticks_and_links_are_there():
    files = re.findall(r"(?:bigdet|configs|launch|tests|tools)/[\w./]+\w", TEXT)
    files += re.findall(r"\]\((\.github/[^)]+)\)", TEXT)
    assert len(files) > 40
    assert [file for file in files if not (ROOT / file).exists()] == []
    headings = re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_the_blocks_of_python_import_what_is_there():
    blocks = [text for language, text in FENCED if language == "python"]
    assert blocks
    for node in ast.walk(ast.parse("\n".join(blocks))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names)


def test_the_config_is_one(tmp_path):
    (text,) = [text for language, text in FENCED if language == "yaml"]
    config = tmp_path / "config.yaml"
    config.write_text(re.sub(r"(\w+/\w+\.yaml)", rf"{ROOT}/configs/\1", text))
    check_config(load_config(config))
