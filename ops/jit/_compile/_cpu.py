"""The CPU and the memory of this machine, found without running a program."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = "/sys/fs/cgroup"
# A cgroup's limit, and how much its processes use: of version 2, and of version 1.
_FILES = {
    "memory.max": "memory.current",
    "memory/memory.limit_in_bytes": "memory/memory.usage_in_bytes",
}


@functools.cache
def features() -> frozenset[str]:
    """List the instruction-set extensions of this CPU, as Linux names them; empty elsewhere."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", errors="replace") as lines:
        for line in lines:  # the first core's, because a large machine has many
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def memory_limit() -> int:
    """Return how many bytes this process may use: the machine's, or fewer in a cgroup."""
    machines = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machines, *(limit for limit, _ in _cgroups())])


def free_memory() -> int:
    """Return how many bytes are left for another process, in this cgroup and on this machine."""
    left = [memory_limit(), *(limit - used for limit, used in _cgroups())]
    with contextlib.suppress(OSError, ValueError):  # elsewhere than on Linux only the limit counts
        available = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
        left.append(int(available.split("kB")[0]) << 10)
    return min(left)


def _cgroups() -> Iterator[tuple[int, int]]:
    for limit, used in _FILES.items():
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            yield int(Path(_CGROUPS, limit).read_text()), int(Path(_CGROUPS, used).read_text())


def jobs() -> int:
    """Return how many compilers to run at once: ``MAX_JOBS``, or one a core with 3 GB each."""
    told = os.environ.get("MAX_JOBS", "")
    return max(1, int(told) if told.isdecimal() else min(cores(), memory_limit() // (3 << 30)))


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
