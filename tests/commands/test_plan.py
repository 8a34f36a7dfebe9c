import re
import subprocess
import sys
from pathlib import Path

from tests.commands.runs import ROOT, arguments


def test_plan_measures_and_recommends(tmp_path: Path, shapes_shards: Path):
    done = subprocess.run(
        [sys.executable, "-m", "bigdet.plan", *arguments(tmp_path / "none", shapes_shards),
         "--gpus", "8x4", "--link", "pcie4,100gb"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    took = re.search(r"micro-batch of 2 images takes (\d+\.\d+) s", done.stderr)
    assert took is not None, done.stderr
    assert 0 < float(took[1]) < 60
    assert "32 GPUs, 64 images per step (1 micro-batches of 2 on each):" in done.stderr
    for kind in ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"):
        assert re.search(rf"  {kind} +\d+\.\d+ ", done.stderr), kind
    assert re.search(r"take engine\.kind=(deepspeed engine\.zero_stage=\d|fsdp)", done.stderr)
    assert re.search(r"  4096 \S+ +\d", done.stderr)
    assert not (tmp_path / "none").exists()
