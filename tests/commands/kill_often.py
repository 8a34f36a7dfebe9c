"""SIGKILL at random moments of a run that saves every second step; it must end as if never killed.

    python tests/commands/kill_often.py --kills 30

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
from tests.commands.runs import Command, assert_same_run

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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shapes(folder / "train", split="train", images=16)
        make_shapes(folder / "val", split="val", images=8)
        code, printed = Command(folder / "whole", folder).finish()
        assert code == 0, printed
        counts = kill_often(
            folder / "whole", folder / "run", folder, options.kills, options.seed, options.seconds
        )
    print(json.dumps({**counts, "equal to the uninterrupted run": True}))


if __name__ == "__main__":
    main()
