"""What a process may take of its host, read from made-up files of the kernel."""

import os
from pathlib import Path

import pytest

from bigdet.host.limits import Memory, host_memory, num_cpus

MIB = 1 << 20
MEMINFO = "MemTotal:       65536 kB\nMemFree:         1024 kB\nMemAvailable:   32768 kB\n"
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "36 31 0:33 {top} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def host(root: Path, group: str, mounts: str) -> None:
    """A host with 64 MiB, 32 of them free."""
    write(root, {"proc/meminfo": MEMINFO, "proc/self/cgroup": group})
    write(root, {"proc/self/mountinfo": "23 1 8:1 / / rw - ext4 /dev/sda rw\n" + mounts})


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cpus")
def test_without_control_groups_it_is_the_host(tmp_path: Path):
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert host_memory(tmp_path) == Memory(64 * MIB, 32 * MIB)
    assert num_cpus(tmp_path) == 8


@pytest.mark.usefixtures("eight_cpus")
def test_the_least_of_nested_groups_counts_and_files_in_memory_are_free(tmp_path: Path):
    host(tmp_path, "0::/kube/pod/box\n", V2)
    groups = "sys/fs/cgroup/kube"
    stat = f"anon 1\nactive_file {2 * MIB}\ninactive_file {3 * MIB}\nslab_reclaimable {MIB}\n"
    write(
        tmp_path,
        {
            f"{groups}/pod/box/memory.max": "max\n",
            f"{groups}/pod/box/memory.current": f"{9 * MIB}",
            f"{groups}/pod/box/cpu.max": "max 100000\n",
            f"{groups}/pod/memory.max": f"{20 * MIB}\n",
            f"{groups}/pod/memory.current": f"{15 * MIB}",
            f"{groups}/pod/memory.stat": stat,
            f"{groups}/pod/cpu.max": "150000 100000\n",
            f"{groups}/memory.max": f"{30 * MIB}\n",
            f"{groups}/memory.current": f"{16 * MIB}",
        },
    )
    # pod: 20 - (15 - 2 - 3 - 1) = 11 MiB; kube: 30 - 16 = 14; the host 32.
    assert host_memory(tmp_path) == Memory(20 * MIB, 11 * MIB)
    assert num_cpus(tmp_path) == 2  # of 1.5 CPUs

    write(tmp_path, {f"{groups}/pod/box/memory.high": f"{12 * MIB}"})  # slowed down from there on
    assert host_memory(tmp_path) == Memory(12 * MIB, 3 * MIB)  # box: 12 - 9


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize("top", ["/", "/docker/ab12"])
def test_version_1_is_read_too_also_where_a_container_sees_its_own_group_alone(tmp_path, top: str):
    host(
        tmp_path,
        "4:cpu,cpuacct:/docker/ab12\n5:memory:/docker/ab12\n1:name=systemd:/docker/ab12\n0::/\n",
        V1.format(top=top),
    )
    inner = "docker/ab12/" if top == "/" else ""
    memory, cpu = f"sys/fs/cgroup/memory/{inner}", f"sys/fs/cgroup/cpu,cpuacct/{inner}"
    stat = f"active_file 7\ntotal_active_file {MIB}\ntotal_inactive_file {2 * MIB}\n"
    write(
        tmp_path,
        {
            f"{memory}memory.limit_in_bytes": f"{10 * MIB}",
            f"{memory}memory.stat": stat,
            f"{memory}memory.usage_in_bytes": f"{8 * MIB}",
            f"{cpu}cpu.cfs_quota_us": "300000\n",
            f"{cpu}cpu.cfs_period_us": "100000\n",
        },
    )
    assert host_memory(tmp_path) == Memory(10 * MIB, 5 * MIB)  # 10 - (8 - 1 - 2)
    assert num_cpus(tmp_path) == 3

    # A limit of a group further out, which this one cannot look into.
    write(tmp_path, {f"{memory}memory.stat": f"{stat}hierarchical_memory_limit {9 * MIB}\n"})
    assert host_memory(tmp_path) == Memory(9 * MIB, 4 * MIB)


@pytest.mark.usefixtures("eight_cpus")
def test_no_limit_is_none(tmp_path: Path):
    host(tmp_path, "5:memory:/a\n4:cpu,cpuacct:/a\n", V1.format(top="/"))
    write(
        tmp_path,
        {
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{60 * MIB}\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        },
    )
    assert host_memory(tmp_path) == Memory(64 * MIB, 32 * MIB)
    assert num_cpus(tmp_path) == 8


def test_macos_has_no_affinity_and_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 16384}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert num_cpus(tmp_path) == 10
    assert host_memory(tmp_path) == Memory(16_384_000, None)


def test_nothing_else_asks_the_system_for_cpus_or_memory():
    root = Path(__file__).parents[2]
    for path in [*(root / "bigdet").rglob("*.py"), *(root / "tools").glob("*.py")]:
        if path.name != "limits.py":
            text = path.read_text()
            assert "getaffinity" not in text, path
            assert "meminfo" not in text, path
