"""What the errors of gloo and NCCL mean, by texts that they really have."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bigdet import distributed
from bigdet.host import network

ROOT = Path(__file__).parents[2]
GLOO = "/third_party/gloo/gloo"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"[{GLOO}/transport/tcp/pair.cc:538] Connection closed by peer [::1]:29"),
        RuntimeError(f"[{GLOO}/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms"),
        RuntimeError("Connection closed by peer [127.0.0.1]:51024"),
        RuntimeError("Application timeout caused pair closure"),
        dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
        dist.DistBackendError(
            "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error"
        ),
    ],
)
def test_a_rank_that_is_gone_is_known(error: Exception):
    assert distributed.lost_peer(error).startswith("lost the connection to another rank (")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"[enforce fail at {GLOO}/transport/tcp/device.cc:84] ifa != nullptr. Unable"),
        RuntimeError(f"[enforce fail at {GLOO}/transport/tcp/pair.cc:456] op.nbytes <= 4. 20 vs 4"),
        RuntimeError("ProcessGroupGloo::allreduce: unsupported layout"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError(f"[{GLOO}/transport/tcp/pair.cc:538] Connection closed by peer"),
    ],
)
def test_what_else_gloo_says_is_no_lost_rank(error: Exception):
    assert distributed.lost_peer(error) == ""


def test_settings_of_nccl_are_reported_as_such(monkeypatch: pytest.MonkeyPatch):
    for name in network.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    text = "NCCL error in: x.cpp:1, invalid usage\nLast error:\nno socket interface found\n"
    told = distributed.lost_peer(dist.DistBackendError(text))
    assert told.startswith("NCCL cannot exchange tensors between the ranks: NCCL error in: x.cpp:1")
    assert "no socket interface found" in told
    assert "set are NCCL_SOCKET_IFNAME=ib7. NCCL_DEBUG=INFO" in told
    assert "lost the connection" not in told


def test_an_interface_that_this_host_lacks_is_named_along_with_those_that_it_has(monkeypatch):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0,ib0")
    error = RuntimeError(
        "[enforce fail at device.cc:84] ifa != nullptr. Unable to find address for: ib0"
    )
    assert network.explain_start(error) == (
        "the process group cannot be made: GLOO_SOCKET_IFNAME=eth0,ib0 is no interface of this "
        "host (lo, eth0). Name one of these, or unset it."
    )


@pytest.mark.parametrize(
    "words",
    [
        ["bigdet.train", "configs/quickstart.yaml"],
        ["bigdet.evaluate", "runs/none", "--shards", "none"],
    ],
)
def test_commands_say_so_with_one_process_too(tmp_path: Path, words: list[str]):
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "nosuch0"},
    )
    assert done.returncode == 1
    own = ", ".join(name for _, name in socket.if_nameindex())
    assert done.stderr.splitlines()[-1] == (
        f"error: the process group cannot be made: GLOO_SOCKET_IFNAME=nosuch0 is no interface of "
        f"this host ({own}). Name one of these, or unset it."
    )


def test_other_reasons_come_with_the_interfaces_and_variables(monkeypatch: pytest.MonkeyPatch):
    for name in network.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(7, "nosuch0")])
    error = RuntimeError(
        "[enforce fail at device.cc:215] ifa != nullptr. Unable to find interface for: [127.0.0.1]"
    )
    told = network.explain_start(error)
    assert told.startswith(
        "the process group cannot be made: Unable to find interface for: [127.0.0.1]. "
        f"{socket.gethostname()} has the interfaces nosuch0; set are MASTER_ADDR=head. "
    )
    assert "GLOO_SOCKET_IFNAME" in told


def test_a_name_of_rank_0_that_leads_nowhere_is_reported(monkeypatch: pytest.MonkeyPatch):
    def fails(*_words):
        raise socket.gaierror(-2, "Name or service not known")

    lost = dist.DistNetworkError("timed out after 300000ms while trying to connect to (head, 1)")
    listens = dist.DistNetworkError("The server socket has failed to listen on any address")
    assert network.explain_address(listens, "127.0.0.1", 7).startswith("cannot listen on port 7: ")
    assert "does not reach itself at 127.0.0.1:7: " in network.explain_address(lost, "127.0.0.1", 7)
    monkeypatch.setattr(socket, "getaddrinfo", fails)
    assert network.explain_address(lost, "head", 7).startswith(
        f"MASTER_ADDR=head: {socket.gethostname()} finds no address of that name (Name or service"
    )


def test_a_real_check_of_gloo_is_not_taken_for_a_lost_rank():
    with pytest.raises(RuntimeError) as caught:
        dist.ProcessGroupGloo.create_device(interface="nosuch0")
    assert "Unable to find address for" in str(caught.value)
    assert distributed.lost_peer(caught.value) == ""
    assert distributed.lost_peer(torch.OutOfMemoryError("CUDA out of memory")) == ""
