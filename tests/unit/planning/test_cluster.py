import dataclasses

import pytest

from bigdet.config.engine import EngineConfig
from bigdet.plan import parse_cluster
from bigdet.planning.cluster import (
    KINDS,
    Cluster,
    Work,
    best,
    forecast,
    link_speed,
    state_bytes,
    traffic,
)
from bigdet.training.sizes import ModelSizes

# 100 million weights, all trained: 0.4 GB of gradients. AdamW. 0.9 s: 0.3 forward, 0.6 backward.
WORK = Work(
    ModelSizes(100_000_000, 100_000_000, 0),
    optimizer_tensors=2,
    micro_batch_seconds=0.9,
    activation_bytes=1e9,
    micro_batches=1,
)
SLOW = Cluster(gpus_per_host=1, inside=1e12, between=1e9, latency=0.0, overlaps=False)


def waiting(kind: str, gpus: int, cluster: Cluster, work: Work = WORK) -> float:
    return forecast(kind, gpus, cluster, work).waiting_seconds


def test_one_gpu_waits_for_nobody():
    for kind in KINDS:
        row = forecast(kind, 1, SLOW, WORK)
        assert (row.step_seconds, row.efficiency) == (0.9, 1.0)


def test_stages_send_what_the_zero_paper_says():
    # 4 GPUs send 3/4 of the bytes in a gather or scatter: 0.3 GB, 0.3 s at 1 GB/s.
    assert waiting("ZeRO-0", 4, SLOW) == pytest.approx(0.6)
    assert waiting("ZeRO-1", 4, SLOW) == pytest.approx(0.6)
    assert waiting("ZeRO-3", 4, SLOW) == pytest.approx(0.9)  # 1.5 times, section 7.2.2
    assert waiting("FSDP2", 4, SLOW) == pytest.approx(0.9)
    twice = dataclasses.replace(WORK, micro_batches=2)
    assert waiting("ZeRO-1", 4, SLOW, twice) == pytest.approx(0.6)
    assert waiting("ZeRO-2", 4, SLOW, twice) == pytest.approx(0.9)
    assert waiting("ZeRO-3", 4, SLOW, twice) == pytest.approx(1.8)


def test_gpus_hide_what_the_pass_covers_but_for_one_call():
    overlapping = dataclasses.replace(SLOW, overlaps=True)
    # 25 buckets of 4 million: the last of 0.024 s travels alone, 0.6 s of backward hide the rest.
    assert waiting("ZeRO-0", 4, overlapping) == pytest.approx(0.024)
    # The scatter of 0.3 s waits for one of 10 buckets; the gather of 0.3 s is not hidden.
    assert waiting("ZeRO-2", 4, overlapping) == pytest.approx(0.03 + 0.3)


def test_every_adapter_of_a_host_carries_rings_and_latency_grows_with_the_logarithm():
    cluster = Cluster(gpus_per_host=4, inside=100e9, between=10e9, latency=1e-3)
    # 8 GPUs: 2 * 7/8 of 0.4 GB at 4 * 10 GB/s, and 2 * log2(8) messages.
    assert cluster.seconds(0.4e9, 8, calls=1, passes=2) == pytest.approx(0.0175 + 0.006)
    # Inside one host the network plays no part: 2 * 3/4 of 0.4 GB at 100 GB/s.
    assert cluster.seconds(0.4e9, 4, calls=1, passes=2) == pytest.approx(0.006 + 0.004)


NODE = EngineConfig(kind="fsdp", zero_stage=None, shard_over="node", gather_precision="fp32")
HALF = dataclasses.replace(NODE, gather_precision="bf16", reduce_precision="bf16")


def test_traffic_inside_a_host_and_between_hosts_is_that_of_the_config():
    # Two hosts of 4; 0.4 GB of weights and of gradients; 2 micro-batches. Of n GPUs, each sends
    # (n-1)/n of what is gathered or scattered; 80 of the 100 million weights are rounded.
    sizes = dataclasses.replace(WORK.sizes, rounded=80_000_000)
    work = dataclasses.replace(WORK, sizes=sizes, micro_batches=2)
    default = EngineConfig()
    expected = {
        ("ZeRO-0", default): (7 / 8 * 0.8, 7 / 8 * 0.8),
        ("ZeRO-2", default): (7 / 8 * (2 * 0.4 + 0.4),) * 2,
        ("ZeRO-3", default): (7 / 8 * 2 * 3 * 0.4,) * 2,
        ("FSDP2", default): (7 / 8 * 2 * (2 * 0.24 + 0.4),) * 2,  # which gathers bf16 by default
        # In a host: 2 gathers and a scatter for each micro-batch; the sum over both hosts once.
        ("ZeRO-3", NODE): (3 / 4 * 2 * 3 * 0.4, 2 * 1 / 2 * 0.4),
        ("FSDP2", NODE): (3 / 4 * 2 * 3 * 0.4, 2 * 1 / 2 * 0.4),
        # Gathered: 20 million of 4 bytes, 80 of 2; reduced: 100 of 2.
        ("ZeRO-3", HALF): (3 / 4 * 2 * (2 * 0.24 + 0.2), 2 * 1 / 2 * 0.2),
        ("FSDP2", HALF): (3 / 4 * 2 * (2 * 0.24 + 0.2), 2 * 2 * 1 / 2 * 0.2),
        ("ZeRO-2", HALF): (7 / 8 * (2 * 0.4 + 0.4),) * 2,  # which has none of these options
    }
    for (kind, engine), (inside, between) in expected.items():
        sent = traffic(kind, 8, 4, work, engine)
        assert (sent.inside / 1e9, sent.between / 1e9) == pytest.approx((inside, between)), kind
    assert traffic("FSDP2", 4, 4, work, NODE).between == 0


