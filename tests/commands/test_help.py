"""Every command and tool explains itself and its options, with examples that can be typed."""

import argparse
import importlib.util
import re
import shlex

import pytest

from bigdet.cli.main import COMMANDS

WORDS = {
    "shards": ["coco", "objects365", "voc", "deeppcb", "shapes", "merge"],
    "benchmark": ["stream", "step", "predict", "evaluate", "meetings", "resume"],
    "convert-weights": ["to-torchvision", "from-torchvision"],
}
"""What some commands take first."""


def commands():
    """The words that start each command, and its module."""
    for name, (module, _) in COMMANDS.items():
        yield f"bigdet {name}", f"bigdet.{module}", []
        for word in WORDS.get(name, []):
            yield f"bigdet {name} {word}", f"bigdet.{module}", [word]


@pytest.mark.parametrize(
    ("typed", "module", "words"), list(commands()), ids=lambda value: str(value)
)
def test_help_has_an_example(typed, module, words, monkeypatch, capsys, in_process):
    main = importlib.import_module(module).main
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
    main = importlib.import_module(module).main
    arguments = f"bigdet.cli.arguments.{module.rpartition('.')[2]}"
    told = importlib.import_module(arguments if importlib.util.find_spec(arguments) else module)
    lines = told.__doc__.replace("\\\n", " ").splitlines()
    examples = [
        re.split(rf"{re.escape(typed)} |  \(| >", f"{line} ")[1]
        for line in lines
        if re.search(rf"{re.escape(typed)}( |$)", line)
        and "..." not in line.split("  (")[0]
        and "[" not in line
    ]
    assert examples

    def stop_after(original):
        def parse(parser, words):
            options = original(parser, words)
            if set(vars(options)) == {"part"}:  # of cli/benchmark.py, which has a parser for each
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
