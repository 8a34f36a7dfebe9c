"""The training command on a tiny set: whole, killed, stopped, resumed, misused."""

import gzip
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from pycocotools import mask
from safetensors.torch import load_file

from bigdet import train
from bigdet.data.format.shard_set import ShardSet
from bigdet.evaluation.saved import SavedResults
from bigdet.reporting.table import read_outcome
from bigdet.run_dir import RunDir
from tests.commands.kill_often import kill_often
from tests.commands.runs import (
    Command,
    arguments,
    assert_same_run,
    numbers,
    rank_processes,
    weights,
)


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
    (listed,) = json.loads((whole / "pictures/finetune.json").read_text())
    assert listed["among"] == "worst"
    for name in (listed["found"], listed["truth"]):
        assert (whole / "pictures" / name).is_file()
    (events,) = (whole / "tensorboard").iterdir()
    for tag in (b"batch/pretrain", b"batch/finetune", b"detections/000000000001", b"bbox/AP"):
        assert tag in events.read_bytes()
    (start,) = json.loads((whole / "environment.json").read_text())
    assert start["ranks"] == 1
    assert torch.__version__.startswith(start["torch"])


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
def test_a_killed_run_continues_exactly(
    whole: Path, tmp_path: Path, shapes_shards: Path, phase: str, step: int
):
    command = Command(tmp_path / "run", shapes_shards)
    command.wait_for(phase, step)
    command.kill()
    code, printed = Command(tmp_path / "run", shapes_shards).finish()
    assert code == 0, printed
    assert "continuing from" in printed
    assert_same_run(tmp_path / "run", whole)
    for key in ("cost/compute_gpu_seconds", "cost/cpu_seconds"):
        seconds = [line[key] for line in command.lines() if "loss/total" in line]
        assert [0, *seconds] == sorted({0, *seconds})  # rises from line to line


def test_a_line_is_the_mean_over_its_images_also_of_a_run_killed_in_the_middle_of_it(
    whole: Path, tmp_path: Path, shapes_shards: Path
):
    command = Command(tmp_path / "run", shapes_shards, "log.every=3")  # saved after steps 2, 4, ...
    command.wait_for("pretrain", 3)
    command.kill()
    code, printed = Command(tmp_path / "run", shapes_shards, "log.every=3").finish()
    assert code == 0, printed
    steps, seen = {}, 0
    for line in numbers(whole):  # a line for each step
        if "loss/total" in line:
            steps[line["cost/steps"]] = (line["seen/images"] - seen, line)
            seen = line["seen/images"]
    assert len({images for images, _ in steps.values()}) == 2  # the last step of a pass is short
    lines = [line for line in numbers(tmp_path / "run") if "loss/total" in line]
    intervals = [range(1, 4), range(4, 7), range(7, 10), range(10, 11)]
    for line, interval in zip(lines, intervals, strict=True):
        own = [steps[number] for number in interval]
        assert line["cost/steps"] == interval[-1]
        for key in [key for key in line if key.startswith("loss/") or key == "grad_norm"]:
            mean = sum(images * one[key] for images, one in own) / sum(images for images, _ in own)
            assert line[key] == pytest.approx(mean, rel=1e-9), (interval, key)


def test_a_run_killed_at_random_moments_continues_exactly(
    whole: Path, tmp_path: Path, shapes_shards: Path
):
    counts = kill_often(whole, tmp_path / "run", shapes_shards, kills=3, seed=5, seconds=1.5)
    assert counts["kills"] == 3


def test_a_killed_run_of_two_ranks_continues_exactly(
    whole_on_two: Path, tmp_path: Path, shapes_shards: Path
):
    command = Command(tmp_path / "run", shapes_shards, ranks=2)
    command.wait_for("pretrain", 3)
    command.kill()
    code, printed = Command(tmp_path / "run", shapes_shards, ranks=2).finish()
    assert code == 0, printed
    assert_same_run(tmp_path / "run", whole_on_two)


