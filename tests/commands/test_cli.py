"""The ``bigdet`` command and ``tools/``; what prints help or makes shards does without torch."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import bigdet
from bigdet.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "torchvision", "deepspeed", "timm", "webdataset"}


def run(*words: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``python ...``, which writes every import of every process to stderr."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def heavy_imports(ended: subprocess.CompletedProcess[str]) -> set[str]:
    """Which of the packages that take seconds were imported."""
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", ended.stderr, re.MULTILINE))
    assert "bigdet" in imported
    return imported & HEAVY


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_no_torch(name):
    ended = run("-m", "bigdet", name, "--help")
    assert ended.returncode == 0
    assert ended.stdout.startswith(f"usage: bigdet {name} ")
    assert heavy_imports(ended) == set()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["-m", "bigdet"], 0),
        (["-m", "bigdet.train", "--options", "log"], 0),
        (["-m", "bigdet.train", "--help"], 0),
        (["-m", "bigdet.train"], 1),
        (["-m", "bigdet", "configs"], 0),
        (["-m", "bigdet", "benchmark", "step", "--help"], 0),
        (["-m", "bigdet", "convert-weights", "from-detectron2", "--help"], 0),
        (["tools/make_shards.py", "--help"], 0),
        (["tools/make_shards.py", "coco", "--help"], 0),
        (["tools/make_shards.py", "coco", "--images", "nowhere", "--annotations", "x", "--out",
          "nowhere"], 1),
    ],
)  # fmt: skip
def test_other_words_that_import_no_torch(words, code):
    ended = run(*words)
    assert ended.returncode == code
    assert heavy_imports(ended) == set()


def test_making_checking_and_indexing_shards_and_scoring_a_file_import_no_torch(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    for number, suffix in ((1, "jpg"), (2, "png")):
        Image.new("RGB", (40, 30), (90 * number, 0, 0)).save(images / f"{number}.{suffix}")
    content = {
        "images": [
            {"id": 1, "file_name": "1.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "2.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 2,
                "category_id": 7,
                "bbox": [4, 5, 10, 8],
                "area": 80,
                "iscrowd": 0,
                "segmentation": [[4, 5, 14, 5, 14, 13, 4, 13]],
            }
        ],
        "categories": [{"id": 7, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    words = ("--images", images, "--annotations", tmp_path / "a.json", "--out", tmp_path / "set")
    made = run("tools/make_shards.py", "coco", *words)
    checked = run("tools/check_shards.py", tmp_path / "set")
    for name in ("manifest.json", "index.npy"):
        (tmp_path / "set" / name).unlink()
    indexed = run("tools/index_shards.py", tmp_path / "set", "--categories", tmp_path / "a.json")
    shapes = run("tools/make_shards.py", "shapes", "--images", "3", "--out", tmp_path / "shapes")
    result = {"image_id": 2, "category_id": 7, "bbox": [4, 5, 10, 8], "score": 0.5}
    (tmp_path / "results.json").write_text(json.dumps([result]))
    words = ("evaluate", tmp_path / "results.json", "--shards", tmp_path / "set")
    scored = run("-m", "bigdet", *words)
    assert scored.stdout.splitlines()[1].split()[:2] == ["box", "1.000"]
    for started in (made, checked, indexed, shapes, scored):
        assert started.returncode == 0, started.stderr[-1000:]
        assert heavy_imports(started) == set()


def test_smaller_images_alone_need_torch(tmp_path: Path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images/1.jpg")
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 40, "height": 30}],
        "annotations": [],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    made = run(
        *("tools/make_shards.py", "coco", "--images", tmp_path / "images"),
        *("--annotations", tmp_path / "a.json", "--out", tmp_path / "set", "--long-side", "20"),
    )
    assert made.returncode == 0, made.stderr[-1000:]
    assert heavy_imports(made) == {"torch"}


def test_a_misspelled_command_is_reported_with_the_nearest():
    ended = run("-m", "bigdet", "check_shard")
    assert ended.returncode == 1
    assert "bigdet has no command 'check_shard'. Did you mean 'check-shards'?" in ended.stderr


def test_the_version_has_one_source():
    assert run("-m", "bigdet", "--version").stdout == f"bigdet {bigdet.__version__}\n"
    assert importlib.metadata.version("bigdet") == bigdet.__version__


def test_every_file_in_tools_is_a_command():
    for file in (ROOT / "tools").glob("*.py"):
        (name,) = re.findall(r'    run\("([\w-]+)", sys.argv\[1:\]\)', file.read_text())
        assert COMMANDS[name][0] == f"cli.{file.stem}"


def test_no_message_names_files_that_an_installed_package_lacks():
    for file in (ROOT / "bigdet").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.search(r"\b(tools|launch|tests)/\w+\.\w+", node.value)
                assert id(node) in alone or not found, f"{file}: {found}"


def test_a_command_runs_from_any_folder_with_a_shipped_config(tmp_path: Path):
    ended = run("-m", "bigdet", "train", "quickstart", folder=tmp_path)
    assert ended.returncode == 1
    message = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert message == [
        "error: data/shapes/train: expected a shard set, but there is no such folder. Give the "
        "folder that `bigdet shards` wrote, or run it again if it did not finish."
    ]


def test_a_reader_that_ends_early_is_no_error():
    command = f"{sys.executable} -m bigdet configs | head -n 1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.startswith("In ")
    assert ended.stderr == ""
    assert ended.returncode in (0, 141)  # all was written before, or not
