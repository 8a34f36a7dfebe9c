"""The training command on a tiny set: whole, killed, stopped, resumed, misused."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from bigdet import train
from bigdet.data.shards import ShardSet

ROOT = Path(__file__).parents[2]
TINY = [
    "model.width=32", "model.fc_width=32", "model.rpn.train_proposals=50",
    "model.rpn.test_proposals=20", "model.roi.rois_per_image=16",
    "phases.pretrain.steps=6", "phases.pretrain.warmup_steps=2", "phases.pretrain.resize.size=64",
    "phases.finetune.steps=4", "phases.finetune.warmup_steps=1", "phases.finetune.resize.size=64",
    "phases.finetune.resize.cap=64", "phases.finetune.freeze_stages=2",
    "phases.pretrain.images_per_gpu=2", "phases.pretrain.images_per_step=8",
    "phases.finetune.images_per_gpu=2", "phases.finetune.images_per_step=8",
    "checkpoint.every=2", "log.every=1", "evaluation.pictures=1",
]  # fmt: skip


def arguments(output: Path, shards: Path, *more: str) -> list[str]:
    """The words of a command line for a tiny run."""
    config = str(ROOT / "configs" / "quickstart.yaml")
    data = [f"data.train.shards={shards}/train", f"data.val.shards={shards}/val"]
    return [config, *TINY, *data, f"output={output}", *more]


class Command:
    """One run of the training command in processes of its own."""

    def __init__(self, output: Path, shards: Path, *more: str, ranks: int = 1):
        self.output = output
        launcher = [sys.executable, "-m", "bigdet.train"]
        if ranks > 1:
            deepspeed = str(Path(sys.executable).with_name("deepspeed"))
            port = 20000 + os.getpid() % 20000
            launcher = [deepspeed, "--num_gpus", str(ranks), "--master_port", str(port)]
            launcher += ["--module", "bigdet.train"]
        command = [*launcher, *arguments(output, shards, *more)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return exit code and output."""
        printed, _ = self.process.communicate(timeout=300)
        return self.process.returncode, printed

    def wait_for(self, phase: str, step: int) -> None:
        """Wait until the log has a step."""
        deadline = time.monotonic() + 200
        while (phase, step) not in [(line["phase"], line["step"]) for line in self.lines()]:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def lines(self) -> list[dict]:
        file = self.output / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def kill(self) -> None:
        """SIGKILL to every process of the run."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def numbers(output: Path) -> list[dict]:
    """The metrics that a repeated run must give again: all but time and memory."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    volatile = ("images_per_second", "memory_gib")
    return [
        {k: value for k, value in line.items() if not (k in volatile or k.endswith("_seconds"))}
        for line in lines
    ]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def assert_same_run(output: Path, expected: Path) -> None:
    assert numbers(output) == numbers(expected)
    own, other = weights(output), weights(expected)
    assert own.keys() == other.keys()
    different = [name for name in own if not torch.equal(own[name], other[name])]
    assert not different, different


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the command run in this process, and leaves no trace of it."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    loggers = logging.getLogger("bigdet").handlers[:]
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for handler in set(logging.getLogger("bigdet").handlers) - set(loggers):
        handler.close()
    logging.getLogger("bigdet").handlers[:] = loggers
    logging.getLogger("bigdet").propagate = True


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shapes_shards: Path) -> Path:
    """An uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("whole") / "run"
    code, printed = Command(output, shapes_shards).finish()
    assert code == 0, printed
    return output


@pytest.fixture(scope="module")
def whole_on_two(tmp_path_factory: pytest.TempPathFactory, shapes_shards: Path) -> Path:
    """An uninterrupted run of two ranks under the deepspeed launcher."""
    output = tmp_path_factory.mktemp("two") / "run"
    code, printed = Command(output, shapes_shards, ranks=2).finish()
    assert code == 0, printed
    return output


def test_a_run_leaves_what_is_promised(whole: Path, shapes_shards: Path):
    lines = numbers(whole)
    steps = [(line["phase"], line["step"]) for line in lines if "loss/total" in line]
    assert steps == [("pretrain", n) for n in range(1, 7)] + [("finetune", n) for n in range(1, 5)]
    last = lines[-2]
    names = {"rpn_objectness", "rpn_box", "box_class", "box_delta", "mask", "total"}
    assert {key.removeprefix("loss/") for key in last if key.startswith("loss/")} == names
    parts = sum(value for key, value in last.items() if key.startswith("loss/"))
    assert parts == pytest.approx(2 * last["loss/total"], rel=1e-5)
    # Images without objects are left out; the last step of a pass of two has masked slots.
    images = int((ShardSet(shapes_shards / "train").index["num_boxes"] > 0).sum())
    assert 8 < images < 16
    assert last["seen/images"] == 5 * images
    # finetune sees whole images of 64x64, pretrain at most so much
    assert 2 * images * 64 * 64 < last["seen/pixels"] < 5 * images * 64 * 64
    assert lines[-1].keys() >= {"phase", "step", "bbox/AP", "segm/AP50"}
    for name in ("config.yaml", "logs/rank-0.log", "evaluation/finetune-4.json", "tensorboard"):
        assert (whole / name).exists(), name
    assert {path.name for path in (whole / "checkpoints").iterdir() if path.is_dir()} == {
        "pretrain-6", "finetune-2", "finetune-4",
    }  # fmt: skip
    assert (whole / "checkpoints/latest").read_text().strip() == "finetune-4"
    assert len(list((whole / "pictures").glob("*.jpg"))) == 2


def test_frozen_stages_and_fixed_statistics_stay_as_pretraining_left_them(whole: Path):
    before = load_file(whole / "checkpoints/pretrain-6/model.safetensors")
    after = weights(whole)
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert {name for name in after if "running_" in name} <= same
    assert "backbone.conv1.weight" in same
    assert "backbone.layer1.0.conv1.weight" in same
    assert "backbone.layer2.0.conv1.weight" not in same
    assert not torch.equal(
        before["backbone.bn1.running_mean"], torch.zeros_like(before["backbone.bn1.running_mean"])
    )


def test_two_ranks_give_the_losses_of_one(whole: Path, whole_on_two: Path):
    # Only the order in which gradients are added differs, 1e-7 of a loss in fp32 (seen). After some
    # steps that flips a discrete choice, such as the last of the best proposals, and losses part.
    for one, two in zip(numbers(whole), numbers(whole_on_two), strict=True):
        assert one.keys() == two.keys()
        is_early = one["phase"] == "pretrain" and one["step"] <= 3
        for key, value in one.items():
            if key.startswith("loss/") and is_early:
                assert two[key] == pytest.approx(value, rel=1e-5), (one, key)
            elif key.startswith("seen/"):
                assert two[key] == value


@pytest.mark.parametrize(("phase", "step"), [("pretrain", 5), ("finetune", 1)])
def test_a_killed_run_goes_on_exactly(
    whole: Path, tmp_path: Path, shapes_shards: Path, phase: str, step: int
):
    command = Command(tmp_path / "run", shapes_shards)
    command.wait_for(phase, step)
    command.kill()
    code, printed = Command(tmp_path / "run", shapes_shards).finish()
    assert code == 0, printed
    assert "going on from" in printed
    assert_same_run(tmp_path / "run", whole)


def test_a_killed_run_of_two_ranks_goes_on_exactly(
    whole_on_two: Path, tmp_path: Path, shapes_shards: Path
):
    command = Command(tmp_path / "run", shapes_shards, ranks=2)
    command.wait_for("pretrain", 3)
    command.kill()
    code, printed = Command(tmp_path / "run", shapes_shards, ranks=2).finish()
    assert code == 0, printed
    assert_same_run(tmp_path / "run", whole_on_two)


@pytest.mark.parametrize("request_kind", ["SIGTERM", "SIGUSR1", "file"])
def test_a_stop_request_ends_with_75_and_a_checkpoint(
    whole: Path, tmp_path: Path, shapes_shards: Path, request_kind: str
):
    output = tmp_path / "run"
    command = Command(output, shapes_shards, "checkpoint.every=100")
    command.wait_for("pretrain", 2)
    if request_kind == "file":
        (output / "stop").touch()
    else:
        command.process.send_signal(getattr(signal, request_kind))
    code, printed = command.finish()
    assert code == 75, printed
    assert (output / "checkpoints/latest").is_file()
    code, printed = Command(output, shapes_shards, "checkpoint.every=100").finish()
    assert code == 0, printed
    assert_same_run(output, whole)


def rank_process(output: Path, rank: int) -> int:
    """Process id of a rank that the deepspeed launcher started (not of its loader processes)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        if f"--local_rank={rank}".encode() in words and f"output={output}".encode() in words:
            found.append(int(folder.name))
    return min(found)  # the loader processes were forked from it


