"""Numbers from arrays: metrics, and the intervals around them."""

from dino_adapters.measure.intervals import (
    bootstrap,
    mean_interval,
    paired_bootstrap,
    paired_interval,
    units_of,
)
from dino_adapters.measure.metrics import (
    accuracy,
    balanced_accuracy,
    classification_metrics,
    confusion,
    macro_f1,
    per_class_f1,
    per_class_recall,
)
from dino_adapters.measure.segmentation import mean_iou

__all__ = [
    "accuracy",
    "balanced_accuracy",
    "bootstrap",
    "classification_metrics",
    "confusion",
    "macro_f1",
    "mean_interval",
    "mean_iou",
    "paired_bootstrap",
    "paired_interval",
    "per_class_f1",
    "per_class_recall",
    "units_of",
]
