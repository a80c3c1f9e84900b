"""The page of `start`: what was found, in sentences, tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dino_adapters.backbones import FrozenBackbone
from dino_adapters.contracts import Figure, Report, Sample, Table, UnreadableFileError
from dino_adapters.data.resize import to_square
from dino_adapters.data.units import to_model, to_range
from dino_adapters.features.neighbours import nearest
from dino_adapters.runtime.console import Notices, duration
from dino_adapters.runtime.runfolder import RunFolder, environment
from dino_adapters.study.figures import accuracy_over_time, loss_curves, shot_chart
from dino_adapters.study.gain import Gain
from dino_adapters.study.pictures import (
    Neighbours,
    attention_maps,
    neighbour_strips,
    pca_pictures,
)
from dino_adapters.study.reading import Bench, Reading
from dino_adapters.study.setting import Setting
from dino_adapters.study.shot_table import FewShotTable

if TYPE_CHECKING:
    from dino_adapters.study.trained import Names

PICTURES, QUERIES, FOUND = 6, 4, 5
LOOKS = 300  # images looked at to choose the pictures
PICTURE_SIDE = 224  # maps are drawn from images of about this many pixels
Curve = Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Page:
    """Collects what `start` finds, and writes it as a `Report`."""

    setting: Setting
    names: Names
    runs: Mapping[str, RunFolder]
    told: Mapping[str, Any]
    notices: Notices
    networks: Mapping[str, FrozenBackbone]
    table: FewShotTable | None = None
    gains: tuple[Gain, ...] = ()
    readings: Mapping[str, Reading] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    bench: Bench | None = None

    def with_results(
        self,
        table: FewShotTable,
        gains: Sequence[Gain],
        readings: Mapping[str, Reading],
        curves: Mapping[str, Curve],
        bench: Bench,
    ) -> Page:
        """The page with what was measured on labelled images."""
        return replace(
            self,
            table=table,
            gains=tuple(gains),
            readings=readings,
            curves=curves,
            bench=bench,
        )

    def report(self, *, seconds: float) -> Report:
        """Everything, in the order a reader asks: did it help, by how much, how does it look."""
        tables: tuple[Table, ...] = ()
        figures: list[Figure] = []
        if self.table is not None:
            tables = (self.table.table(), self._sizes())
            floors = {
                name: float(np.mean(self.table.scores[name][max(self.table.shots)]))
                for name in (self.names.statistics, self.names.frozen)
            }
            figures += [
                shot_chart(self.table),
                accuracy_over_time(
                    self.curves,
                    floors=floors,
                    title=f"{max(self.table.shots)}-shot accuracy while training",
                ),
            ]
        figures.append(
            loss_curves({name: run.rows_with("loss") for name, run in self.runs.items()})
        )
        figures += self._pictures()
        return Report(
            title="Does pretraining on these images help?",
            summary=self._summary(),
            tables=tables,
            figures=tuple(figures),
            notes=(self.setting.words, *self.notices.summary()),
            provenance={
                "command": command(self.told),
                "seed": self.told["seed"],
                "whole time": duration(seconds),
                **{f"training: {name}": self._training(run) for name, run in self.runs.items()},
                **environment(),
            },
        )

    def _summary(self) -> tuple[str, ...]:
        if not self.gains:
            return (
                "Without labels nothing can be said about accuracy: the pictures show what the "
                "networks see. Give --labels a CSV with path and label for some images of each "
                "class.",
            )
        *_, last = self.gains
        if last.helps:
            verdict = "Pretraining on these images helped."
        elif last.hurts:
            verdict = "Continuing on these images made the network worse."
        else:
            verdict = "Whether continuing on these images helps cannot be told from these tests."
        better = self.readings[last.row if last.helps else last.baseline]
        where = str(self.runs[last.row].export) if last.helps else self.told["weights"]
        use = f"Use: {where}, read at {better.size} px."
        return (verdict, *(gain.sentence() for gain in reversed(self.gains)), use)

    def _training(self, run: RunFolder) -> str:
        last = run.rows_with("loss")[-1]
        rate = last["images"] / max(last["seconds"], 1e-9)
        return (
            f"{last['step'] + 1} steps, {last['images']} images in {duration(last['seconds'])} "
            f"({rate:.0f} images/s)"
        )

    def _sizes(self) -> Table:
        sizes = sorted({size for reading in self.readings.values() for size in reading.scores})
        rows = tuple(
            (
                name,
                *(f"{100 * reading.scores[s]:.1f}" if s in reading.scores else "" for s in sizes),
                f"{reading.size} px",
            )
            for name, reading in self.readings.items()
        )
        return Table(
            "Every network is read at the size that suits it best",
            ("", *(f"{size} px" for size in sizes), "read at"),
            rows,
            "Balanced accuracy in % on validation images, mean over shots; a network judged at a "
            "size that does not suit it would flatter the other.",
        )

    def _pictures(self) -> list[Figure]:
        shown = self._examples()
        if not shown:
            return []
        images = [picture(sample) for sample in shown]
        tokens, attention = {}, {}
        for name, backbone in self.networks.items():
            batch = torch.stack([self._model_input(sample, backbone) for sample in shown])
            features = backbone(batch)
            maps = features.patches.unflatten(1, features.grid)
            tokens[name] = maps.float().cpu().numpy()
            weights = backbone.cls_attention(batch)
            if weights is not None:
                heads = weights.mean(dim=1).unflatten(1, features.grid)
                attention[name] = heads.float().cpu().numpy()
        figures = [pca_pictures(images, tokens)]
        if attention:
            figures.append(attention_maps(images, attention))
        if self.bench is not None:
            figures.append(self._neighbours(self.bench))
        return figures

    def _model_input(self, sample: Sample, backbone: FrozenBackbone) -> torch.Tensor:
        info = backbone.info
        side = max(1, round(PICTURE_SIDE / info.patch_size)) * info.patch_size
        return to_square(to_model(sample, info), side).to(backbone.device)

    def _examples(self) -> list[Sample]:
        """The image with most contrast of each class, of the classes that have most of it.

        Flat images make flat maps; test images are taken where there is a split.
        """
        source, split = self.setting.source, self.setting.split
        keys = source.keys if split is None else split.test
        best: dict[str, tuple[float, Sample]] = {}
        for key in keys[:: max(1, len(keys) // LOOKS)]:
            try:
                sample = source.read(key)
            except UnreadableFileError:
                continue  # counted and named when it was embedded
            contrast = float(picture(sample).std())
            name = source.labels.get(key, key)
            if name not in best or contrast > best[name][0]:
                best[name] = (contrast, sample)
        found = sorted(best.values(), key=lambda pair: -pair[0])
        return [sample for _, sample in found[:PICTURES]]

    def _neighbours(self, bench: Bench) -> Figure:
        """Nearest images of a few test images, before and after, in the same pool."""
        labels = bench.source.labels
        by_class = {labels[key]: key for key in reversed(bench.split.test)}
        # Evenly over the classes, not the first ones, which the other pictures show.
        names = sorted(by_class)
        queries = [
            by_class[names[i * len(names) // QUERIES]] for i in range(min(QUERIES, len(names)))
        ]
        pool = list(bench.split.train)
        strips = {}
        for name in (self.names.frozen, self.names.continued):
            reading = self.readings[name]
            bank, asked = reading.vectors(pool), reading.vectors(queries)
            centre = bank.mean(axis=0)
            found, _ = nearest(
                torch.from_numpy(asked - centre), torch.from_numpy(bank - centre), FOUND
            )
            strips[name] = [
                Neighbours(
                    (picture(bench.source.read(query)), labels[query]),
                    tuple(
                        (picture(bench.source.read(pool[i])), labels.get(pool[i], ""))
                        for i in row.tolist()
                    ),
                )
                for query, row in zip(queries, found, strict=True)
            ]
        return neighbour_strips(strips)


def picture(sample: Sample) -> np.ndarray:
    """An image for people: uint8 `(H, W, 3)` of red, green and blue, or of the first bands."""
    image = to_range(sample)
    names = [band.name for band in sample.bands]
    wanted = ("red", "green", "blue")
    order = [names.index(name) for name in wanted] if set(wanted) <= set(names) else [0, 1, 2]
    image = image[[min(index, len(image) - 1) for index in order]]
    return np.ascontiguousarray((image.transpose(1, 2, 0) * 255).round().astype(np.uint8))


def command(told: Mapping[str, Any]) -> str:
    """The words that repeat the run."""
    words = ["dino-adapters start"]
    for name in ("data", "labels", "minutes"):
        if told[name] is not None:
            words.append(f"--{name} {told[name]}")
    words.append(f"--weights {told['weights']} --seed {told['seed']}")
    for name in ("shots", "bands", "value_range"):
        if told[name] is not None:
            words.append(f"--{name.replace('_', '-')} " + ",".join(str(v) for v in told[name]))
    return " ".join(words)
