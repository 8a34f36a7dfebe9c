"""SIGKILL at random moments of a run that saves every second step; it must end as if never killed.

    python tests/commands/kill_often.py --kills 30
    python tests/commands/kill_often.py --in-saves 4 --every 2

The second one kills four ranks in every second disk call of a save: rank 0 alone, the last rank
alone, and all of them.

Prints one JSON object; exit code 1 when a run ends otherwise than the uninterrupted one. Moments
are drawn from --seed: most after the first step since a start (steps, saves, evaluations), some in
the start itself. A run that is done before the last kill is compared and begun anew.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from bigdet.data.making.sources.shapes import make_shapes
from tests.commands.runs import Command, assert_same_run, torchrun

FSDP = [
    "engine.kind=fsdp",
    "engine.zero_stage=null",
    "phases.pretrain.images_per_gpu=1",
    "phases.finetune.images_per_gpu=1",
    "evaluation.pictures=0",
]
START_PART = 0.2
"""Part of the kills that come before the first step since a start."""


def kill_often(
    whole: Path, output: Path, shards: Path, kills: int, seed: int, seconds: float
) -> dict[str, int]:
    """Kill runs, let the last one finish, and compare each that is done.

    Args:
        whole: an uninterrupted run.
        output: folder of the killed runs.
        shards: of all of them.
        kills: how many.
        seed: of the moments.
        seconds: a kill comes at most so long after a start's first step.
    """
    random_moments = random.Random(seed)
    counts = {"kills": 0, "in the start": 0, "runs finished": 0}
    while counts["kills"] < kills:
        moment = random_moments.uniform(0, seconds)
        in_start = random_moments.random() < START_PART
        run = Command(output, shards)
        known = len(run.lines())
        while not in_start and run.process.poll() is None and len(run.lines()) <= known:
            time.sleep(0.05)
        time.sleep(moment)
        if run.process.poll() is None:
            run.kill()
            counts["kills"] += 1
            counts["in the start"] += in_start
        else:
            _check_finished(run, output, whole)
            counts["runs finished"] += 1
            shutil.rmtree(output)
    _check_finished(Command(output, shards), output, whole)
    counts["runs finished"] += 1
    return counts


def kill_in_saves(
    whole: Path, output: Path, shards: Path, ranks: int, every: int
) -> dict[str, int]:
    """Kill runs of several ranks in each stage of a save, and compare each that is done.

    Args:
        whole: an uninterrupted run of as many ranks.
        output: folder of the killed runs.
        shards: of all of them.
        ranks: how many.
        every: so many disk calls of a save lie between two kills.
    """
    counts = {"runs finished": 0}
    for rank, is_all in ((0, False), (ranks - 1, False), (0, True)):
        victim = "all ranks" if is_all else f"rank {rank}"
        call, is_anew = 1, not output.exists()
        while True:
            variables = {
                "DYING_RANK": str(rank), "DYING_CALL": str(call), "DYING_ALL": str(int(is_all)),
            }  # fmt: skip
            launcher = torchrun(ranks)
            launcher[-1] = "tests.commands.dying"
            run = Command(output, shards, *FSDP, launcher=launcher, variables=variables)
            run.process.communicate(timeout=600)
            if not (output / "model.safetensors").exists():
                counts[victim] = counts.get(victim, 0) + 1
                call, is_anew = call + every, False
                continue
            assert_same_run(output, whole)
            counts["runs finished"] += 1
            shutil.rmtree(output)
            if is_anew:  # a save has fewer calls
                break
            is_anew = True
    return counts


def _check_finished(run: Command, output: Path, whole: Path) -> None:
    code, printed = run.finish()
    # 1: it was killed when all was done but its own exit, and refuses to train a finished run.
    assert code == 0 or "finished run" in printed, printed
    assert_same_run(output, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--in-saves", type=int, default=0, metavar="RANKS")
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shapes(folder / "train", split="train", images=16)
        make_shapes(folder / "val", split="val", images=8)
        ranks, more = options.in_saves, FSDP if options.in_saves else []
        launcher = torchrun(ranks) if ranks else None
        code, printed = Command(folder / "whole", folder, *more, launcher=launcher).finish()
        assert code == 0, printed
        places = folder / "whole", folder / "run", folder
        if ranks:
            counts = kill_in_saves(*places, ranks, options.every)
        else:
            counts = kill_often(*places, options.kills, options.seed, options.seconds)
    print(json.dumps({**counts, "equal to the uninterrupted run": True}))


if __name__ == "__main__":
    main()
