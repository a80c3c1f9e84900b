"""Schedule tables from official settings, by our own functions."""

from typing import Any

from dino_adapters.pretrain.schedules import (
    cosine_table,
    frozen_start,
    linear_rise,
    scaled_rate,
    warmup_cosine,
)

from .case import Settings

RULES: dict[str, Any] = {
    "sqrt_wrt_1024": "sqrt_1024",
    "linear_wrt_256": "linear_256",
    "none": "none",
}
"""Official names of the rules, and ours."""


def at(table: list[float], step: int, *, beyond: float) -> float:
    """Value of a step; the official tables go on with a constant after their end."""
    return table[step] if step < len(table) else beyond


def block_table(
    block: Settings, epoch: int, steps: int, *, batch: int = 1, rule: str = "none"
) -> list[float]:
    """One entry of a `schedules:` block; peak and end are scaled, the start is not."""
    cosine = block.get("cosine_epochs")
    return warmup_cosine(
        steps,
        start=block["start"],
        peak=scaled_rate(block["peak"], batch, RULES[rule]),
        end=scaled_rate(block["end"], batch, RULES[rule]),
        warmup=block["warmup_epochs"] * epoch,
        cosine=None if cosine is None else cosine * epoch,
    )


def block_tables(
    schedules: Settings, epoch: int, steps: int, *, batch: int, rule: str
) -> dict[str, list[float]]:
    """All entries of a `schedules:` block, by our names of the values."""
    lr = block_table(schedules["lr"], epoch, steps, batch=batch, rule=rule)
    return {
        "lr": lr,
        "last_layer_lr": frozen_start(lr, schedules["lr"]["freeze_last_layer_epochs"] * epoch),
        "wd": block_table(schedules["weight_decay"], epoch, steps),
        "momentum": block_table(schedules["momentum"], epoch, steps),
        "teacher_temp": block_table(schedules["teacher_temp"], epoch, steps),
    }


def old_tables(
    optim: Settings, teacher: Settings, epoch: int, *, peak: float
) -> dict[str, tuple[list[float], float]]:
    """The older family: each table, and its value beyond the last step.

    Args:
        optim: official section of the optimiser.
        teacher: official section of the teacher.
        epoch: steps of an epoch.
        peak: the learning rate after scaling.
    """
    steps, extra = optim["epochs"] * epoch, optim["schedule_trunc_extra"]
    low = optim["min_lr"]
    lr = cosine_table(steps, base=peak, end=low, warmup=optim["warmup_epochs"] * epoch, extra=extra)
    cold, warm = teacher["warmup_teacher_temp"], teacher["teacher_temp"]
    momentum = teacher["momentum_teacher"], teacher["final_momentum_teacher"]
    decay = optim["weight_decay"], optim["weight_decay_end"]
    rise = teacher["warmup_teacher_temp_epochs"] * epoch
    return {
        "lr": (lr, low),
        "last_layer_lr": (frozen_start(lr, optim["freeze_last_layer_epochs"] * epoch), low),
        "wd": (cosine_table(steps, base=decay[0], end=decay[1], extra=extra), decay[1]),
        "momentum": (cosine_table(steps, base=momentum[0], end=momentum[1], extra=extra), 1.0),
        "teacher_temp": (linear_rise(rise, steps, cold, warm), warm),
    }