@pytest.mark.parametrize(
    "engine", [["engine.zero_stage=3"], ["engine.kind=fsdp", "engine.zero_stage=null"]]
)
def test_a_run_continues_in_an_engine_that_shards_weights(
    whole_on_two: Path, tmp_path: Path, shapes_shards: Path, engine: list[str]
):
    checkpoint = whole_on_two / "checkpoints/finetune-2"
    output = tmp_path / "run"
    command = Command(output, shapes_shards, f"resume={checkpoint}", *engine, ranks=2)
    code, printed = command.finish()
    assert code == 0, printed
    expected = {(line["phase"], line["step"]): line for line in numbers(whole_on_two)[:-1]}
    first = numbers(output)[0]
    assert (first["phase"], first["step"]) == ("finetune", 3)
    for key, value in expected["finetune", 3].items():
        if key.startswith("loss/"):
            assert first[key] == pytest.approx(value, rel=1e-4), key
    own, other = weights(output), weights(whole_on_two)
    assert own.keys() == other.keys()
    # Two steps at rates of 5e-4 and 5e-5; AdamW moves a weight by up to that.
    assert all(torch.allclose(own[name], other[name], rtol=0, atol=1e-3) for name in own)
    assert (output / "evaluation/finetune-4.json").exists()
    assert len(list((output / "pictures").glob("*.jpg"))) == 1


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
    assert (output / "stopped").read_text().startswith("pretrain step ")
    code, printed = Command(output, shapes_shards, "checkpoint.every=100").finish()
    assert code == 0, printed
    assert not (output / "stopped").exists()
    assert_same_run(output, whole)


