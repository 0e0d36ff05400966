"""The CPU and the memory of this machine, found without running a program."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

_X86_LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"}),
)
# A cgroup's limit, and what its processes use: of version 2, and of version 1.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


@functools.lru_cache(maxsize=1)
def features() -> frozenset[str]:
    """List the instruction-set extensions of this CPU, as Linux names them; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            for line in lines:  # the first core's: reading all of them takes long on large machines
                if line.startswith(("flags", "Features")):
                    return frozenset(line.partition(":")[2].split())
    except FileNotFoundError:
        pass
    return frozenset()


@functools.lru_cache(maxsize=1)
def level() -> str | None:
    """Return the x86-64 micro-architecture level, for ``-march``: portable, unlike ``native``."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    level_v3 = _X86_LEVELS[1][1]
    for name, needs in _X86_LEVELS:
        if features() >= needs | level_v3:
            return name
    return None


def memory_limit() -> int:
    """Return how many bytes this process may use: the machine's, or fewer in a cgroup."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([limit, *(most for path, _ in _CGROUPS if (most := _number(path)) is not None)])


def free_memory() -> int:
    """Return how many bytes are left for another process, in this cgroup and on this machine."""
    left = [memory_limit()]
    for limit, used in _CGROUPS:
        most, now = _number(limit), _number(used)
        if most is not None and now is not None:
            left.append(most - now)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) << 10)
    except (OSError, ValueError):
        pass  # not Linux: the limit is all that is known
    return min(left)


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def jobs() -> int:
    """Return how many compilers to run at once: one a core, each with 3 GB of memory."""
    return max(1, min(cores(), memory_limit() // (3 << 30)))


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
