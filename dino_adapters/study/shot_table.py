"""FewShotTable: what a few-shot comparison found, row by row and draw by draw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from dino_adapters.contracts import DataError, RecipeError, Table
from dino_adapters.measure.intervals import mean_interval
from dino_adapters.runtime.files import write_json
from dino_adapters.study.gain import Gain, gain

Interval = tuple[float, float, float]
_HEAD_WORDS = {"ncm": "Nearest class mean", "knn": "Weighted k-NN", "linear": "Linear probe"}


@dataclass(frozen=True, eq=False)
class FewShotTable:
    """Balanced accuracies of every row, shot count and draw, and what they were measured on.

    Attributes:
        shots: Support images of a class, ascending.
        scores: Row -> shot -> `(draws,)` balanced accuracies in [0, 1]; the draws are the same
            for all rows.
        support: Per draw: shot -> keys of the support images.
        correct: Row -> shot -> bool `(draws, queries)`: which queries were right.
        query_labels: Class of each query.
        query_groups: Group of each query; queries of one group are not independent.
        part: `test` or `val`, the part of the split that the queries are.
        head: Registered name of the head.
        seed: What the draws were made from.
        notes: What a reader must know, in sentences.
    """

    shots: tuple[int, ...]
    scores: Mapping[str, Mapping[int, np.ndarray]]
    support: tuple[Mapping[int, tuple[str, ...]], ...]
    correct: Mapping[str, Mapping[int, np.ndarray]] = field(repr=False)
    query_labels: np.ndarray = field(repr=False)
    query_groups: np.ndarray = field(repr=False)
    part: str = "test"
    head: str = "ncm"
    seed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        """Row names in the order they were given."""
        return tuple(self.scores)

    @property
    def draws(self) -> int:
        """How many sets of support images were drawn."""
        return len(self.support)

    @property
    def chance(self) -> float:
        """Balanced accuracy of guessing: one over the number of classes."""
        return 1.0 / len(set(self.query_labels.tolist()))

    def interval(self, row: str, shot: int) -> Interval:
        """`(mean, low, high)`: Student t, 95 %, over the draws, on these queries."""
        return mean_interval(self._scores(row, shot))

    def mean(self, row: str) -> float:
        """Mean over all shots and draws."""
        return float(np.mean([self._scores(row, shot) for shot in self.shots]))

    def paired(self, row: str, baseline: str) -> Gain:
        """How much `row` is above `baseline`, on the same draws, with intervals: see `Gain`."""
        return gain(
            row,
            baseline,
            {k: (self._scores(row, k), self._scores(baseline, k)) for k in self.shots},
            {k: (self.correct[row][k], self.correct[baseline][k]) for k in self.shots},
            self.query_labels,
            self.query_groups,
            seed=self.seed,
        )

    def table(self, title: str = "Few labels: balanced accuracy in %") -> Table:
        """The rows as text: `mean ± half the 95 % interval`."""
        header = ("", *(f"{k}-shot" for k in self.shots))
        rows = []
        for row in self.rows:
            cells = []
            for shot in self.shots:
                mean, low, high = self.interval(row, shot)
                # One draw has no interval: its ends are the mean itself.
                half = 100 * (high - low) / 2
                cells.append(f"{100 * mean:.1f} ± {half:.1f}" if half else f"{100 * mean:.1f}")
            rows.append((row, *cells))
        classes = len(set(self.query_labels.tolist()))
        note = (
            f"{_HEAD_WORDS.get(self.head, self.head)} on frozen vectors, {classes} classes, "
            f"{len(self.query_labels)} {self.part} images, chance {100 * self.chance:.1f}. Mean ± "
            f"half the 95 % interval over {self.draws} draws of the labelled images, the same "
            "draws for every row."
        )
        return Table(title, header, tuple(rows), " ".join((note, *self.notes)))

    def summary_json(self) -> dict[str, Any]:
        """Means and intervals alone, JSON-safe."""
        names = ("mean", "low", "high")
        return {
            "head": self.head,
            "draws": self.draws,
            "chance": self.chance,
            "rows": {
                row: {
                    str(k): dict(zip(names, self.interval(row, k), strict=True)) for k in self.shots
                }
                for row in self.rows
            },
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, JSON-safe; the answers as one word of 1 (right) and 0 for each draw."""
        return {
            "part": self.part,
            "head": self.head,
            "seed": self.seed,
            "shots": list(self.shots),
            "draws": self.draws,
            "chance": self.chance,
            "notes": list(self.notes),
            "scores": {
                row: {str(k): [float(v) for v in values] for k, values in by_shot.items()}
                for row, by_shot in self.scores.items()
            },
            "support": [{str(k): list(keys) for k, keys in draw.items()} for draw in self.support],
            "query_labels": [str(label) for label in self.query_labels],
            "query_groups": [str(group) for group in self.query_groups],
            "correct": {
                row: {str(k): [_word(draw) for draw in answers] for k, answers in by_shot.items()}
                for row, by_shot in self.correct.items()
            },
        }

    def save(self, path: Path) -> None:
        """Writes scores, draws and answers as JSON, atomically."""
        write_json(path, self.as_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            DataError: the file is absent or of another layout.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                shots=tuple(found["shots"]),
                scores={
                    row: {int(k): np.array(values) for k, values in by_shot.items()}
                    for row, by_shot in found["scores"].items()
                },
                support=tuple(
                    {int(k): tuple(keys) for k, keys in draw.items()} for draw in found["support"]
                ),
                correct={
                    row: {int(k): _answers(words) for k, words in by_shot.items()}
                    for row, by_shot in found["correct"].items()
                },
                query_labels=np.array(found["query_labels"]),
                query_groups=np.array(found["query_groups"]),
                part=found["part"],
                head=found["head"],
                seed=found["seed"],
                notes=tuple(found["notes"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is no few-shot table ({type(error).__name__}: {error}). Evaluate again."
            ) from error

    def _scores(self, row: str, shot: int) -> np.ndarray:
        if row not in self.scores:
            raise RecipeError(f"There is no row '{row}'. There are: {', '.join(self.scores)}.")
        if shot not in self.scores[row]:
            raise RecipeError(f"There is no {shot}-shot column. There are: {self.shots}.")
        return self.scores[row][shot]


def _word(right: np.ndarray) -> str:
    return "".join("1" if one else "0" for one in right)


def _answers(words: Sequence[str]) -> np.ndarray:
    return np.array([[letter == "1" for letter in word] for word in words])
