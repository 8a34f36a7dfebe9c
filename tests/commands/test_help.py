"""Every command and tool explains itself and its options, with examples that can be typed."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def commands():
    """The words that start each command, and its module."""
    for path in sorted((ROOT / "bigdet").glob("*.py")):
        if '__name__ == "__main__"' in path.read_text():
            yield f"python -m bigdet.{path.stem}", f"bigdet.{path.stem}", []
    for path in sorted((ROOT / "tools").glob("*.py")):
        if '__name__ == "__main__"' in path.read_text():
            yield f"python tools/{path.name}", path.stem, []
    for source in ("coco", "objects365", "voc", "deeppcb", "shapes", "merge"):
        yield f"python tools/make_shards.py {source}", "make_shards", [source]
    for part in ("stream", "step", "predict", "evaluate", "resume"):
        yield f"python tools/benchmark.py {part}", "benchmark", [part]
    for direction in ("to-torchvision", "from-torchvision"):
        yield f"python tools/convert_weights.py {direction}", "convert_weights", [direction]


def import_main(module, monkeypatch):
    """The command's ``main``; tools are no package, so their short names go again."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    before = set(sys.modules)
    main = importlib.import_module(module).main
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(ROOT / "tools" / f"{name}.py"):
            monkeypatch.delitem(sys.modules, name)
    return main


@pytest.mark.parametrize(
    ("typed", "module", "words"), list(commands()), ids=lambda value: str(value)
)
def test_help_has_an_example(typed, module, words, monkeypatch, capsys, in_process):
    main = import_main(module, monkeypatch)
    silent: list[str] = []
    print_help = argparse.ArgumentParser.print_help

    def note_silent_options(parser, file=None):
        silent.extend(action.dest for action in parser._actions if not action.help)
        print_help(parser, file)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", note_silent_options)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert silent in ([], ["part"], ["source"], ["direction"])  # what is chosen has a line each
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"{typed} " in " ".join(text.split()), text


class ParsedError(Exception):
    """The words of an example are as the command takes them."""


@pytest.mark.parametrize(
    ("typed", "module"), [(typed, module) for typed, module, words in commands() if not words]
)
def test_examples_are_as_the_command_takes_them(typed, module, monkeypatch, in_process):
    main = import_main(module, monkeypatch)
    start = typed.removeprefix("python ")
    lines = importlib.import_module(main.__module__).__doc__.replace("\\\n", " ").splitlines()
    examples = [
        re.split(rf"{re.escape(start)} |  \(| >", line)[1]
        for line in lines
        if f"{start} " in line and "..." not in line.split("  (")[0] and "[" not in line
    ]
    assert examples

    def stop_after(original):
        def parse(parser, words):
            options = original(parser, words)
            if set(vars(options)) == {"part"}:  # of benchmark.py, which has a parser for each
                return options
            raise ParsedError

        return parse

    for method in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, method)
        monkeypatch.setattr(argparse.ArgumentParser, method, stop_after(original))
    for example in examples:
        with pytest.raises((ParsedError, SystemExit)) as ended:
            main(shlex.split(example))
        assert ended.type is ParsedError or ended.value.code == 0, example  # 0: as --options
