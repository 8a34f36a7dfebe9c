"""The documents of the project, taken apart for tests."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bigdet.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
OTHERS = {".", "git", "mypy", "pip", "python3", "ruff", "tensorboard", "touch"}
"""Programs that are not bigdet's."""
STARTS = ("bigdet", "python", "deepspeed", "torchrun", "mpirun", "bash", "sbatch")


@dataclass(frozen=True)
class Document:
    """One file of Markdown."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def fenced(self) -> list[tuple[str, str]]:
        """Language and text of the blocks between fences."""
        return re.findall(r"^```(\w+)\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)

    @cached_property
    def prose(self) -> str:
        """All but these."""
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)

    @cached_property
    def spans(self) -> list[str]:
        """What is between backticks."""
        spans = re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", self.prose, flags=re.MULTILINE))
        return [" ".join(span.split()) for span in spans]

    @cached_property
    def anchors(self) -> set[str]:
        """Names of its headings in links."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}

    @cached_property
    def commands(self) -> list[str]:
        """What a user may type: lines of indented blocks, and spans that are more than a name."""
        typed = [
            text.replace("\\\n", " ")
            for text in re.findall(r"^    ((?:.*\\\n)*.*)$", self.prose, re.MULTILINE)
            if text.split()[0] in {*STARTS, *OTHERS}
        ]
        for span in self.spans:
            words = span.split()
            is_name = len(words) == 2 and words[0] == "bigdet" and words[1] in COMMANDS
            if words[0] in STARTS and len(words) > 1 and not is_name and words[-1] != "-m":
                typed.append(span)
        return typed

    def table(self, first: str) -> list[list[str]]:
        """Return the cells of the rows of the table whose first column has this title."""
        lines = iter(self.text.splitlines())
        next(line for line in lines if line.startswith(f"| {first} |"))
        next(lines)
        rows = []
        for line in lines:
            if not line.startswith("|"):
                break
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        return rows


DOCUMENTS = [
    Document(path)
    for folder, pattern in [
        (".", "*.md"),
        ("bigdet", "*.md"),
        ("configs", "*.md"),
        ("tools", "*.md"),
        (".github", "**/*.md"),
    ]
    for path in sorted((ROOT / folder).glob(pattern))
]
