"""deepspeed --hostfile on two hosts, for real: ssh, pdsh, gloo between network namespaces."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.runs import Command, deepspeed, numbers
from tests.commands.two_hosts import UNUSED, TwoHosts, missing

SHORT = ["phases.pretrain.steps=3", "phases.finetune.steps=2"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with TwoHosts(tmp_path_factory.mktemp("hosts")) as two:
        yield two


def launched(hosts: TwoHosts, *numbers_of_hosts: int) -> list[str]:
    """deepspeed on the first host, with a hostfile."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile"]
    command += [str(hosts.hostfile(*numbers_of_hosts)), "--master_addr", hosts.addresses[0]]
    return hosts.inside(*command, "-m", "bigdet.train")


def test_two_hosts_give_the_losses_of_two_ranks_on_one(
    hosts: TwoHosts, tmp_path: Path, shapes_shards: Path
):
    two = Command(
        tmp_path / "two",
        shapes_shards,
        *SHORT,
        launcher=launched(hosts, 1, 2),
        variables=hosts.variables(),
    )
    code, printed = two.finish()
    assert code == 0, printed
    one = Command(tmp_path / "one", shapes_shards, *SHORT, launcher=deepspeed(2))
    code, printed = one.finish()
    assert code == 0, printed
    assert len([line for line in numbers(tmp_path / "two") if "loss/total" in line]) == 5
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")


def test_the_doctor_sees_both_hosts(hosts: TwoHosts, tmp_path: Path, shapes_shards: Path):
    doctor = Command(
        tmp_path / "run",
        shapes_shards,
        "--doctor",
        launcher=launched(hosts, 1, 2),
        variables=hosts.variables(),
    )
    code, printed = doctor.finish()
    assert code == 0, printed
    assert f"2 on 2 hosts ({hosts.names[0]}, {hosts.names[1]})" in printed
    assert "GB/s per rank" in printed
    assert "all is well" in printed


def test_a_host_that_cannot_be_reached_ends_the_run_with_one_message(
    hosts: TwoHosts, tmp_path: Path, shapes_shards: Path
):
    run = Command(
        tmp_path / "run",
        shapes_shards,
        launcher=launched(hosts, 1, UNUSED),
        variables=hosts.variables(BIGDET_JOIN_SECONDS="4"),
    )
    code, printed = run.finish()
    assert code != 0
    assert f"{hosts.address(UNUSED)}" in printed  # what ssh says of it
    (message,) = [line for line in printed.splitlines() if "error: only" in line]
    assert "1 of 2 ranks connected within 4 s" in message
    assert "missing: 1." in message
    assert not (tmp_path / "run").exists()
