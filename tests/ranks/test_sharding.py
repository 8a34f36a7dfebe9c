"""Shards inside each of two nodes of two ranks, and what ranks send each other in bf16."""

from __future__ import annotations

import gc
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bigdet.engine import checkpoint
from bigdet.pieces.index import read_index, read_state
from tests.ranks import toy
from tests.ranks.toy import (
    CLOSE,
    OFFLOADS,
    STEPS,
    assert_same_state,
    lanes_of_rank,
    make_engine,
    run_steps,
    save_together,
    train_plainly,
    whole_of,
    whole_state,
)
from tests.spawn import run_ranks

SHARDED = ("zero3", "fsdp")
CLIP_NORM = 0.5
SAVED_AT = 3
WAYS = [
    *((name, over, "none") for name in SHARDED for over in ("all", "node")),
    *((name, "node", offload) for name in SHARDED for offload in OFFLOADS[name]),
]
PRECISIONS = list(itertools.product(("fp32", "bf16"), ("fp32", "bf16")))


class Sent(TorchDispatchMode):
    """Notes what this rank gives to collectives in a block: (kind, numbers, bytes)."""

    KINDS = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func._schema.name.removeprefix("c10d::")
        if kind in self.KINDS:
            given = args[self.KINDS[kind]]
            given = given[0] if isinstance(given, list) else given
            self.seen.append((kind.strip("_"), given.numel(), given.nbytes))
        return func(*args, **(kwargs or {}))

    def total(self, kind: str) -> int:
        return sum(num_bytes for own, _, num_bytes in self.seen if own == kind)


# ---- What the ranks run.


