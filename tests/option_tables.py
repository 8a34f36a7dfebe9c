"""Writes the tables of all options in ``configs/README.md`` from the schema.

python -m tests.option_tables
"""

from itertools import groupby
from pathlib import Path

from bigdet.config.describe import Option, list_options

FILE = Path(__file__).parents[1] / "configs" / "README.md"
BEGIN, END = "<!-- options -->\n", "<!-- end of options -->\n"
TITLES = {
    "run": "the run",
    "data": "data",
    "model": "model",
    "engine": "engine",
    "device": "device",
    "phases": "phases",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "log": "log",
}
"""The subjects, by the first word of a key."""


def option_tables() -> str:
    """Return one table per subject, a row per option."""
    options = [option for option in list_options() if option.kind or option.default]
    options.sort(key=lambda option: list(TITLES).index(_subject(option)))  # stable
    return "\n".join(
        f"### Options: {TITLES[subject]}\n\n| option | type | default | what it is |\n"
        + "| --- | --- | --- | --- |\n"
        + "".join(map(_row, rows))
        for subject, rows in groupby(options, _subject)
    )


def with_tables(text: str) -> str:
    """Return the text of the file with its tables as the schema has them."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{option_tables()}\n{END}{rest.partition(END)[2]}"


def _subject(option: Option) -> str:
    return option.key.split(".")[0] if "." in option.key else "run"


def _row(option: Option) -> str:
    kind = option.kind.replace(" | ", ", ") or "a section"
    text = option.text.replace("``", "`").replace("|", r"\|")
    default = f"`{option.default}`" if option.default else "required"
    return f"| `{option.key}` | {kind} | {default} | {text} |\n"


if __name__ == "__main__":
    FILE.write_text(with_tables(FILE.read_text(encoding="utf-8")), encoding="utf-8")
