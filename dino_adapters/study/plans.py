"""The two short runs of `start`: a small ViT from nothing, and a given network continued.

They are recipes like any other, written for minutes on a CPU: short schedules, few and small crops,
prototypes of unit length (at DINOv3's own start they stay near uniform for thousands of steps).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dino_adapters.contracts import BackboneInfo
from dino_adapters.recipes.data import DataRecipe
from dino_adapters.recipes.pretrain import PretrainRecipe

SCRATCH = "vitmicro8"
SCRATCH_STEPS, CONTINUE_STEPS = 400, 180
# Blur and solarise, made for objects of 224 px, remove the textures that small crops consist of.
MILD: dict[str, Any] = {"blur": (0.0, 0.2, 0.1), "blur_sigma": (0.1, 1.0), "solarize": 0.1}

# Few and short, as these runs take minutes.
LOOKS: dict[str, Any] = {"every": 0.25, "images": 64}


def scratch_plan(
    data: DataRecipe, split: Path | None, *, side: int, steps: int, seed: int
) -> PretrainRecipe:
    """A micro ViT from random weights with DINO, iBOT and KoLeo.

    Args:
        data: the images.
        split: file whose training part is used; None takes all.
        side: usual shorter side of the images in pixels; crops are fitted to it.
        steps: length of the run.
        seed: of everything.
    """
    return PretrainRecipe.model_validate(
        {
            "data": data.model_dump(),
            "split": None if split is None else str(split),
            "model": {"source": SCRATCH},
            "crops": {"global_size": 48 if side < 160 else 64, "local_size": 24, **MILD},
            "objective": {"prototype_norm": 1.0},
            "optim": {"lr": 3e-3, "layer_decay": 1.0, "weight_decay": (0.04, 0.1)},
            "checkpoint": {"snapshots": 2},
            "monitor": LOOKS,
            "steps": steps,
            "seed": seed,
        }
    )


def continue_plan(
    data: DataRecipe,
    split: Path | None,
    source: str,
    info: BackboneInfo,
    *,
    side: int,
    steps: int,
    seed: int,
) -> PretrainRecipe:
    """A trained network continued on the user's images; without iBOT if it has no mask token.

    Args:
        data: the images.
        split: file whose training part is used; None takes all.
        source: what `load_backbone` opens.
        info: its card.
        side: usual shorter side of the images in pixels.
        steps: length of the run.
        seed: of everything.
    """
    global_size, local_size = continue_sizes(info.patch_size, side)
    return PretrainRecipe.model_validate(
        {
            "data": data.model_dump(),
            "split": None if split is None else str(split),
            "model": {"source": source},
            "crops": {
                "global_size": global_size,
                "local_size": local_size,
                "local_count": 2,
                "local_scale": (0.2, 0.6),
                "jitter": 0.4,
                "grayscale": 0.0,
                **MILD,
            },
            "objective": {"prototype_norm": 1.0, "teacher_temperature": (0.06, 0.06)},
            "optim": {"lr": 1e-3, "weight_decay": (0.04, 0.04)},
            "schedule": {"momentum": (0.996, 1.0)},
            "checkpoint": {"every_steps": 50, "snapshots": 2},
            "monitor": LOOKS,
            "steps": steps,
            "seed": seed,
        }
    )


def continue_sizes(patch_size: int, side: int) -> tuple[int, int]:
    """Global and local crop sizes: about 96 px (128 for larger images) and half of it."""
    wanted = 96 if side < 160 else 128
    global_size = max(round(wanted / patch_size), 2) * patch_size
    return global_size, max(round(global_size / 2 / patch_size), 1) * patch_size