def run_on_nodes(folder: Path) -> dict[str, Any]:
    """Four ranks as two nodes."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    toy.LANES = 8  # two micro-batches per rank
    prepare()
    trained = {way: train_and_save(folder, *way) for way in WAYS}
    return {"trained": trained, "between": send_between_nodes(), "loaded": load_all(folder)}


def prepare() -> None:
    warnings.simplefilter("error")
    make_engine("zero3", "sgd").close()  # DeepSpeed imports more of itself with the first engine
    gc.freeze()  # what is imported by now need not be searched each time an engine is closed


def train_and_save(folder: Path, name: str, over: str, offload: str) -> Any:
    """Train and save; a bad step changes nothing."""
    engine: Any = make_engine(
        name, "adamw", CLIP_NORM, offload=offload, with_ema=True, on_meta=True, shard_over=over
    )
    losses, norms = run_steps(engine, "adamw", range(1, SAVED_AT + 1))
    before = whole_state(engine)
    assert not engine.train_step(lanes_of_rank(99, trouble="nan loss")).is_finite
    assert_same_state(whole_state(engine), before)
    save_together(engine, folder / f"{name}-{over}-{offload}" / "train-3")
    parts = engine._newest() + engine._optimizer_parts()
    held = sum(part.values.numel() for part in parts if not part.is_whole)
    more, more_norms = run_steps(engine, "adamw", range(SAVED_AT + 1, STEPS + 1))
    end = whole_state(engine)
    engine.close()
    return losses + more, norms + more_norms, end.model, end.ema, held


def send_between_nodes() -> dict[tuple[str, str], tuple[int, int]]:
    """How many numbers and bytes nodes send each other in a step, by engine and precision."""
    sent = {}
    for name, reduce in itertools.product(SHARDED, ("fp32", "bf16")):
        options = {"gather_precision": "bf16", "reduce_precision": reduce}
        engine = make_engine(name, "sgd", precision="bf16", shard_over="node", **options)
        with Sent() as seen:
            engine.train_step(lanes_of_rank(1))
        calls = [each for each in seen.seen if each[0] == "allreduce" and each[1] > 1]
        sent[name, reduce] = sum(each[1] for each in calls), sum(each[2] for each in calls)
        engine.close()
    return sent


def load_all(folder: Path) -> int:
    """Load what nodes saved in all sharded engines, bit for bit; return how many there were."""
    number = 0
    for name, over in itertools.product(SHARDED, ("all", "node")):
        engine = make_engine(name, "adamw", with_ema=True, on_meta=True, shard_over=over)
        for path in sorted(folder.glob("*-node-*/train-3")):
            saved = checkpoint.load(path)
            engine.load_state(saved.engine)
            assert_same_state(whole_state(engine), whole_of(saved.engine))
            number += 1
        engine.close()
    return number


def run_on_one_node(folder: Path) -> dict[str, Any]:
    """Load, and train with all precisions of what is sent."""
    prepare()
    loaded = load_all(folder)
    toy.LANES = 2  # one micro-batch per rank
    precise = {}
    for name, (gather, reduce) in itertools.product(SHARDED, PRECISIONS):
        options = {"gather_precision": gather, "reduce_precision": reduce}
        engine = make_engine(name, "sgd", precision="bf16", **options)
        with Sent() as sent:
            losses, norms = run_steps(engine, "sgd", [1])
        more, more_norms = run_steps(engine, "sgd", range(2, STEPS + 1))
        num_bytes = sent.total("allgather_base"), sent.total("reduce_scatter_base")
        end = whole_state(engine)
        precise[name, gather, reduce] = losses + more, norms + more_norms, end.tensors, num_bytes
        engine.close()
    return {"loaded": loaded, "precise": precise, "kept": kept_between_passes()}


def kept_between_passes() -> dict[str | None, int]:
    """Bytes of weights in bf16 that FSDP2 keeps from forward to backward, by what it gathers."""
    shapes, kept = {(5, 3, 3, 3), (5, 5), (3, 5), (5, 3)}, {}
    for gather in ("fp32", None):
        engine: Any = make_engine("fsdp", "sgd", precision="bf16", gather_precision=gather)
        total, _ = engine._total(lanes_of_rank(1)[0])
        found, nodes = {}, {total.grad_fn}
        while nodes:
            node = nodes.pop()
            nodes |= {each for each, _ in node.next_functions if each is not None}
            for name in ("_saved_weight", "_saved_mat2"):
                value = getattr(node, name, None)
                if value is not None and tuple(value.shape) in shapes:
                    assert value.dtype == torch.bfloat16
                    found[value.data_ptr()] = value.untyped_storage().nbytes()
        total.backward()
        engine.close()
        kept[gather] = sum(found.values())
    return kept


# ---- The tests.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def on_nodes(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(run_on_nodes, 4, folder, folder, timeout_seconds=600)


@pytest.fixture(scope="module")
def on_one_node(on_nodes: Any, folder: Path) -> list[dict[str, Any]]:
    return run_ranks(run_on_one_node, 2, folder, folder, timeout_seconds=600)


def test_shards_of_nodes_take_the_same_steps_as_shards_over_all_ranks_and_as_one(
    on_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "LANES", 8)
    losses, norms, expected = train_plainly("adamw", CLIP_NORM)
    assert min(norms) < CLIP_NORM < max(norms)
    for rank, way in itertools.product(on_nodes, WAYS):
        got_losses, got_norms, got, ema, _ = rank["trained"][way]
        torch.testing.assert_close((got_losses, got_norms), (losses, norms), **CLOSE)
        torch.testing.assert_close(got, expected, **CLOSE)
        torch.testing.assert_close(ema, rank["trained"][WAYS[0]][3], **CLOSE)


def test_a_rank_holds_its_share_of_its_nodes_copy(on_nodes: Any) -> None:
    # Trained: 5x27, 5, 5, 3x5 and 3 numbers, their weights and two tensors of AdamW. Of 2 ranks,
    # ZeRO gives the first 68 + 3 + 3 + 8 + 2 of them, FSDP2 3 rows of 5 and 2 of 3; of 4 ranks,
    # 34 + 2 + 2 + 4 + 1, and 2 rows of 5 and 1 of 3.
    firsts = {
        ("zero3", "node"): 3 * 84, ("zero3", "all"): 3 * 43,
        ("fsdp", "node"): 3 * 99, ("fsdp", "all"): 3 * 64,
    }  # fmt: skip
    for (name, over), first in firsts.items():
        held = [rank["trained"][name, over, "none"][4] for rank in on_nodes]
        assert held[0] == first
        if over == "node":
            assert held == [first, 3 * 163 - first] * 2
        else:
            assert sum(held) == 3 * 163


def test_a_checkpoint_of_nodes_has_each_number_once_and_all_ranks_write_it(
    on_nodes: Any, folder: Path
) -> None:
    paths = list(folder.glob("*-node-*/train-3"))
    assert len(paths) == 5
    for path in paths:
        index = read_index(path, read_state(path)["files"])
        for (kind, name), places in index.places.items():
            assert sum(place.count for place in places) == index.catalog[kind][name].count
        assert len(list(path.glob("pieces-*"))) == 4


def test_checkpoints_of_nodes_load_in_every_sharded_engine_on_any_ranks(
    on_nodes: Any, on_one_node: Any, folder: Path
) -> None:
    # Bit for bit, averages too: asserted in the ranks.
    assert [rank["loaded"] for rank in (*on_nodes, *on_one_node)] == [4 * 5] * 6
    assert run_ranks(load_all, 1, folder, folder, timeout_seconds=600) == [4 * 5]


def test_nodes_send_each_other_a_rank_s_share_of_the_gradients_once_a_step(on_nodes: Any) -> None:
    # 84 numbers as above, or 3 rows of the first unit and 2 of the other, after the last of two
    # micro-batches; FSDP2 after both where it would add them up in bf16.
    zero, fsdp = 84, 3 * (27 + 1 + 1) + 2 * (5 + 1)
    assert on_nodes[0]["between"] == {
        ("zero3", "fp32"): (zero, 4 * zero),
        ("zero3", "bf16"): (zero, 2 * zero),
        ("fsdp", "fp32"): (fsdp, 4 * fsdp),
        ("fsdp", "bf16"): (2 * fsdp, 2 * 2 * fsdp),
    }


def test_weights_sent_in_bf16_are_those_that_autocast_would_round(on_one_node: Any) -> None:
    for rank, name, reduce in itertools.product(on_one_node, SHARDED, ("fp32", "bf16")):
        exact = rank["precise"][name, "fp32", reduce][:3]
        torch.testing.assert_close(rank["precise"][name, "bf16", reduce][:3], exact, rtol=0, atol=0)


def test_no_copies_of_weights_stay_between_the_passes_of_fsdp(on_one_node: Any) -> None:
    # Autocast would keep convolution, frozen and last layer; the outermost unit, which is not freed
    # between the passes, has the last layer, as two rows of each of two ranks.
    assert on_one_node[0]["kept"] == {"fp32": 2 * (5 * 27 + 25 + 15), None: 2 * (2 * 2 * 5)}


def test_sums_of_gradients_in_bf16_are_close_and_weights_stay_fp32(on_one_node: Any) -> None:
    for rank, name in itertools.product(on_one_node, SHARDED):
        losses, norms, tensors, _ = rank["precise"][name, "fp32", "fp32"]
        got_losses, got_norms, got, _ = rank["precise"][name, "fp32", "bf16"]
        assert got_norms != norms
        torch.testing.assert_close(got_norms, norms, rtol=2**-8, atol=0)  # of 8 bits
        torch.testing.assert_close(got_losses, losses, rtol=0.01, atol=2e-3)
        torch.testing.assert_close(got, tensors, rtol=0.01, atol=2e-3)
        assert {value.dtype for value in got.values()} == {torch.float32}


def test_bf16_halves_the_bytes_that_are_sent(on_one_node: Any) -> None:
    # Numbers of a rank of two: convolution 68 (ZeRO) or 3 rows of 27 (FSDP2), normalization 3 + 3,
    # the frozen layer 13 + 3 or 3 x 6, the linear one 8 + 2 or 2 x 6. Normalization stays fp32.
    # ZeRO gathers all for both passes, and after the step what is below 10 numbers, in fp32; FSDP2
    # does not free its outermost unit, which has the linear layer, between the passes.
    gathered = {
        ("zero3", "fp32"): 2 * 4 * (68 + 6 + 16 + 10) + 4 * (3 + 3 + 3 + 2),
        ("zero3", "bf16"): 2 * (2 * 68 + 4 * 6 + 2 * 16 + 2 * 10) + 4 * (3 + 3 + 3 + 2),
        ("fsdp", "fp32"): 2 * 4 * (81 + 6 + 18) + 4 * 12,
        ("fsdp", "bf16"): 2 * (2 * 81 + 4 * 6 + 2 * 18) + 2 * 12,
    }
    # All trained numbers, of both ranks, with padding; nothing of the frozen layer.
    reduced = {"zero3": 2 * (68 + 6 + 10), "fsdp": 2 * (81 + 6 + 12)}
    for name, (gather, reduce) in itertools.product(SHARDED, PRECISIONS):
        num_bytes = on_one_node[0]["precise"][name, gather, reduce][3]
        size = {"fp32": 4, "bf16": 2}[reduce]
        assert num_bytes == (gathered[name, gather], size * reduced[name]), (name, gather, reduce)
