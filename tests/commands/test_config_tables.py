"""The tables of the documents say what configs, schema, tools and levels are."""

import re

import pytest

from bigdet.config.layers import read_yaml
from bigdet.config.load import load_config
from tests.commands.test_readme import DESIGN, NAMES
from tests.documents import ROOT
from tests.option_tables import with_tables
from tests.unit.test_layers import LEVELS

CONFIGS = NAMES["configs/README.md"]
EXPERIMENTS = {row[0].strip("`"): row for row in CONFIGS.table("config")}
SWEEPS = {row[0].strip("`"): row for row in CONFIGS.table("sweep")}


def test_every_config_and_sweep_is_listed():
    assert set(EXPERIMENTS) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    files = (ROOT / "configs" / "sweeps").glob("*.yaml")
    assert set(SWEEPS) == {f"sweeps/{path.stem}" for path in files}


def comment_of(name: str) -> str:
    """Return the comment at the top of a config, on one line."""
    lines = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    end = next(at for at, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


@pytest.mark.parametrize("row", [*EXPERIMENTS.values(), *SWEEPS.values()], ids=lambda row: row[0])
def test_numbers_and_gpus_are_those_of_the_comment(row: list[str]):
    comment = comment_of(row[0].strip("`"))
    expected, gpus = row[-3], row[-2]
    for number in re.findall(r"\d+\.\d+", expected):
        is_there = re.search(rf"(?<![\d.]){number}(?!\d)", comment)
        is_there = is_there or f"{float(number) / 100:.2f}" in comment
        assert is_there, f"{number} is not in: {comment}"
    sized = re.search(r"Sized for (\d+) GPUs", comment)
    assert gpus == (sized[1] if sized else "2 CPU cores")


@pytest.mark.parametrize("row", EXPERIMENTS.values(), ids=lambda row: row[0])
def test_lengths_are_those_of_the_phases(row: list[str]):
    phases = load_config(ROOT / "configs" / f"{row[0].strip('`')}.yaml").phases
    lengths = [
        f"{name} {phase.steps if phase.steps is not None else f'{phase.passes:g} passes'}"
        for name, phase in phases.items()
    ]
    assert row[-1] == ", ".join(lengths)


@pytest.mark.parametrize("row", SWEEPS.values(), ids=lambda row: row[0])
def test_the_number_of_runs_is_that_of_the_sweep(row: list[str]):
    sweep = read_yaml(ROOT / "configs" / f"{row[0].strip('`')}.yaml")
    assert int(row[-1]) == len(sweep["runs"]) * len(sweep.get("seeds", [0]))


def test_the_options_are_those_of_the_schema():
    written = CONFIGS.text
    assert with_tables(written) == written, "run: python -m tests.option_tables"


def test_every_tool_is_listed():
    rows = {row[0].strip("`") for row in NAMES["tools/README.md"].table("tool")}
    assert rows == {f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}


def test_the_levels_are_those_of_the_test_of_imports():
    rows = {int(row[0]): set(re.findall(r"`(\w+)`", row[1])) for row in DESIGN.table("level")}
    levels = {level: {n for n, own in LEVELS.items() if own == level} for level in LEVELS.values()}
    assert rows == levels