def test_sigterm_to_one_of_two_ranks_stops_both(tmp_path: Path, shapes_shards: Path):
    output = tmp_path / "run"
    command = Command(output, shapes_shards, "phases.pretrain.steps=500", ranks=2)
    command.wait_for("pretrain", 2)
    os.kill(rank_processes(output)[1], signal.SIGTERM)
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
        (
            ["output=OTHER", "phases.finetune.start_from.source=nowhere"],
            ["phases.finetune.start_from: nowhere: does not exist"],
        ),
        (
            ["output=OTHER", "model.width=64", "phases.finetune.start_from.source=CHECKPOINT"],
            ["phases.finetune.start_from: ", "does not fit the model", "of another shape"],
        ),
        (
            ["output=OTHER", "phases.finetune.start_from.source=timm"],
            ["phases.finetune.start_from: timm has no", "resnet10", "resnet50"],
        ),
        (["output=OTHER", "data.train.shards=nowhere"], ["nowhere", "no such folder"]),
        (["phases.pretrian.steps=1"], ["phases.pretrian", "did you mean 'pretrain'"]),
    ],
)
def test_mistakes_are_reported_and_lose_nothing(
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


def test_an_evaluation_that_an_ended_run_left_behind_is_scored_by_the_same_command(
    whole: Path, tmp_path: Path, shapes_shards: Path, in_process: None
):
    # What earlier versions could leave: final weights, but no numbers of the last evaluation.
    run_dir = RunDir(tmp_path / "run")
    shutil.copytree(whole, run_dir.root)
    lines = run_dir.metrics.read_text().splitlines(keepends=True)
    run_dir.metrics.write_text("".join(lines[:-1]))
    run_dir.evaluation("finetune", 4).unlink()
    run_dir.best.write_text("pretrain-6\n")
    val_set, found = ShardSet(shapes_shards / "val"), SavedResults()
    for row, image_id in enumerate(val_set.index["image_id"].tolist()):  # all objects, exactly
        record, results = val_set.read(row).record, []
        for one in record["annotations"]:
            shape = one["segmentation"]  # polygons, or run lengths
            if isinstance(shape, list):
                shape = mask.merge(mask.frPyObjects(shape, record["height"], record["width"]))
                shape["counts"] = shape["counts"].decode()
            result = {"image_id": image_id, "bbox": one["bbox"], "score": 0.5,
                      "category_id": val_set.categories[one["label"]].id,
                      "segmentation": shape}  # fmt: skip
            results.append(result)
        found.add(image_id, results)
    found.write(run_dir.detections("finetune", 4))
    assert not run_dir.is_finished
    assert read_outcome(run_dir).is_finished is False
    assert train.main(arguments(run_dir.root, shapes_shards)) == 0
    last = json.loads(run_dir.metrics.read_text().splitlines()[-1])
    assert (last["phase"], last["step"], last["bbox/AP"]) == ("finetune", 4, 1.0)
    assert last["seen/images"] == json.loads(lines[-1])["seen/images"]
    assert len(run_dir.metrics.read_text().splitlines()) == len(lines)
    assert json.loads(run_dir.evaluation("finetune", 4).read_text())["bbox"]["AP"] == 1.0
    assert run_dir.best.read_text() == "finetune-4\n"
    assert run_dir.is_finished
    assert read_outcome(run_dir).ap["bbox/AP"] == 1.0
    assert run_dir.weights.read_bytes() == (whole / "model.safetensors").read_bytes()


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


def assert_trace_of(file: Path, steps: list[str]) -> None:
    """Check that a trace has these steps, and in each of them operators of both passes."""
    with gzip.open(file, "rt") as text:
        events = [event for event in json.load(text)["traceEvents"] if "dur" in event]
    spans = {
        event["name"]: (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and " step " in event["name"]
    }
    assert sorted(spans) == steps
    for begin, end in spans.values():
        names = {event["name"] for event in events if begin <= event["ts"] < end}
        assert {"aten::convolution", "aten::convolution_backward", "aten::max_pool2d"} <= names


def test_a_stop_in_an_evaluation_leaves_it_to_the_next_start(
    whole: Path, tmp_path: Path, shapes_shards: Path, in_process: None,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    output = tmp_path / "run"
    # Only evaluations ask for it with a message of their own.
    monkeypatch.setattr("bigdet.training.loop.stop_requested", lambda file: True)
    assert train.main(arguments(output, shapes_shards, "log.profile.steps=[2,3]")) == 75
    assert_trace_of(
        output / "profile/pretrain-rank-0.json.gz", ["pretrain step 2", "pretrain step 3"]
    )
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


def test_another_batch_continues_under_the_linear_rule(tmp_path: Path, shapes_shards: Path):
    output = tmp_path / "run"
    more = ["phases.pretrain.warmup_steps=0", "phases.pretrain.reference_images_per_step=8",
            "phases.finetune.reference_images_per_step=4"]  # fmt: skip
    run = Command(output, shapes_shards, *more)
    run.wait_for("pretrain", 3)
    run.kill()
    smaller = ["phases.pretrain.images_per_step=4", "phases.pretrain.steps=8"]
    code, printed = Command(output, shapes_shards, *more, *smaller).finish()
    assert code == 1
    assert "phases.pretrain.images_per_step (was 8, now 4)" in printed
    code, printed = Command(output, shapes_shards, *more, *smaller, "change_batch=true").finish()
    assert code == 0, printed
    assert "4 images per step instead of 8" in printed
    assert "lr 0.001 at 8 images per step -> 0.0005 at 4\n" in printed
    assert "lr 0.0005 at 4 images per step -> 0.001 at 8\n" in printed  # of the other phase
    lines = [line for line in numbers(output) if "loss/total" in line]
    steps = [line["step"] for line in lines if line["phase"] == "pretrain"]
    assert steps == [*range(1, 9)]
    rates = [line["lr"] for line in lines if line["phase"] == "pretrain"]
    assert rates[0] == pytest.approx(0.001)
    assert rates[-1] == pytest.approx(0.0005)
