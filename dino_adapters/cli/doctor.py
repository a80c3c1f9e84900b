"""doctor: is this machine ready, and what to do where it is not. Checks read a `Machine`."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dino_adapters.cli.machine import OURS, Machine
from dino_adapters.contracts import Table

State = Literal["ok", "note", "problem"]
OPENCV = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
GIB = 2**30
EXTRAS = {
    "satellite": "map files (GeoTIFF)",
    "medical": "DICOM and NIfTI",
    "dense": "masks and boxes",
    "report": "HTML reports",
    "demo": "the example images and weights of `start`",
}
# Run in a process of its own: a torch and torchvision of different builds fail here, not in us.
TORCH_TRIAL = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    free, total = torch.cuda.mem_get_info(i)
    found["gpus"].append([torch.cuda.get_device_name(i), free, total])
print(json.dumps(found))
"""
VISION_TRIAL = """
import torch, torchvision
torchvision.ops.nms(torch.zeros(1, 4), torch.ones(1), 0.5)
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it."""

    state: State
    what: str
    found: str
    advice: str = ""


def examine(machine: Machine | None = None) -> tuple[Finding, ...]:
    """All findings, in the order in which they are worth reading."""
    machine = machine or Machine()
    checks = (
        check_python,
        check_core,
        check_torch,
        check_opencv,
        check_rivals,
        check_extras,
        check_room,
        check_threads,
    )
    return tuple(finding for check in checks for finding in check(machine))


def check_python(machine: Machine) -> Iterator[Finding]:
    """Python itself."""
    version = ".".join(str(part) for part in machine.python)
    if machine.python < (3, 11):
        yield Finding(
            "problem", "Python", version, "Python 3.11 or newer is needed: make an environment."
        )
    else:
        yield Finding("ok", "Python", f"{version} on {platform.system()} {platform.machine()}")


def check_core(machine: Machine) -> Iterator[Finding]:
    """What `pip install dino-adapters` brings."""
    core = [need for need in map(Requirement, machine.requirements) if need.marker is None]
    wrong = list(_unmet(core, machine))
    for name, found in wrong:
        yield Finding("problem", name, found, f"Run: pip install '{name}'")
    if core and not wrong:
        yield Finding("ok", "core packages", _versions(core, machine))
    if not core:
        yield Finding(
            "note",
            "core packages",
            "this package is not installed, so its needs are unknown",
            "Run: pip install -e .",
        )


def check_torch(machine: Machine) -> Iterator[Finding]:
    """Torch runs, torchvision belongs to it, and what GPUs there are."""
    if "torch" not in machine.packages:
        return  # check_core said so
    trial = machine.attempt(TORCH_TRIAL)
    if not trial.worked:
        advice = "Reinstall it: pip install --force-reinstall torch torchvision"
        yield Finding("problem", "torch", _last_line(trial.output), advice)
        return
    found: dict[str, Any] = json.loads(trial.output.strip().splitlines()[-1])
    gpus = [
        f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        for name, free, total in found["gpus"]
    ]
    if gpus:
        yield Finding("ok", "GPU", "; ".join(gpus))
    else:
        advice = "Small networks train here; use a machine with a GPU for ViT-S and larger."
        yield Finding("note", "GPU", "none that torch can use: the CPU is used", advice)
    if "torchvision" not in machine.packages:
        return
    pair = f"torch {found['torch']}, torchvision {machine.packages['torchvision']}"
    trial = machine.attempt(VISION_TRIAL)
    if trial.worked:
        yield Finding("ok", "torch pair", f"{pair} work together")
    else:
        yield Finding(
            "problem",
            "torch pair",
            f"{pair} do not fit: {_last_line(trial.output)}",
            "Install both in one command, from one place: pip install --force-reinstall torch "
            "torchvision",
        )


def check_opencv(machine: Machine) -> Iterator[Finding]:
    """One OpenCV at most: all its distributions write the same folder."""
    present = [name for name in OPENCV if name in machine.packages]
    keep = "opencv-python-headless"
    if not present:
        yield Finding("ok", "OpenCV", "not installed, and not needed")
        return
    if len(present) > 1:
        names = " ".join(present)
        yield Finding(
            "problem",
            "OpenCV",
            f"{' and '.join(present)} are both installed and overwrite each other",
            f"Run: pip uninstall -y {names} && pip install --no-deps {keep}",
        )
    trial = machine.attempt("import cv2; print(cv2.__version__)")
    if trial.worked:
        if len(present) == 1:
            found = f"{present[0]} {machine.packages[present[0]]} imports"
            yield Finding("ok", "OpenCV", found)
        return
    fix = f"Run: pip uninstall -y {' '.join(present)} && pip install --no-deps {keep}"
    if "libGL" in trial.output:
        found = f"{present[0]} needs the system library libGL, which is absent"
        yield Finding("problem", "OpenCV", found, fix)
    else:
        yield Finding("problem", "OpenCV", f"import cv2 fails: {_last_line(trial.output)}", fix)


