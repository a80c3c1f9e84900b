"""What a finished run has to say: the report of a pretraining run, and of a task run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_adapters.backbones.card import exports_below
from dino_adapters.contracts import DataError, Figure, Metric, Report, Table
from dino_adapters.pretrain.gate import GATE
from dino_adapters.pretrain.rows import steps_of
from dino_adapters.runtime.console import duration
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study.figures import loss_curves, shot_chart
from dino_adapters.study.shot_table import FewShotTable
from dino_adapters.study.watched import by_student, verdict, watched

EVALUATION = "evaluation.json"
FEWSHOT = "fewshot.json"
_WORDS = {
    "lr": "learning rate",
    "dino_global": "DINO, global crops",
    "dino_local": "DINO, local crops",
    "ibot": "iBOT",
    "koleo": "KoLeo",
    "kde": "KDE",
    "sigreg": "SIGReg",
    "gram": "Gram",
    "anchor": "anchor, class tokens",
    "cls": "class token",
    "patches": "patch tokens",
    "images": "images seen",
}


def run_report(folder: RunFolder) -> Report:
    """The report of whatever run the folder holds.

    Raises:
        DataError: there is no run, it is of another kind, or it has nothing to show yet.
        MissingLibraryError: matplotlib is absent.
    """
    if not folder.holds_a_run:
        raise DataError(
            f"{folder.path} holds no run. Give the folder that pretrain, fit or evaluate wrote to "
            "with --out."
        )
    recipe = _read(folder.recipe_file)
    if recipe.get("phases"):
        return phases_report(folder, recipe)
    if "steps" in recipe:
        return pretrain_report(folder, recipe)
    if "backbone" in recipe:
        return task_report(folder, recipe)
    raise DataError(
        f"{folder.path} holds a run of another kind; its page, if it has one, is "
        f"{folder.report / 'index.html'}."
    )


def pretrain_report(folder: RunFolder, recipe: Mapping[str, Any]) -> Report:
    """Loss curves, what the looks saw, and what the run was told.

    Raises:
        DataError: fewer than two rows were noted, or the gate's verdict cannot be read.
    """
    rows = folder.rows()
    noted = steps_of(rows)
    distill = recipe.get("distill")
    name = ", ".join(distill["students"]) if distill else recipe["model"]["source"]
    figure = loss_curves({name: noted})
    last = noted[-1]
    seen = watched(folder, recipe, rows)
    steps = int(last["step"]) + 1
    said = (
        f"{name} learned without labels for {steps:,} of {recipe['steps']:,} steps: "
        f"{last['images']:,} images seen in {duration(last['seconds'])}."
    )
    if folder.export.is_dir():
        after = delivered(folder)
    else:
        after = "The run has not ended: continue it with --resume."
    return Report(
        title=f"Pretraining {name}",
        summary=(*verdict(folder), said, after, *seen.alarms),
        tables=(*seen.tables, _last_numbers({"value": last})),
        figures=(figure, *seen.figures),
        notes=seen.notes,
        provenance=provenance(folder, recipe, "pretrain"),
    )


def phases_report(folder: RunFolder, recipe: Mapping[str, Any]) -> Report:
    """A run of several phases: curves of all of them, each one's last numbers, and its looks.

    Raises:
        DataError: no phase has noted two rows yet, or a verdict cannot be read.
    """
    names = [phase["name"] for phase in recipe["phases"]]
    curves: dict[str, list[dict[str, Any]]] = {}
    last: dict[str, Mapping[str, Any]] = {}
    ended, said, seen = [], list(verdict(folder)), []
    for name, part in folder.phases.items():
        rows = part.rows()
        noted = steps_of(rows)
        if not noted:
            continue
        curves |= by_student(name, noted)
        last[name] = noted[-1]
        seen.append(watched(part, _read(part.recipe_file), rows, name=name))
        said += [f"{name}: {sentence}" for sentence in verdict(part)]
        if part.export.is_dir():
            ended.append(name)
    left = [name for name in names if name not in ended]
    after = (
        f"Not done yet: {', '.join(left)}. Continue with --resume." if left else delivered(folder)
    )
    return Report(
        title=f"Pretraining in {len(names)} phases",
        summary=(
            *said,
            f"{len(ended)} of {len(names)} phases done: {', '.join(ended) or 'none'}. Losses of "
            "different phases have different terms and weights.",
            after,
            *(alarm for s in seen for alarm in s.alarms),
        ),
        tables=(*(t for s in seen for t in s.tables), *([_last_numbers(last)] if last else [])),
        figures=(loss_curves(curves), *(figure for s in seen for figure in s.figures)),
        notes=tuple(note for s in seen for note in s.notes),
        provenance=provenance(folder, recipe, "pretrain"),
    )


def delivered(folder: RunFolder) -> str:
    """Where the backbones are, in a sentence."""
    if students := exports_below(folder.export):
        named = ", ".join(f"export/{path.name}" for path in students)
        return f"The frozen backbones are in {named}; load_backbone opens each."
    if (folder.path / GATE).exists():
        return "load_backbone opens the folder export."
    last = " of the last phase" if folder.phases else ""
    return f"The frozen backbone{last} is in the folder export; load_backbone opens it."


def task_report(folder: RunFolder, recipe: Mapping[str, Any]) -> Report:
    """Test metrics with intervals, and the few-shot table where there is one.

    Raises:
        DataError: `evaluate` has not run.
    """
    path = folder.path / EVALUATION
    if not path.exists():
        raise DataError(f"{folder.path} holds no {EVALUATION}. Run `dino-adapters evaluate` first.")
    found = _read(path)
    metrics = tuple(Metric(**metric) for metric in found["metrics"])
    tables: list[Table] = [metric_table(metrics)]
    figures: list[Figure] = []
    summary = [headline(found["backbone"]["name"], recipe["head"], metrics)]
    if (folder.path / FEWSHOT).exists():
        shots = FewShotTable.load(folder.path / FEWSHOT)
        tables.append(shots.table())
        figures.append(shot_chart(shots))
        summary += [text for text in found.get("comparisons", ())]
    return Report(
        title=f"{found['backbone']['name']} on {Path(recipe['data']['source']).name}",
        summary=tuple(summary),
        tables=tuple(tables),
        figures=tuple(figures),
        notes=tuple(found.get("notes", ())),
        provenance=provenance(folder, recipe, "evaluate")
        | {"backbone": found["backbone"], "split": found["split"]},
    )


def headline(backbone: str, head: str, metrics: tuple[Metric, ...]) -> str:
    """The balanced accuracy in a sentence."""
    best = next(metric for metric in metrics if metric.name == "balanced_accuracy")
    return (
        f"{backbone} with the head '{head}' reaches {100 * best.value:.1f} % balanced accuracy on "
        f"the {best.split} images (95 % interval {100 * best.low:.1f} to {100 * best.high:.1f}, "
        f"over {best.count} {best.unit})."
    )


def metric_table(metrics: tuple[Metric, ...]) -> Table:
    """Metrics in percent with their intervals."""
    rows = tuple(
        (
            _spoken(metric.name),
            f"{100 * metric.value:.1f}",
            f"{100 * metric.low:.1f} to {100 * metric.high:.1f}",
            f"{metric.count} {metric.unit}",
        )
        for metric in metrics
    )
    unit = metrics[0].unit if metrics else "images"
    return Table(
        f"On the {metrics[0].split if metrics else 'test'} images, in %",
        ("", "value", "95 % interval", "from"),
        rows,
        f"Intervals: bootstrap over {unit}. They cover other {unit} of the same kind, and not "
        "another training of the head.",
    )


def _spoken(name: str) -> str:
    if name.startswith("recall/"):
        return f"recall of {name.removeprefix('recall/')}"
    return name.replace("_", " ").replace("f1", "F1")


def provenance(folder: RunFolder, recipe: Mapping[str, Any], verb: str) -> dict[str, Any]:
    """How to get the same again: the command, the machine, and the whole recipe."""
    path = folder.path / "overrides.txt"
    overrides = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    environment = folder.path / "environment.json"
    return {
        # The resolved recipe is a recipe file itself, so this repeats the run exactly.
        "command": f"dino-adapters {verb} {folder.recipe_file} --out runs/again",
        "overrides given": " ".join(overrides) or "none",
        "environment": _read(environment) if environment.exists() else "not recorded",
        "recipe": dict(recipe),
    }


def _last_numbers(noted: Mapping[str, Mapping[str, Any]]) -> Table:
    """The last row of each column's `metrics.jsonl`, side by side."""
    keys = [
        key
        for key in dict.fromkeys(key for row in noted.values() for key in row)
        if any(isinstance(row.get(key), int | float) for row in noted.values())
    ]
    rows = tuple(
        (term_in_words(key), *(_number(row.get(key)) for row in noted.values())) for key in keys
    )
    return Table("The last numbers noted", ("", *noted), rows)


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def term_in_words(key: str) -> str:
    """A key of `metrics.jsonl` for people; `STUDENT/TERM` keeps its student."""
    student, slash, term = key.rpartition("/")
    return student + slash.replace("/", ": ") + _WORDS.get(term, term.replace("_", " "))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Run this again.") from error