def test_shards_of_a_host_wait_for_the_hosts_once_a_step_over_each_adapter():
    # 2 hosts of 4 at 10 GB/s inside, 0.1 between. In a host 3/4 of 0.4 GB: 0.03 s each for two
    # gathers and a scatter; an adapter sends twice 1/2 of a share of 0.1 GB: 1 s.
    cluster = Cluster(gpus_per_host=4, inside=10e9, between=0.1e9, latency=0.0, overlaps=False)
    twice = dataclasses.replace(WORK, micro_batches=2)
    row = forecast("FSDP2", 8, cluster, twice, NODE)
    assert row.waiting_seconds == pytest.approx(2 * 0.09 + 1.0)
    assert row.memory_bytes == pytest.approx(1.6e9 / 4 + 1e9)  # 16 bytes of each weight
    # bf16: 2 gathers of all 100 million in fp32 (none is known to be rounded), scatters of half;
    # hosts meet for each micro-batch, with half of the bytes.
    row = forecast("FSDP2", 8, cluster, twice, HALF)
    assert row.waiting_seconds == pytest.approx(2 * (0.06 + 0.015) + 2 * 0.5)
    # Over all: 7/8 of 0.4 GB three times at 4 x 0.1 GB/s.
    assert waiting("FSDP2", 8, cluster, twice) == pytest.approx(2 * 3 * 7 / 8)


def test_a_frozen_backbone_is_divided_over_all_gpus_where_the_config_says_so():
    # 200 million numbers of 2 bytes.
    work = dataclasses.replace(WORK, sizes=dataclasses.replace(WORK.sizes, frozen=200_000_000))
    for kind, choice, share in [
        ("ZeRO-2", None, 0.4),
        ("ZeRO-2", True, 0.4 / 8),
        ("FSDP2", None, 0.4 / 8),
        ("FSDP2", False, 0.4),
    ]:
        engine = dataclasses.replace(NODE, shard_frozen=choice)
        more = state_bytes(kind, 8, work, 4, engine) - state_bytes(kind, 8, WORK, 4, engine)
        assert more / 1e9 == pytest.approx(share)
        sent = traffic(kind, 8, 4, work, engine).between - traffic(kind, 8, 4, WORK, engine).between
        assert sent / 1e9 == pytest.approx(0.0 if share == 0.4 else 7 / 8 * 0.4)


def test_states_take_what_the_zero_paper_says():
    # 16 bytes per weight; ZeRO-1 and 2 add 4, sharded, for the copy that is stepped.
    gb = {kind: state_bytes(kind, 4, WORK) / 1e9 for kind in KINDS}
    assert gb == {
        "ZeRO-0": pytest.approx(1.6),
        "ZeRO-1": pytest.approx(0.8 + 1.2 / 4),
        "ZeRO-2": pytest.approx(0.4 + 1.6 / 4),
        "ZeRO-3": pytest.approx(1.6 / 4),
        "FSDP2": pytest.approx(1.6 / 4),
    }


def test_the_fastest_that_fits_is_taken():
    rows = [forecast(kind, 4, SLOW, WORK) for kind in KINDS]
    assert best(rows, 10e9) == rows[0]  # as fast as ZeRO-1, and simpler
    assert best(rows, 1.9e9) == rows[2]  # 1 GB of activations: 0.9 GB left
    assert best(rows, 1.45e9) == rows[3]  # FSDP2 is as fast and as small, and comes after it
    assert best(rows, 1.3e9) is None


def test_links_and_gpus_are_read():
    assert link_speed("nvlink") == pytest.approx(0.8 * 450e9)
    assert link_speed("400gb") == pytest.approx(0.8 * 50e9)
    hosts, cluster = parse_cluster("8x16", "nvlink,400gb", 1e-5)
    assert (hosts, cluster.gpus_per_host) == (16, 8)
    for gpus, link, words in [
        ("8", "nvlink,400gb", "--gpus: found 8"),
        ("8x0", "nvlink,400gb", "--gpus: found 8x0"),
        ("8x2", "nvlink", "--link: found nvlink, expected two"),
        ("8x2", "fast,400gb", "--link: found fast"),
        ("8x2", "nvlink,400", "--link: found 400"),
        ("8x2", "nvlink,-1gb", "--link: found -1gb"),
    ]:
        with pytest.raises(ValueError, match=words):
            parse_cluster(gpus, link, 1e-5)
