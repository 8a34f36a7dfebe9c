"""Imports point down: a module may import lower levels and its own package, nothing else."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVELS = {
    "host": -1,
    "structures": 0, "run_dir": 0, "distributed": 0, "messages": 0,
    "ops": 1, "logs": 1, "pieces": 1,
    "config": 2, "pictures": 2,
    "data": 3, "models": 3, "engine": 3,
    "evaluation": 4, "weights": 4,
    "training": 5, "reporting": 5, "export": 5,
    "doctor": 6, "planning": 6, "benchmarks": 6,
    "cli": 7,
    "train": 8, "evaluate": 8, "predict": 8, "sweep": 8, "report": 8, "plan": 8,
    "__main__": 9,
}  # fmt: skip


def bigdet_imports(path: Path) -> set[str]:
    """Names of the parts of bigdet that a file imports."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module == "bigdet":
                modules = [f"bigdet.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        else:
            continue
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        parts |= {name.split(".")[1] for name in modules if name.startswith("bigdet.")}
        assert not {"tools", "tests"} & {name.split(".")[0] for name in modules}
    return parts


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "bigdet").rglob("*.py")) if path.name != "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_point_down(path: Path):
    own = path.relative_to(ROOT / "bigdet").with_suffix("").parts[0]
    for part in bigdet_imports(path) - {own}:
        assert LEVELS[part] < LEVELS[own], f"{own} imports {part}"


def test_rooms_of_data_import_in_one_direction():
    may_import = {
        "format": "",
        "ordering": "format",
        "examples": "format ordering",
        "streams": "format ordering examples",
        "making": "format examples",
    }
    for room, others in may_import.items():
        for path in (ROOT / "bigdet" / "data" / room).rglob("*.py"):
            found = set(re.findall(r"^from bigdet\.data\.(\w+)", path.read_text(), re.MULTILINE))
            assert found <= {room, *others.split()}, path


def test_config_is_free_of_torch():
    for path in (ROOT / "bigdet" / "config").glob("*.py"):
        assert "import torch" not in path.read_text(), path


def test_packages_hold_no_code():
    for path in (ROOT / "bigdet").rglob("__init__.py"):
        lines = 2 if path.parent == ROOT / "bigdet" else 1  # the version
        assert len(ast.parse(path.read_text()).body) == lines, f"{path}: more than a docstring"
