"""Labels from vectors: three scikit-learn classifiers, and their files."""

from dino_adapters.heads.centroid import NearestMean, class_means
from dino_adapters.heads.estimator import HeadNotFittedError, VectorHead, load_head
from dino_adapters.heads.knn import WeightedKNN
from dino_adapters.heads.linear import LinearProbe

__all__ = [
    "HeadNotFittedError",
    "LinearProbe",
    "NearestMean",
    "VectorHead",
    "WeightedKNN",
    "class_means",
    "load_head",
]
