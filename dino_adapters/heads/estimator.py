"""What heads on vectors share: checked input, class scores, and files without pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from dino_adapters.contracts import ClassScores, NotFittedError, ShapeError, WeightsError
from dino_adapters.measure.metrics import Labels
from dino_adapters.runtime.files import atomic, file_digest, write_json
from dino_adapters.runtime.lookup import HEADS, find

CARD = "head.json"
ARRAYS = "head.safetensors"
FORMAT = 1
_validate: Any = validate_data  # its inferred types say that arrays are strings


class HeadNotFittedError(NotFittedError, SklearnNotFittedError):
    """Both this package's error and the one that scikit-learn's tools look for."""


class VectorHead(ClassifierMixin, BaseEstimator):
    """A scikit-learn classifier of vectors `(n, D)`.

    A subclass gives `fit` and `class_scores`, and lists what `fit` learns: `arrays` (saved as
    safetensors) and `facts` (saved as JSON).
    """

    arrays: ClassVar[tuple[str, ...]] = ()
    facts: ClassVar[tuple[str, ...]] = ()
    classes_: np.ndarray
    n_features_in_: int

    def class_scores(self, X: np.ndarray) -> np.ndarray:
        """Scores `(n, K)` of checked float vectors; the largest is the prediction."""
        raise NotImplementedError

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Classes `(n,)` of vectors `(n, D)`; equal scores go to the class that sorts first.

        Raises:
            HeadNotFittedError: `fit` comes first.
        """
        scores = self._scores_of(X)
        return self.classes_[scores.argmax(axis=1)]

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Scores `(n, K)`; for two classes `(n,)`, positive for the second (sklearn's rule)."""
        scores = self._scores_of(X)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Probabilities `(n, K)`: rows sum to 1."""
        return softmax(self._scores_of(X))

    def predict_scores(self, X: np.ndarray, keys: Sequence[str] = ()) -> ClassScores:
        """`predict_proba` with the names of the images and classes.

        Raises:
            ShapeError: there are keys, and not one per row.
        """
        scores = self.predict_proba(X)
        if keys and len(keys) != len(scores):
            raise ShapeError(
                f"There are {len(keys)} keys and {len(scores)} vectors. Give one each."
            )
        return ClassScores(scores, tuple(keys), tuple(str(name) for name in self.classes_))

    def save(self, folder: Path, *, backbone_digest: str = "") -> Path:
        """Writes `head.safetensors` and then `head.json`, which makes the folder complete.

        Args:
            folder: Made if absent; a head that stands there is replaced.
            backbone_digest: `FeatureSpec.backbone_digest` of the vectors it was fitted on.

        Raises:
            HeadNotFittedError: `fit` comes first.
        """
        self._check_fitted()
        texts = self.classes_.dtype.kind not in "biuf"
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in self.arrays}
        parameters = {}
        for name, value in self.get_params(deep=False).items():
            if isinstance(value, np.ndarray):
                tensors[f"parameter.{name}"] = np.ascontiguousarray(value)
            else:
                parameters[name] = value
        if not texts:
            tensors["classes_"] = self.classes_
        with atomic(folder / ARRAYS) as temporary:
            save_file(tensors, temporary)
        card = {
            "format": FORMAT,
            "head": registered_name(type(self)),
            "backbone_digest": backbone_digest,
            "width": self.n_features_in_,
            "parameters": parameters,
            "classes": self.classes_.tolist() if texts else None,
            "facts": {name: _plain(getattr(self, name)) for name in self.facts},
            "arrays_digest": file_digest(folder / ARRAYS),
        }
        write_json(folder / CARD, card)
        return folder

    @classmethod
    def load(cls, folder: Path, *, backbone_digest: str = "") -> Self:
        """Reads what `save` wrote.

        Args:
            folder: Holds `head.json`.
            backbone_digest: Digest of the backbone it will be used with; empty skips the check.

        Raises:
            WeightsError: no head, another kind of head, a damaged one, or one that was fitted on
                another backbone's vectors.
        """
        card = read_card(folder)
        if card["head"] != registered_name(cls):
            raise WeightsError(
                f"{folder} holds a head '{card['head']}', not '{registered_name(cls)}'. Use "
                "heads.load_head, which reads any."
            )
        fitted_on = card["backbone_digest"]
        if backbone_digest and fitted_on and backbone_digest != fitted_on:
            raise WeightsError(
                f"{folder} was fitted on vectors of the backbone {fitted_on}, and this one is "
                f"{backbone_digest}. Load the backbone it was fitted on, or fit it again."
            )
        try:
            tensors = load_file(folder / ARRAYS)
        except (OSError, SafetensorError) as error:
            raise WeightsError(
                f"{folder / ARRAYS} cannot be read ({error}). Save it again."
            ) from error
        if file_digest(folder / ARRAYS) != card["arrays_digest"]:
            raise WeightsError(
                f"{folder / ARRAYS} and {CARD} are not of the same head: saving was interrupted. "
                "Save it again."
            )
        prefix = "parameter."
        given = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in card["parameters"].items()}
        head = cls(**lists, **given)
        head.n_features_in_ = card["width"]
        texts = card["classes"]
        head.classes_ = tensors["classes_"] if texts is None else np.array(texts)
        for name in cls.arrays:
            setattr(head, name, tensors[name])
        for name, value in card["facts"].items():
            setattr(head, name, value)
        return head

    def _checked(self, X: np.ndarray, y: Labels) -> tuple[np.ndarray, np.ndarray]:
        """Vectors as float64 or float32, class numbers; sets `classes_` and `n_features_in_`."""
        X, truth = _validate(self, X, y, dtype=[np.float64, np.float32])
        with warnings.catch_warnings():
            # One image a class is what few-shot means, and no sign of a regression problem.
            warnings.filterwarnings("ignore", message="The number of unique classes is greater")
            check_classification_targets(truth)
        self.classes_, codes = np.unique(truth, return_inverse=True)
        return X, codes

    def _scores_of(self, X: np.ndarray) -> np.ndarray:
        self._check_fitted()
        return self.class_scores(_validate(self, X, reset=False, dtype=[np.float64, np.float32]))

    def _check_fitted(self) -> None:
        if not hasattr(self, "classes_"):
            raise HeadNotFittedError(
                f"This {type(self).__name__} has learned nothing yet. Call fit(X, y) first."
            )


def load_head(folder: Path, *, backbone_digest: str = "") -> VectorHead:
    """Reads any registered head from its folder; see `VectorHead.load`.

    Raises:
        WeightsError: there is no readable head.
        UnknownNameError: it is of a kind that nobody registered here.
    """
    kind = find(HEADS, read_card(folder)["head"])
    return kind.load(folder, backbone_digest=backbone_digest)


def read_card(folder: Path) -> dict[str, Any]:
    """`head.json` of a saved head.

    Raises:
        WeightsError: it is absent or of another format.
    """
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise WeightsError(
            f"{folder} holds no saved head: {CARD} cannot be read ({error})."
        ) from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise WeightsError(f"{path} is not of format {FORMAT}, which this version reads.")
    return card


def registered_name(kind: type) -> str:
    """Name of a class in HEADS; the class's own name if it is not registered."""
    names = [name for name, known in HEADS.module_dict.items() if known is kind]
    return names[0] if names else kind.__name__


def softmax(scores: np.ndarray) -> np.ndarray:
    """Rows `(n, K)` to probabilities."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _plain(value: Any) -> Any:
    """Turns numpy scalars into Python's; JSON knows no others."""
    return value.item() if isinstance(value, np.generic) else value
