"""A small few-shot table whose answers are known."""

import numpy as np
import pytest

from dino_adapters.data.splits import Split

CLASSES = ("cat", "dog", "owl")


def make_world(seed=0, per_class=30, width=8, noise=0.6):
    """Keys, labels, groups, split, and vectors whose classes are `noise` apart from clean."""
    generator = np.random.default_rng(seed)
    keys, labels, groups = [], {}, {}
    for name in CLASSES:
        for number in range(per_class):
            key = f"{name}/{number:02d}"
            keys.append(key)
            labels[key] = name
            groups[key] = f"{name}-{number // 2}"
    third = per_class // 3 // 2 * 2
    part = {key: int(key[-2:]) // third for key in keys}
    split = Split(
        *(tuple(key for key in keys if min(part[key], 2) == wanted) for wanted in range(3)),
        seed=None,
        rule="by number",
        groups=groups,
    )
    centres = generator.normal(size=(len(CLASSES), width))
    clean = np.stack([centres[CLASSES.index(labels[key])] for key in keys])
    good = (clean + noise * generator.normal(size=clean.shape)).astype(np.float32)
    poor = (clean + 4 * noise * generator.normal(size=clean.shape)).astype(np.float32)
    return keys, labels, groups, split, {"good": good, "poor": poor}


@pytest.fixture
def world():
    return make_world()
