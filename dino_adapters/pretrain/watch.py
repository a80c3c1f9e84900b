"""Looks at the teacher while it trains, what follows from them, and what is delivered."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_adapters.backbones import build_network
from dino_adapters.contracts import NotFiniteError, UnreadableFileError
from dino_adapters.pretrain.delivery import copy_export
from dino_adapters.pretrain.diagnosis import PREFIX, Finding, collapsed, diagnose
from dino_adapters.pretrain.gate import (
    delivered,
    delivery_sentence,
    early_stop,
    judge,
    unlabelled,
)
from dino_adapters.pretrain.health import look_at
from dino_adapters.pretrain.labelled import LabelledSet, labelled_set
from dino_adapters.pretrain.optim import Timetable, frozen_steps
from dino_adapters.pretrain.probe import Look, look, sizes_for
from dino_adapters.pretrain.run import Run
from dino_adapters.pretrain.sizes import largest_global
from dino_adapters.pretrain.tensorboard import Board
from dino_adapters.runtime.files import write_json
from dino_adapters.runtime.runfolder import RunFolder

LOGGER = logging.getLogger(__name__)
CANDIDATES, START, CONTINUED = "candidates", "start", "continued"
START_LOOK, GATE = "start.json", "gate.json"
BEST_STATE = "best_state"


@dataclass(frozen=True, slots=True)
class Event:
    """What follows from a look.

    Attributes:
        ends: the run ends here.
        stops: it ends with an error, for this reason.
        goes_back: it goes back to the best look.
    """

    ends: bool = False
    stops: str = ""
    goes_back: bool = False


class Watch:
    """All looks of a run.

    The first process looks, at a copy in one piece; the others wait, and are told what follows.

    Args:
        run: the run.
        folder: where it lives.
    """

    def __init__(self, run: Run, folder: RunFolder) -> None:
        self.run, self.folder, self.recipe = run, folder, run.recipe
        self.every = max(round(self.recipe.monitor.every * self.recipe.steps), 1)
        self.on = self.recipe.monitor.every > 0 or self.recipe.gate is not None
        self.student = next(iter(run.learner.averages))
        self.info = run.infos[self.student]
        self.labelled: LabelledSet | None = None
        self.images: Tensor | None = None
        self.board: Board | None = None
        self.said: set[str] = set()
        self._is_best = False
        self.sizes: tuple[int, ...] = ()
        self.crop_size = largest_global(self.recipe)

    @property
    def keeps_best(self) -> bool:
        """Whether the best look is delivered, and not the last."""
        return self.recipe.gate is not None or self.recipe.monitor.patience > 0

    @property
    def candidates(self) -> Path:
        """Where start and best look are exported."""
        return self.folder.path / CANDIDATES

    def begin(self) -> None:
        """Looks at the start, before the first step; a resumed run has that look already."""
        if not self.on:
            return
        run = self.run
        if run.world.leads:
            self.labelled = labelled_set(self.recipe, run.source, run.notices)
            self.images = self._images()
            self.sizes = sizes_for(self.info, self.crop_size, run.feed.side)
            self._open_board()
        if run.progress.step == 0:
            if self.recipe.gate is not None:
                run.export(self.candidates / START)
            self.look()

    def is_due(self, done: int) -> bool:
        """Whether to look after so many steps."""
        if not self.on:
            return False
        at_end = done == self.recipe.steps
        return at_end or (self.recipe.monitor.every > 0 and done % self.every == 0)

    def note(self, row: dict[str, Any]) -> None:
        """Writes down a row of numbers."""
        if self.run.world.leads:
            self.folder.note(row)
            if self.board is not None:
                self.board.add(row)

    def look(self) -> Event:
        """Looks at the moving average, notes it, and says what follows."""
        networks = self.run.delivered()[self.student]
        event = Event()
        if self.run.world.leads:
            row, seen = self._seen(networks)
            self.note(row)
            event = self._follows(seen)
        event = self.run.world.told(event)
        if self.run.world.told(self._is_best) and self.keeps_best:
            self.run.export(self.candidates / CONTINUED)
        if self.run.world.told(self._is_best) and self.recipe.monitor.on_collapse == "rollback":
            self.run.save(self.folder.path / BEST_STATE, keep=1)
        return event

    def go_back(self) -> None:
        """Takes the run back to its best look, at half the learning rate."""
        run = self.run
        path = next(iter(sorted((self.folder.path / BEST_STATE).glob("step_*"))))
        seconds, rollbacks = run.progress.seconds, run.progress.rollbacks + 1
        meta = run.restore(path)
        run.progress = replace(meta.progress, seconds=seconds, rollbacks=rollbacks)
        LOGGER.warning(
            "The run goes back to step %d, and on from there at %g of the learning rate.",
            run.progress.step,
            run.progress.pace,
        )
        run.save(self.folder.checkpoints)
        if run.world.leads:
            self.folder.keep_rows(lambda row: is_before(row, run.progress.step))
            self._open_board()

    def deliver(self) -> Path:
        """Exports the result, or with a gate the better of start and result."""
        run, export = self.run, self.folder.export
        best = self.candidates / CONTINUED
        if not self.keeps_best or not self.on:
            run.export(export)
        elif not best.is_dir():
            run.export(best)
        if run.world.leads and self.board is not None:
            self.board.close()
        if self.recipe.gate is None:
            if self.keeps_best and run.world.leads:
                copy_export(best, export)
        elif run.world.leads:
            self._judge()
        run.world.wait()
        return export

    def _open_board(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.recipe.monitor.tensorboard:
            where = self.folder.path / "tensorboard"
            self.board = Board(where, first_step=self.run.progress.step)

    def _seen(self, networks: nn.ModuleDict) -> tuple[dict[str, Any], Look | None]:
        """The row of a look, and what the labelled images say."""
        done = self.run.progress.step
        row: dict[str, Any] = {"step": done}
        if self.images is not None:
            at = min(done, self.recipe.steps - 1)
            temperature = Timetable(self.recipe).at(at).teacher_temperature
            try:
                signs = look_at(networks, self.images, temperature=temperature)
            except NotFiniteError as error:
                signs = {}
                LOGGER.warning("%s", error)
            row |= {f"{PREFIX}{name}": value for name, value in signs.items()}
        self._is_best = False
        if self.labelled is None:
            # Without labels the last is taken for the best.
            self._is_best = done > 0
            return row, None
        first = self._kept(START_LOOK)
        # All sizes at the start and for the verdict; on the way the crops' and the start's best.
        sizes = self.sizes if first is None or done == 0 else tuple({first.size, self.crop_size})
        seen = look(networks["backbone"], self.info, self.labelled, sorted(sizes))
        row |= {f"{PREFIX}knn": seen.knn, f"{PREFIX}linear": seen.linear}
        row |= {f"{PREFIX}selection": seen.selection, f"{PREFIX}size": seen.size}
        if done == 0:
            write_json(self.candidates / START_LOOK, seen.as_json())
        elif first is not None:
            verdict = judge(first, seen, self.labelled)
            gains = {"gain": verdict.difference, "gain_low": verdict.low}
            gains |= {"gain_high": verdict.high}
            row |= {f"{PREFIX}{name}": gain for name, gain in gains.items() if gain is not None}
            earlier = [look[f"{PREFIX}selection"] for look in self.looks()[1:]]
            if seen.selection > max(earlier, default=-1.0):
                self._is_best = True
        shown = ", ".join(f"{name} {100 * row[PREFIX + name]:.1f} %" for name in ("knn", "linear"))
        LOGGER.info("step %d: %s on labelled images", done, shown)
        return row, seen

    def _follows(self, seen: Look | None) -> Event:
        """What the looks so far ask for."""
        findings, told = self.findings(), self.recipe.monitor
        for finding in findings:
            if finding.kind not in self.said:
                self.said.add(finding.kind)
                LOGGER.warning("%s", finding.sentence)
        if collapsed(findings) and told.on_collapse != "warn":
            kept = any((self.folder.path / BEST_STATE).glob("step_*"))
            if told.on_collapse == "rollback" and kept:
                if self.run.progress.rollbacks < told.rollbacks:
                    self.said.clear()
                    return Event(goes_back=True)
                LOGGER.warning("The run went back %d times already.", told.rollbacks)
            if self.recipe.gate is not None:
                LOGGER.warning("The run ends here, and is held against its start.")
                return Event(ends=True)
            return Event(stops=findings[0].sentence)
        scores = [row[f"{PREFIX}selection"] for row in self.looks() if seen is not None]
        if early_stop(scores, told.patience):
            LOGGER.info("no better look for %d in a row: the run ends here", told.patience)
            return Event(ends=True)
        return Event()

    def looks(self) -> list[dict[str, Any]]:
        """Rows of all looks so far."""
        return [row for row in self.folder.rows() if is_look(row)]

    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with the run as far as it got."""
        recipe, rows = self.recipe, self.folder.rows()
        return diagnose(
            [row for row in rows if is_look(row)],
            [row for row in rows if not is_look(row)],
            prototypes=recipe.objective.prototypes if recipe.objective.dino_weight else 0,
            rows=recipe.crops.global_count * recipe.optim.batch_size,
            images=len(self.run.feed.keys),
            frozen_until=frozen_steps(recipe),
        )

    def _judge(self) -> None:
        """The verdict on the best look, and the export that follows from it."""
        gate = self.recipe.gate
        assert gate is not None
        first, verdict = self._kept(START_LOOK), unlabelled(self.run.notices)
        if self.labelled is not None and first is not None:
            network, info = build_network(self.candidates / CONTINUED)
            last = look(network.to(self.run.learner.device), info, self.labelled, self.sizes)
            verdict = judge(first, last, self.labelled)
        choice = delivered(verdict, gate)
        copy_export(self.candidates / choice, self.folder.export)
        sentence = f"{verdict.sentence} {delivery_sentence(verdict, gate)}"
        LOGGER.info("%s", sentence)
        found = verdict.as_json() | {"exported": choice, "sentence": sentence}
        write_json(self.folder.path / GATE, found)

    def _kept(self, name: str) -> Look | None:
        """A look that was written down."""
        path = self.candidates / name
        if not path.exists():
            return None
        return Look.from_json(json.loads(path.read_text(encoding="utf-8")))

    def _images(self) -> Tensor | None:
        """Squares of some images of the run, evenly spread, as the network reads them."""
        keys, count = self.run.feed.keys, self.recipe.monitor.images
        size = largest_global(self.recipe)
        squares = []
        for key in keys[:: max(1, len(keys) // count)][:count]:
            try:
                image = self.run.feed.decode(key)
            except UnreadableFileError:
                continue  # the feed counts and names it
            squares.append(square(image, size))
        if len(squares) < 2:
            self.run.notices.add("too few readable images to look at while training")
            return None
        info = self.run.infos[""]
        mean, std = (torch.tensor(told)[:, None, None] for told in (info.mean, info.std))
        return (torch.stack(squares) - mean) / std


def square(image: Tensor, size: int) -> Tensor:
    """The middle of an image `(C, h, w)`, uint8 or 0..1, as `(C, size, size)` in 0..1."""
    side = min(image.shape[-2:])
    top, left = ((length - side) // 2 for length in image.shape[-2:])
    middle = image[:, top : top + side, left : left + side]
    middle = middle.float() / 255 if middle.dtype == torch.uint8 else middle.float()
    resized = F.interpolate(middle[None], size=(size, size), mode="bicubic", antialias=True)
    return resized[0].clamp(0.0, 1.0)


def is_look(row: Mapping[str, Any]) -> bool:
    """Whether a row of `metrics.jsonl` is a look, and not a step."""
    return any(key.startswith(PREFIX) for key in row)


def is_before(row: Mapping[str, Any], done: int) -> bool:
    """Whether a row was noted when so many steps were done, a look after the last included."""
    return int(row.get("step", -1)) < done + is_look(row)
