"""What `doctor` asks a machine. Nothing is imported into this process, so a broken torch can tell.

Tests hand in a `Machine` of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

OURS = "dino-adapters"


@dataclass(frozen=True)
class Trial:
    """How a piece of Python ended in a process of its own."""

    worked: bool
    output: str


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be used: the smaller of the machine's and the container's."""
    limits = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        group = root / "sys/fs/cgroup"
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            limits.append(int(most) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(limits) if limits else None


def usable_cores(root: Path = Path("/")) -> float:
    """Cores this process may use: affinity, and the container's share of time."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else min(cores, round(int(quota) / int(period), 1))
    except (OSError, ValueError):
        return cores


def installed() -> dict[str, str]:
    """Normalised name -> version of every distribution."""
    found = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found[canonicalize_name(name)] = distribution.version
    return found


def requirements() -> tuple[str, ...]:
    """What this package's own metadata asks for; empty where it is not installed."""
    try:
        return tuple(metadata.requires(OURS) or ())
    except metadata.PackageNotFoundError:
        return ()


def attempt_python(code: str) -> Trial:
    """Runs code in a fresh interpreter, for two minutes at most."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return Trial(False, "no answer within two minutes")
    return Trial(done.returncode == 0, done.stdout if done.returncode == 0 else done.stderr)


@dataclass(frozen=True)
class Machine:
    """What the checks ask. The defaults ask this machine; tests hand in their own."""

    packages: Mapping[str, str] = field(default_factory=installed)
    requirements: tuple[str, ...] = field(default_factory=requirements)
    attempt: Callable[[str], Trial] = attempt_python
    python: tuple[int, ...] = tuple(sys.version_info[:3])
    free_disk: int = field(default_factory=lambda: shutil.disk_usage(Path.cwd()).free)
    free_memory: int | None = field(default_factory=free_memory)
    cores: float = field(default_factory=usable_cores)
    variables: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
