"""Engines x precisions x optimizers x ranks x normalizations against plain PyTorch.

The test suite runs a selection in which every pair of two settings occurs; all of them:

    python -m tests.ranks.engine_matrix
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from bigdet.models.norms import Mode
from tests.ranks import toy
from tests.spawn import run_ranks

NORMS = ("gn", "fixed", "live", *(["sync"] if "sync" in get_args(Mode) else []))
AXES = (tuple(toy.ENGINES), ("fp32", "bf16"), tuple(toy.OPTIMIZERS), (1, 2), NORMS)
Cell = tuple[str, str, str, int, str]
# A sum in another order moves a weight by 1e-7 of its size, and now and then a bf16 cast of it to
# the next of its 8 bits: 0.4% of one element. AdamW steps by the sign of tiny gradients, so that
# one of them moves its weight by up to a tenth of the rate, 0.01, and with it the loss. The loss
# of the first step, from equal weights, has no such excuse.
TOLERANCES = {"fp32": toy.CLOSE, "bf16": {"rtol": 0.01, "atol": 2e-3}}


def all_cells() -> list[Cell]:
    return list(itertools.product(*AXES))


def pairwise_cells() -> list[Cell]:
    """Few cells in which every two values of different axes meet: greedily the most new pairs."""
    cells, open_pairs = [], {pair for cell in all_cells() for pair in _pairs(cell)}
    while open_pairs:
        best = max(all_cells(), key=lambda cell: len(open_pairs & _pairs(cell)))
        open_pairs -= _pairs(best)
        cells.append(best)
    return cells


def _pairs(cell: Cell) -> set[Any]:
    return set(itertools.combinations(enumerate(cell), 2))


def run_cells(cells: Sequence[Cell]) -> dict[Cell, Any]:
    """Train the cells one after the other (in the ranks): losses, gradient norms, weights."""
    results = {}
    for cell in cells:
        name, precision, optimizer, _, norm = cell
        engine = toy.make_engine(name, optimizer, precision=precision, norm=norm)
        losses, grad_norms = toy.run_steps(engine, optimizer, range(1, toy.STEPS + 1))
        results[cell] = losses, grad_norms, toy.weights(name, engine)
        engine.close()
    return results


def check_cell(cell: Cell, result: Any) -> None:
    """Compare what one rank got with plain PyTorch in this process.

    Running statistics of ``sync`` are left to its own tests.
    """
    _, precision, optimizer, num_ranks, norm = cell
    losses, grad_norms, got = result
    want_losses, want_norms, want = toy.train_plainly(optimizer, None, norm, precision, num_ranks)
    close = TOLERANCES[precision]
    if norm != "sync":  # which sums in another order before it rounds
        torch.testing.assert_close(losses[0], want_losses[0], **toy.CLOSE)
    torch.testing.assert_close(losses, want_losses, **close)
    torch.testing.assert_close(grad_norms, want_norms, **close)
    if got is not None:
        names = [n for n in want if norm != "sync" or not n.startswith("norm.running")]
        torch.testing.assert_close({n: got[n] for n in names}, {n: want[n] for n in names}, **close)


def main() -> int:
    """Run all cells and report; 1 if any of them differs."""
    from tests.ranks.engine_matrix import run_cells  # not of __main__, where ranks do not find it

    num_failed = 0
    for num_ranks in AXES[3]:
        cells = [cell for cell in all_cells() if cell[3] == num_ranks]
        with tempfile.TemporaryDirectory() as folder:
            ranks = run_ranks(run_cells, num_ranks, Path(folder), cells, timeout_seconds=1200)
        for cell, (rank, results) in itertools.product(cells, enumerate(ranks)):
            try:
                check_cell(cell, results[cell])
            except AssertionError as error:
                num_failed += 1
                sys.stdout.write(f"{cell} on rank {rank}: {error}\n")
        sys.stdout.write(f"{len(cells)} cells on {num_ranks} ranks, {num_failed} failed so far\n")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
