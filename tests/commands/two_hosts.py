"""Two hosts on one machine: network namespaces joined by a bridge, with an sshd in each.

They share disks and processes, and have addresses, host names and ports of their own. Nothing
outside them can be reached from them. Needs root, iproute2, openssh-server and pdsh.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

TOOLS = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "pdsh")
UNUSED = 9
"""A host of that network that does not exist."""


def missing() -> str:
    """What keeps this machine from playing two hosts; empty if nothing does."""
    absent = [tool for tool in TOOLS if find(tool) is None]
    if os.geteuid() != 0 or absent:
        return f"needs root and {', '.join(absent or TOOLS)}"
    name = f"bigdet{os.getpid()}"
    made = subprocess.run([find("ip"), "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"cannot make network namespaces: {made.stderr.strip()}"
    subprocess.run([find("ip"), "netns", "del", name], check=True)
    return ""


def find(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class TwoHosts:
    """Use as a context manager: the hosts are gone afterwards, with all that ran in them.

    Attributes:
        addresses: of the two hosts.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.network = f"10.213.{os.getpid() % 250}"
        self.addresses = [self.address(1), self.address(2)]
        self.names = [f"bigdet{os.getpid()}{letter}" for letter in "ab"]
        self.hub = f"bigdet{os.getpid()}hub"
        self._servers: list[subprocess.Popen] = []

    def address(self, number: int) -> str:
        return f"{self.network}.{number}"

    def __enter__(self):
        try:
            self._join()
            self._write_keys()
            for name, address in zip(self.names, self.addresses, strict=True):
                self._start_sshd(name, address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in [*self.names, self.hub]:
            for _ in range(100):
                pids = ip("netns", "pids", name, check=False).split()
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                if not pids:
                    break
                time.sleep(0.05)
            ip("netns", "del", name, check=False)  # its interfaces go with it
        for server in self._servers:
            server.wait(10)

    def inside(self, *command: str) -> list[str]:
        """A command that runs on the first host."""
        return [find("ip"), "netns", "exec", self.names[0], "unshare", "--uts", "sh", "-c",
                f'hostname {self.names[0]}; exec "$@"', "sh", *command]  # fmt: skip

    def hostfile(self, *numbers: int) -> Path:
        """A hostfile of some hosts with one rank each."""
        file = self.folder / f"hostfile-{'-'.join(map(str, numbers))}"
        file.write_text("".join(f"{self.address(number)} slots=1\n" for number in numbers))
        return file

    def variables(self, **exported: str) -> dict[str, str]:
        """What the deepspeed command needs; ``exported`` reaches the ranks."""
        file = self.folder / "deepspeed_env"
        exported = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", **exported}
        file.write_text("".join(f"{key}={value}\n" for key, value in exported.items()))
        return {"PATH": f"{self.folder}:{os.environ['PATH']}", "DS_ENV_FILE": str(file)}

    def _join(self) -> None:
        """Make the namespaces, and a bridge in a third one."""
        for name in [*self.names, self.hub]:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.hub, "link", "set", "bridge", "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip("-n", self.hub, "link", "add", f"port{number}", "type", "veth",
               "peer", "name", "eth0", "netns", name)  # fmt: skip
            ip("-n", self.hub, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def _write_keys(self) -> None:
        """Make keys of this test alone, and an ssh that uses them and nothing of the user's."""
        for name in ("host", "user"):
            key = str(self.folder / name)
            command = [find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key]
            subprocess.run(command, check=True)
        shutil.copy(self.folder / "user.pub", self.folder / "authorized_keys")
        config = self.folder / "ssh_config"
        config.write_text(
            f"IdentityFile {self.folder}/user\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
            f"UserKnownHostsFile /dev/null\nLogLevel ERROR\nConnectTimeout 3\n"
        )
        wrapper = self.folder / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {find("ssh")} -F {config} "$@"\n')
        wrapper.chmod(0o700)

    def _start_sshd(self, name: str, address: str) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd separates privileges there
        config = self.folder / f"sshd_config_{name}"
        config.write_text(
            f"ListenAddress {address}\nHostKey {self.folder}/host\nUsePAM no\nStrictModes no\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nPidFile none\n"
            f"PermitRootLogin prohibit-password\nPasswordAuthentication no\n"
        )
        log = (self.folder / f"sshd_{name}.log").open("wb")
        self._servers.append(subprocess.Popen(
            [find("ip"), "netns", "exec", name, "unshare", "--uts", "sh", "-c",
             f"hostname {name}; exec {find('sshd')} -D -e -f {config}"],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        ))  # fmt: skip
        log.close()
        deadline = time.monotonic() + 10
        while subprocess.run(
            self.inside(str(self.folder / "ssh"), address, "true"), capture_output=True
        ).returncode:
            assert time.monotonic() < deadline, (self.folder / f"sshd_{name}.log").read_text()
            time.sleep(0.1)


def ip(*words: str, check: bool = True) -> str:
    done = subprocess.run([find("ip"), *words], capture_output=True, text=True)
    assert done.returncode == 0 or not check, (words, done.stderr)
    return done.stdout
