"""One labelled task on a frozen backbone: embed, fit, and judge on images nothing was chosen on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dino_adapters.contracts import DataError, Metric, RunFolderError
from dino_adapters.data.splits import PARTS, write_split
from dino_adapters.features.baselines import image_statistics, raw_pixels
from dino_adapters.heads import VectorHead, load_head
from dino_adapters.measure.metrics import balanced_accuracy, classification_metrics
from dino_adapters.recipes.task import TaskRecipe
from dino_adapters.runtime.files import write_json
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study.fewshot import evaluate_shots
from dino_adapters.study.material import SPLIT, Task, make_head, open_task
from dino_adapters.study.runs import EVALUATION, FEWSHOT
from dino_adapters.study.shot_table import FewShotTable

FITTED = "fit.json"


@dataclass(frozen=True, eq=False)
class Fitted:
    """A head, and how it came to be.

    Attributes:
        head: Fitted on the training part.
        size: Reading size in pixels, the best on validation where several were given.
        validation: Reading size -> balanced accuracy on validation; empty without such images.
        facts: What `fit.json` holds.
    """

    head: VectorHead
    size: int
    validation: Mapping[int, float]
    facts: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the test images say.

    Attributes:
        metrics: With 95 % intervals over test groups, or images where no groups are known.
        shots: Few-shot accuracies beside simple floors; None where the recipe asks for none.
        comparisons: Sentences on paired differences.
        notes: What was skipped or assumed.
    """

    metrics: tuple[Metric, ...]
    shots: FewShotTable | None
    comparisons: tuple[str, ...]
    notes: tuple[str, ...]