def test_sigterm_to_one_of_two_ranks_stops_both(tmp_path: Path, shapes_shards: Path):
    output = tmp_path / "run"
    command = Command(output, shapes_shards, "phases.pretrain.steps=500", ranks=2)
    command.wait_for("pretrain", 2)
    os.kill(rank_process(output, 1), signal.SIGTERM)
    code, printed = command.finish()
    assert code == 75, printed
    last = command.lines()[-1]["step"]
    assert (output / "checkpoints/latest").read_text().strip() == f"pretrain-{last}"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["output=OTHER", "resume=nowhere"], ["resume", "nowhere", "not a checkpoint"]),
        (["output=OTHER", "resume=CHECKPOINT", "seed=3"], ["seed (was 0, now 3)", "data.workers"]),
        (["output=OTHER", "resume=CHECKPOINT", "model.width=64"], ["model.width (was 32, now 64)"]),
        (
            ["output=OTHER", "phases.pretrain.images_per_step=32"],
            ["phase pretrain", "one step needs 32", "images_per_step"],
        ),
        (
            ["output=OTHER", "phases.finetune.images_per_step=32"],
            ["phase finetune", "one step needs 32"],
        ),
        (["output=OTHER", "phases.finetune.start_from.source=nowhere"], ["nowhere", "not exist"]),
        (
            ["output=OTHER", "phases.finetune.start_from.source=timm"],
            ["start_from.source", "resnet10", "resnet50"],
        ),
        (["output=OTHER", "data.train.shards=nowhere"], ["nowhere", "no such folder"]),
        (["phases.pretrian.steps=1"], ["phases.pretrian", "did you mean 'pretrain'"]),
    ],
)
def test_mistakes_are_told_and_lose_nothing(
    whole: Path, tmp_path: Path, shapes_shards: Path, in_process: None,
    more: list[str], words: list[str],
):  # fmt: skip
    before = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    checkpoint = whole / "checkpoints/finetune-2"
    more = [
        word.replace("OTHER", str(tmp_path / "o")).replace("CHECKPOINT", str(checkpoint))
        for word in more
    ]
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        train.main(arguments(whole, shapes_shards, *more))
    for word in words:
        assert word in str(caught.value)
    assert sorted(path.relative_to(whole) for path in whole.rglob("*")) == before


