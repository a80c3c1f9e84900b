"""How much memory a process took, and how much one could take."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GROUP_USE = Path("/sys/fs/cgroup/memory.current")


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process, or on CUDA its tensors, ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not `ru_maxrss`: a child inherits that of the process which started it.
        told = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = re.search(r"VmHWM:\s+(\d+) kB", told)
    assert found is not None
    return int(found[1]) * 1024


def available_bytes(device: torch.device) -> int:
    """Memory that a new process could take: of the device, or of this machine or container.

    On a CPU what this process holds already counts in, as the run would be in its place.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        told = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = re.search(r"MemAvailable:\s+(\d+) kB", told)
    assert found is not None
    free = int(found[1]) * 1024
    if GROUP_LIMIT.is_file() and (limit := GROUP_LIMIT.read_text().strip()).isdecimal():
        free = min(free, int(limit) - int(GROUP_USE.read_text()))
    return free + held_bytes()


def held_bytes() -> int:
    """Resident memory of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
