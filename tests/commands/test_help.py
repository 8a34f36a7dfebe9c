"""Every command and tool explains itself and its options, with examples that can be typed."""

import argparse
import importlib
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
    for source in ("coco", "objects365", "voc", "shapes", "merge"):
        yield f"python tools/make_shards.py {source}", "make_shards", [source]
    for part in ("stream", "step", "predict", "evaluate", "resume"):
        yield f"python tools/benchmark.py {part}", "benchmark", [part]
    for direction in ("to-torchvision", "from-torchvision"):
        yield f"python tools/convert_weights.py {direction}", "convert_weights", [direction]


@pytest.mark.parametrize(
    ("typed", "module", "words"), list(commands()), ids=lambda value: str(value)
)
def test_help_has_an_example(typed, module, words, monkeypatch, capsys, in_process):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    before = set(sys.modules)
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
    for name in set(sys.modules) - before:  # tools are no package: their short names go again
        if getattr(sys.modules[name], "__file__", None) == str(ROOT / "tools" / f"{name}.py"):
            del sys.modules[name]
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"{typed} " in " ".join(text.split()), text
