"""What the system says about memory, and the limit it enforces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flashlite.runtime.process import free_memory, limit_data, resident_bytes, return_unused

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def machine(folder: Path, cgroup: str, groups: dict[str, dict[str, str]]) -> tuple[Path, Path]:
    """A /proc that has 1000 kB available, and a /sys/fs/cgroup with these files."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 2000 kB\nMemFree: 10 kB\nMemAvailable:   1000 kB\n")
    (proc / "self/cgroup").write_text(cgroup)
    for name, files in groups.items():
        (cgroups / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (cgroups / name / file).write_text(text)
    return proc, cgroups


def v2(limit: str, used: int, cache: int = 0) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {cache}\nslab 1\n",
    }


def v1(limit: int, used: int, cache: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": f"inactive_file 0\ntotal_inactive_file {cache}\n",
    }


@pytest.mark.parametrize(
    ("cgroup", "groups", "free"),
    [
        ("0::/\n", {}, 1_024_000),
        ("", {}, 1_024_000),
        ("0::/app\n", {"app": v2("max", 7)}, 1_024_000),
        ("0::/app\n", {"app": v2("500000", 200_000)}, 300_000),
        ("0::/app\n", {"app": v2("500000", 200_000, cache=50_000)}, 350_000),
        ("0::/app\n", {"app": v2("500000", 600_000)}, 0),
        # A parent's limit counts too.
        ("0::/a/b\n", {"a": v2("100000", 1000), "a/b": v2("500000", 1000)}, 99_000),
        # Inside a container the path is the host's and the mount its own.
        ("0::/docker/abc\n", {".": v2("400000", 0)}, 400_000),
        ("4:memory:/app\n", {"memory/app": v1(300_000, 100_000, cache=10_000)}, 210_000),
        ("4:cpu,memory:/x\n0::/\n", {"memory": v1(300_000, 0)}, 300_000),
        ("4:memory:/app\n", {"memory/app": v1(2**63 - 4096, 100_000)}, 1_024_000),
        ("1:cpu:/app\n", {"memory/app": v1(1, 0)}, 1_024_000),
        ("0::/../../etc\n", {}, 1_024_000),
    ],
)
def test_free_memory_is_what_machine_and_container_leave(
    tmp_path: Path, cgroup: str, groups: dict[str, dict[str, str]], free: int
) -> None:
    assert free_memory(*machine(tmp_path, cgroup, groups)) == free


def test_free_memory_is_unknown_elsewhere(tmp_path: Path) -> None:
    assert free_memory(tmp_path / "none", tmp_path) is None


@linux
def test_this_machine_has_memory() -> None:
    free = free_memory()
    assert free is not None
    assert 1 << 20 < free < 1 << 50
    assert 1 << 20 < resident_bytes() <= resident_bytes("VmHWM")
    return_unused()


def python(script: str) -> str:
    """What a script prints in a process of its own."""
    header = (
        "import resource, sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from flashlite.runtime.process import limit_data, resident_bytes\n"
        "soft = lambda: resource.getrlimit(resource.RLIMIT_DATA)[0]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", header + script], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@linux
def test_beyond_the_ceiling_is_a_memory_error_and_the_limit_goes_with_it() -> None:
    script = """
with limit_data(resident_bytes() + (50 << 20)):
    inside = bytearray(40 << 20)
    try:
        bytearray(400 << 20)
    except MemoryError:
        print("refused", end=" ")
print(len(bytearray(400 << 20)) >> 20, soft() == resource.RLIM_INFINITY)
"""
    assert python(script) == "refused 400 True"


@linux
def test_the_lowest_of_several_limits_counts_whichever_ends_first() -> None:
    script = """
resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, resource.RLIM_INFINITY))
low, high = limit_data(resident_bytes() + (50 << 20)), limit_data(resident_bytes() + (90 << 20))
low.__enter__(); first = soft(); high.__enter__(); both = soft()
low.__exit__(None, None, None); second = soft()
high.__exit__(None, None, None)
print(first == both < second < 1 << 40, soft() == 1 << 40)
with limit_data(1 << 50):
    print(soft() == 1 << 40)
"""
    assert python(script) == "True True\nTrue"


def test_no_ceiling_no_limit() -> None:
    with limit_data(None):
        pass