def test_a_finished_run_is_refused_without_its_checkpoints_too(
    whole: Path, tmp_path: Path, shapes_shards: Path, in_process: None
):
    (tmp_path / "run").mkdir()
    shutil.copy(whole / "model.safetensors", tmp_path / "run")
    with pytest.raises(ValueError, match="finished run"):
        train.main(arguments(tmp_path / "run", shapes_shards))


def test_a_checkpoint_of_another_run_begins_a_new_folder(
    whole: Path, tmp_path: Path, shapes_shards: Path
):
    checkpoint = whole / "checkpoints/finetune-2"
    code, printed = Command(tmp_path / "new", shapes_shards, f"resume={checkpoint}").finish()
    assert code == 0, printed
    own, expected = weights(tmp_path / "new"), weights(whole)
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    steps = [(line["phase"], line["step"]) for line in numbers(tmp_path / "new")]
    assert steps == [("finetune", 3), ("finetune", 4), ("finetune", 4)]


def test_a_stop_in_an_evaluation_leaves_it_to_the_next_start(
    whole: Path, tmp_path: Path, shapes_shards: Path, in_process: None,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    output = tmp_path / "run"
    answers = iter([False] * 6 + [True])  # after each step of pretrain, then in its evaluation
    monkeypatch.setattr("bigdet.training.loop.stop_requested", lambda file: next(answers))
    assert train.main(arguments(output, shapes_shards)) == 75
    assert not (output / "evaluation").exists()
    assert (output / "checkpoints/latest").read_text().strip() == "pretrain-6"
    monkeypatch.undo()
    code, printed = Command(output, shapes_shards).finish()
    assert code == 0, printed
    assert_same_run(output, whole)


def test_a_mistake_is_one_message_without_traceback(whole: Path, shapes_shards: Path):
    code, printed = Command(whole, shapes_shards).finish()
    assert code == 1
    assert "Traceback" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("error: ")]) == 1
    assert "finished run" in printed


def test_a_damaged_validation_image_is_an_error_that_names_it(tmp_path: Path, shapes_shards: Path):
    shards = tmp_path / "shards"
    shutil.copytree(shapes_shards, shards)
    tar = shards / "val" / "000000.tar"
    content = bytearray(tar.read_bytes())
    place = content.index(b"\xff\xd8\xff")  # the first JPEG
    content[place + 200 : place + 300] = bytes(100)
    tar.write_bytes(content)
    code, printed = Command(tmp_path / "run", shards, "phases.pretrain.steps=3").finish()
    assert code == 1
    assert "Traceback" not in printed
    (message,) = [line for line in printed.splitlines() if "error:" in line]
    assert str(tar) in message
    assert "CRC" in message
    assert "sample 0000" in message
