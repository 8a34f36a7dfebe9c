"""Why ranks cannot connect: what errors of gloo and NCCL mean, with the settings of this host."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct
import sys

import torch.distributed as dist

VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "TP_SOCKET_IFNAME",
)
"""Variables that decide which address and interface ranks use."""

# Those of gloo except its checks, which are about a setting or a bug: "[enforce fail at ...".
_LOST_GLOO = re.compile(
    r"\[(?!enforce fail)\S*gloo/transport/|Gloo connectFullMesh|Application timeout"
    r"|Connection (closed|reset)"
)
_LOST_NCCL = re.compile(
    r"ncclRemoteError|remote process exited|communicator was aborted|collective operation timeout"
    r"|Connection (closed|reset|refused|timed out)|Broken pipe|failed to pass monitoredBarrier"
)
_SIOCGIFFLAGS, _IFF_UP = 0x8913, 1  # Linux


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error means that another rank is gone."""
    if not isinstance(error, RuntimeError):
        return False
    if isinstance(error, dist.DistBackendError):  # NCCL's, of many kinds
        return _LOST_NCCL.search(str(error)) is not None
    return isinstance(error, dist.DistError) or _LOST_GLOO.match(_first_line(error)) is not None


def explain_nccl(error: BaseException) -> str:
    """Return what to do about an error of NCCL; empty if it is not one, or means a lost rank."""
    if not isinstance(error, dist.DistBackendError) or is_lost_peer(error):
        return ""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (
        f"NCCL cannot exchange tensors between the ranks: {' '.join(lines[:4])} {settings()} "
        f"NCCL_DEBUG=INFO makes it say more."
    )


def explain_start(error: BaseException) -> str:
    """Return why the process group cannot be made."""
    begin = "the process group cannot be made: "
    asked = os.environ.get("GLOO_SOCKET_IFNAME", "")
    known = _interfaces()
    unknown = [name for name in asked.split(",") if name and name not in known]
    if "Unable to find address for" in str(error) and unknown:
        return (
            f"{begin}GLOO_SOCKET_IFNAME={asked} is no interface of this host "
            f"({', '.join(known) or 'it has none'}). Name one of these, or unset it."
        )
    reason = re.sub(r"^\[enforce fail at \S+ (ifa != nullptr\. )?", "", _first_line(error))
    return (
        f"{begin}{reason.rstrip('.')}. {settings()} Ranks connect over an interface that is "
        f"up: set GLOO_SOCKET_IFNAME to one if the name of this host does not lead to it."
    )


def explain_address(error: BaseException, address: str, port: int) -> str:
    """Return why rank 0 cannot be reached at its own address."""
    problem = _first_line(error).rstrip(".")
    if unresolved := resolve_problem(address):
        return unresolved
    if "listen" in problem or "bind" in problem:
        return (
            f"cannot listen on port {port}: {problem}. Another run may use it: choose another one "
            f"(--master_port, or MASTER_PORT)."
        )
    return (
        f"rank 0 runs on {socket.gethostname()}, but does not reach itself at {address}:{port}: "
        f"{problem}. Set MASTER_ADDR to an address of this host. {settings()}"
    )


def resolve_problem(address: str) -> str:
    """Return what is wrong with MASTER_ADDR if its name has no address here; else empty."""
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return (
            f"MASTER_ADDR={address}: {socket.gethostname()} finds no address of that name "
            f"({reason}). Give the name or address of the host of rank 0, as this host knows it."
        )
    return ""


def settings() -> str:
    """Return a sentence with this host's interfaces and the variables that are set."""
    states = [f"{name}{_state(name)}" for name in _interfaces()]
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return (
        f"{socket.gethostname()} has the interfaces {', '.join(states) or '(none)'}; set are "
        f"{', '.join(found) or 'none of ' + ', '.join(VARIABLES)}."
    )


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _state(interface: str) -> str:
    """Return a note if an interface is switched off; only Linux says so."""
    if sys.platform != "linux":
        return ""
    request = struct.pack("16sH14x", interface.encode(), 0)
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        (flags,) = struct.unpack("16xH14x", fcntl.ioctl(asked, _SIOCGIFFLAGS, request))
        return "" if flags & _IFF_UP else " (down)"
    return ""


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
