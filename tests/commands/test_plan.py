import re
import subprocess
import sys
from pathlib import Path

import pytest

from bigdet.plan import parse_arguments
from tests.commands.runs import ROOT, arguments


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bigdet.plan", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_plan_writes_the_options_of_what_fits(tmp_path: Path, shapes_shards: Path):
    words = arguments(tmp_path / "none", shapes_shards, "data.workers=0")
    done = plan(
        *words, "--memory-gib", "64", "--sizes", "64", "--batches", "2,4", "--check", "64x4"
    )
    assert done.returncode == 0, done.stderr
    # 4 lanes of 2 become 4 of 4, at twice the rate.
    assert done.stdout.splitlines() == [
        "phases.pretrain.resize.size=64 phases.pretrain.images_per_gpu=4 "
        "phases.pretrain.images_per_step=16 phases.pretrain.reference_images_per_step=8"
    ]
    assert re.search(r" 64 +4 +\(\d+\) +\d+\.\d+ .* measured", done.stderr)
    assert re.search(r"check 64x4: memory predicted \d\.\d+ GiB, measured \d\.\d+", done.stderr)
    assert not (tmp_path / "none").exists()


def test_a_trial_that_runs_out_of_memory_is_an_answer(tmp_path: Path, shapes_shards: Path):
    words = arguments(tmp_path / "none", shapes_shards, "data.workers=0")
    done = plan(*words, "--memory-gib", "0.1", "--sizes", "2560", "--batches", "4")
    assert done.returncode == 1
    assert "2560x4: out of memory" in done.stderr
    assert "not even size 2560 with 4 images per GPU fits into 0.1 GiB" in done.stderr
    assert done.stdout == ""


def test_options_that_would_say_nothing_are_refused():
    for words, message in [
        (["--sizes", "64"], "--sizes: only for a plan with --memory-gib"),
        (["--memory-gib", "8", "--link", "a,b"], "--link: only for a plan without --memory-gib"),
        (["--memory-gib", "0"], "--memory-gib: found 0.0"),
        (["--step-seconds", "-1"], "--step-seconds: found -1.0, expected a number above 0"),
        (["--gpu-memory-gib", "nan"], "--gpu-memory-gib: found nan"),
        (["--latency", "-3"], "--latency: found -3.0, expected seconds, 0 or more"),
        (["--memory-gib", "8", "--trials", "2"], "--trials: found 2, expected 3 or more"),
        (["--objects", "9"], "--objects: only for a plan with --device"),
        (["--device", "h200", "--memory-gib", "8"], "--memory-gib: only for a plan without --dev"),
        (["--device", "h200", "--measure"], "--measure: only for a plan without --device"),
        (["--device", "h200", "--disk", "0"], "--disk: found 0.0, expected a number above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_arguments(["config.yaml", *words])


def test_data_that_is_not_there_is_reported_before_anything_is_measured(tmp_path: Path):
    words = arguments(tmp_path / "none", tmp_path / "nowhere")
    done = plan(*words, "--gpus", "8x4")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "nowhere/train: expected a shard set, but there is no such folder" in line


def test_what_goes_wrong_in_a_measurement_is_reported_once(tmp_path: Path, shapes_shards: Path):
    words = arguments(tmp_path / "none", shapes_shards, "data.train.subset.images=17")
    done = plan(*words, "--memory-gib", "8")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "measuring settings" not in line]
    assert len(errors) == 1, done.stderr
    assert "could not be measured: data.train.subset.images: found 17, but" in errors[0]


def test_plan_measures_and_recommends(tmp_path: Path, shapes_shards: Path):
    words = arguments(tmp_path / "none", shapes_shards)
    done = plan(*words, "--gpus", "8x4", "--link", "pcie4,100gb")
    assert done.returncode == 0, done.stderr
    took = re.search(r"micro-batch of 2 images takes (\d+\.\d+) s", done.stderr)
    assert took is not None, done.stderr
    assert 0 < float(took[1]) < 60
    assert "32 GPUs, 64 images per step (1 micro-batches of 2 on each):" in done.stderr
    for kind in ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"):
        assert re.search(rf"  {kind} +\d+\.\d+ ", done.stderr), kind
    assert re.search(r"use engine\.kind=(deepspeed engine\.zero_stage=\d|fsdp)", done.stderr)
    assert re.search(r"  4096 \S+ +\d", done.stderr)
    assert not (tmp_path / "none").exists()


def test_plan_for_gpus_that_are_not_there_needs_no_data(tmp_path: Path):
    words = arguments(tmp_path / "none", tmp_path / "nowhere", "engine.zero_stage=3")
    done = plan(*words, "--device", "h200,rtx4090", "--gpus", "8,64", "--classes", "3")
    assert done.returncode == 0, done.stderr
    for row in (
        "weights and running statistics",
        "= allocated at most",
        "CUDA context",
        "= needed",
    ):
        assert re.search(rf"  {row} +\d+\.\d\d GiB", done.stderr), row
    assert re.search(r"  RTX 4090 +23\.5  fits +\d+ at most", done.stderr)
    assert "estimate of the GPU's time, not measured" in done.stderr
    assert re.search(r"  64 +0\.02 +0\.00 ", done.stderr)  # of 5 M weights; a share of them
    assert not (tmp_path / "none").exists()