def check_rivals(machine: Machine) -> Iterator[Finding]:
    """Pairs of distributions that own the same import name."""
    have = machine.packages
    if "mmengine" in have and "mmengine-lite" in have:
        yield Finding(
            "problem",
            "mmengine",
            "mmengine and mmengine-lite are both installed and own the same files",
            "Run: pip uninstall -y mmengine mmengine-lite && pip install mmengine-lite",
        )
    if "albumentationsx" in have:
        both = "albumentations" in have
        yield Finding(
            "problem" if both else "note",
            "albumentations",
            "albumentationsx (AGPL-3.0) is installed"
            + (" beside albumentations and overwrites it" if both else " under the same name"),
            "Run: pip uninstall -y albumentationsx albumentations && pip install "
            "'albumentations>=2.0.8,<2.1'",
        )


def check_extras(machine: Machine) -> Iterator[Finding]:
    """Optional packages, by what they are for."""
    for extra, purpose in EXTRAS.items():
        wanted = [
            need
            for need in map(Requirement, machine.requirements)
            if need.marker is not None
            and need.marker.evaluate({"extra": extra})
            and canonicalize_name(need.name) != OURS
        ]
        if not wanted:
            continue
        wrong = dict(_unmet(wanted, machine))
        if wrong:
            absent = "; ".join(f"{name} {found}" for name, found in wrong.items())
            advice = f"For {purpose}: pip install '{OURS}[{extra}]'"
            yield Finding("note", f"extra {extra}", absent, advice)
        else:
            yield Finding("ok", f"extra {extra}", _versions(wanted, machine))


def check_room(machine: Machine) -> Iterator[Finding]:
    """Disk and memory."""
    disk = machine.free_disk / GIB
    state: State = "ok" if disk >= 5 else "note" if disk >= 1 else "problem"
    advice = "" if disk >= 5 else "Checkpoints of a ViT-L take 5 GiB each: free some, or use --out."
    yield Finding(state, "free disk", f"{disk:.1f} GiB in this folder", advice)
    if machine.free_memory is None:
        return
    memory = machine.free_memory / GIB
    state = "ok" if memory >= 4 else "note" if memory >= 1 else "problem"
    advice = "" if memory >= 4 else "Lower optim.batch_size and data.memory_gb."
    yield Finding(state, "free memory", f"{memory:.1f} GiB", advice)


def check_threads(machine: Machine) -> Iterator[Finding]:
    """Cores, and settings that waste them."""
    asked = machine.variables.get("OMP_NUM_THREADS", "")
    found = f"{machine.cores:g} usable" + (f", OMP_NUM_THREADS={asked}" if asked else "")
    if asked.isdigit() and int(asked) > machine.cores:
        fewer = f"export OMP_NUM_THREADS={max(1, int(machine.cores))}"
        advice = f"More threads than cores wait for each other: {fewer}"
        yield Finding("note", "cores", found, advice)
    else:
        yield Finding("ok", "cores", found)


def as_table(findings: tuple[Finding, ...]) -> Table:
    """The findings for a person."""
    rows = tuple((f.state, f.what, f.found, f.advice) for f in findings)
    bad = sum(f.state == "problem" for f in findings)
    note = "Ready." if not bad else f"{bad} problem{'s' if bad > 1 else ''} to solve first."
    return Table("dino-adapters doctor", ("", "what", "found", "what to do"), rows, note)


def as_rows(findings: tuple[Finding, ...]) -> list[dict[str, str]]:
    """The findings for a machine."""
    return [asdict(finding) for finding in findings]


def _versions(needs: list[Requirement], machine: Machine) -> str:
    return ", ".join(
        f"{need.name} {machine.packages[canonicalize_name(need.name)]}" for need in needs
    )


def _unmet(needs: list[Requirement], machine: Machine) -> Iterator[tuple[str, str]]:
    for need in needs:
        version = machine.packages.get(canonicalize_name(need.name))
        if version is None:
            yield str(need).split(";")[0].strip(), "absent"
        elif not need.specifier.contains(Version(version), prereleases=True):
            yield str(need).split(";")[0].strip(), f"only {version}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"
