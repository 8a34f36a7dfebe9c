import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_torchvision_of_another_torch_is_reported_in_one_sentence(tmp_path: Path):
    broken = tmp_path / "torchvision"
    broken.mkdir()
    text = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (broken / "__init__.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "bigdet.train", "configs/quickstart.yaml"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "operator torchvision::nms does not exist" in done.stderr
    assert "pip install" in done.stderr


def test_a_wrong_option_ends_with_1():
    done = subprocess.run(
        [sys.executable, "-m", "bigdet.train"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the following arguments are required: config" in done.stderr
