"""One reader for each kind of golden case: it reads all of a case and checks every result.

A new reader is a file here with `read(case)`, and a line in `READERS`.
"""

from collections.abc import Callable

from ..case import Case
from . import (
    convnext,
    head,
    losses,
    losses_distributed,
    masks,
    param_groups,
    rope,
    schedules,
    step,
    trajectory,
    vit,
    vit_train_draws,
)

READERS: dict[str, Callable[[Case], None]] = {
    "convnext": convnext.read,
    "head": head.read,
    "losses": losses.read,
    "losses_distributed": losses_distributed.read,
    "masks": masks.read,
    "param_groups": param_groups.read,
    "rope": rope.read,
    "schedules": schedules.read,
    "step": step.read,
    "trajectory": trajectory.read,
    "vit": vit.read,
    "vit_train_draws": vit_train_draws.read,
}