def fit_task(
    recipe: TaskRecipe,
    folder: RunFolder,
    *,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Fitted:
    """Embeds the images, fits the head on the training part, and saves it.

    The head's strength, where it has one to choose, and the reading size, where several are given,
    are chosen on the validation part. Writes `split.json`, `features/`, `head/` and `fit.json`.
    With `overwrite` a run that stands in the folder is replaced, once nothing is left to refuse.

    Raises:
        RunFolderError: the folder holds a run, or what would replace it is read from inside it.
        DataError, WeightsError, RecipeError: something does not fit.
    """
    with folder.lock():
        if overwrite:
            _check_inputs_stay(recipe, folder)
        elif folder.holds_a_run:
            folder.begin({}, resumable=False)  # raises, and says what to do
        task = open_task(recipe, folder, afresh=True, quiet=quiet)
        if overwrite:
            folder.empty()
        folder.begin(recipe.model_dump(mode="json"), overrides, resumable=False)
        write_split(folder.path / SPLIT, task.split)
        return _fit(task)


def evaluate_task(
    recipe: TaskRecipe,
    folder: RunFolder,
    *,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Evaluation:
    """Judges the run's head on the test part, and few labels beside simple floors.

    Fits first where the folder is new, or with `overwrite`. Writes `evaluation.json`,
    `fewshot.json` and a row a metric to `metrics.jsonl`; vectors that are there already are not
    computed again.

    Raises:
        RunFolderError: the folder holds a run of another recipe.
        DataError, WeightsError, RecipeError: something does not fit.
    """
    if overwrite or not folder.holds_a_run:
        fit_task(recipe, folder, overwrite=overwrite, overrides=overrides, quiet=quiet)
    with folder.lock():
        check_same(recipe, folder)
        task = open_task(recipe, folder, quiet=quiet)
        fitted = _load(task) if (folder.path / FITTED).exists() else _fit(task)
        found = task.vectors(fitted.size)
        metrics = _judge(task, fitted, found)
        shots, comparisons = _few(task, found) if recipe.shots else (None, ())
        done = Evaluation(metrics, shots, comparisons, task.notices.summary())
        if shots is not None:
            shots.save(folder.path / FEWSHOT)
        content = {
            "backbone": fitted.facts["backbone"],
            "size": fitted.size,
            "split": fitted.facts["split"],
            "metrics": [asdict(metric) for metric in metrics],
            "comparisons": list(comparisons),
            "notes": list(done.notes),
        }
        write_json(folder.path / EVALUATION, content)
        for metric in metrics:
            folder.note(asdict(metric))
        return done


def check_same(recipe: TaskRecipe, folder: RunFolder) -> None:
    """Refuses to go on with a run that was told something else.

    Raises:
        RunFolderError: the message names the settings that differ.
    """
    held = json.loads(folder.recipe_file.read_text(encoding="utf-8"))
    given = recipe.model_dump(mode="json")
    if held != given:
        names = sorted(n for n in {*held, *given} if held.get(n) != given.get(n))
        raise RunFolderError(
            f"{folder.path} holds a run of another recipe (other: {', '.join(names)}). Name "
            "another folder with --out, or replace it with --overwrite."
        )


def _check_inputs_stay(recipe: TaskRecipe, folder: RunFolder) -> None:
    """Refuses to replace a run by one that reads from it, e.g. its exported backbone."""
    inside = folder.path.resolve()
    read = {
        "data.source": recipe.data.source,
        "data.labels": recipe.data.labels,
        "split": recipe.split,
        "backbone": recipe.backbone,
    }
    for name, value in read.items():
        path = Path(value or "")
        if value and path.exists() and path.resolve().is_relative_to(inside):
            raise RunFolderError(
                f"{name} is {value}, which --overwrite would remove with {folder.path}. Name "
                "another folder with --out."
            )


def _fit(task: Task) -> Fitted:
    best: tuple[float, VectorHead, int] | None = None
    validation: dict[int, float] = {}
    for size in sorted(task.sizes):
        found = task.vectors(size)
        head, score = _fit_at(task, found)
        if score is not None:
            validation[size] = score
        elif len(task.sizes) > 1:
            raise DataError(
                "There are no validation images to choose among several sizes by. Set one size, "
                "or give the split a part 'val'."
            )
        # Equal scores: the smaller size, which is the cheaper one.
        if best is None or (score or 0.0) > best[0]:
            best = (score or 0.0, head, size)
    assert best is not None, "sizes are never empty"
    _, head, size = best
    info = task.backbone.info
    head.save(task.folder.path / "head", backbone_digest=info.digest)
    facts: dict[str, Any] = {
        "head": task.recipe.head,
        "learned": {name: getattr(head, name) for name in type(head).facts},
        "size": size,
        "validation": {str(key): value for key, value in validation.items()},
        "backbone": {
            "name": info.name,
            "digest": info.digest,
            "licence": info.licence,
            "embed_dim": info.embed_dim,
        },
        "split": {
            "rule": task.split.rule,
            "digest": task.split.digest,
            **{part: len(getattr(task.split, part)) for part in PARTS},
        },
        "notices": list(task.notices.summary()),
    }
    write_json(task.folder.path / FITTED, facts, default=str)
    return Fitted(head, size, validation, facts)


def _fit_at(task: Task, found: Mapping[str, np.ndarray]) -> tuple[VectorHead, float | None]:
    train = [key for key in task.split.train if key in found]
    y = task.labels(train)
    known = set(y.tolist())
    # A class without training images cannot help to choose a strength; it counts in the test.
    val = [k for k in task.split.val if k in found and task.source.labels[k] in known]
    head = make_head(task.recipe)
    options: dict[str, Any] = {}
    takes = inspect.signature(head.fit).parameters
    if val and "X_val" in takes:
        options = {"X_val": np.stack([found[k] for k in val]), "y_val": task.labels(val)}
    elif "groups" in takes:
        groups = task.groups
        options = {"groups": [groups.get(key, key) for key in train]}
    head.fit(np.stack([found[key] for key in train]), y, **options)
    if not val:
        return head, None
    answers = head.predict(np.stack([found[key] for key in val]))
    return head, balanced_accuracy(task.labels(val), answers)


def _load(task: Task) -> Fitted:
    facts = json.loads((task.folder.path / FITTED).read_text(encoding="utf-8"))
    head = load_head(task.folder.path / "head", backbone_digest=task.backbone.info.digest)
    scores = {int(size): value for size, value in facts["validation"].items()}
    return Fitted(head, facts["size"], scores, facts)


def _judge(task: Task, fitted: Fitted, found: Mapping[str, np.ndarray]) -> tuple[Metric, ...]:
    test = [key for key in task.split.test if key in found]
    if not test:
        raise DataError("No test image could be read, so there is nothing to judge.")
    answers = fitted.head.predict(np.stack([found[key] for key in test]))
    groups = task.groups
    named = [groups.get(key, key) for key in test] if groups else None
    return classification_metrics(task.labels(test), answers, named, seed=task.recipe.seed)


def _few(task: Task, found: Mapping[str, np.ndarray]) -> tuple[FewShotTable, tuple[str, ...]]:
    """Few-shot accuracies of the backbone, and of two floors that need no network."""
    keys = list(found)
    here = {part: tuple(k for k in getattr(task.split, part) if k in found) for part in PARTS}
    network, floor = task.backbone.info.name, "image statistics"
    table = evaluate_shots(
        {
            "raw pixels": raw_pixels(task.source, keys),
            floor: image_statistics(task.source, keys),
            network: np.stack([found[key] for key in keys]),
        },
        keys,
        task.source.labels,
        task.groups,
        replace(task.split, digest="", **here),
        shots=task.recipe.shots,
        draws=task.recipe.draws,
        seed=task.recipe.seed,
        head=task.recipe.head,
        head_options=task.recipe.head_options,
        standardised=(floor,),
    )
    return table, (table.paired(network, floor).sentence(),)
