"""Looks at the teacher while it trains, what follows from them, and what is delivered."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters.contracts import NotFiniteError, UnreadableFileError
from dino_adapters.data.resize import to_square, unit_range
from dino_adapters.pretrain.candidates import Candidates
from dino_adapters.pretrain.delivery import copy_export
from dino_adapters.pretrain.diagnosis import DROP, Finding, diagnose
from dino_adapters.pretrain.gate import GATE, change_of_selection, early_stop
from dino_adapters.pretrain.health import look_at
from dino_adapters.pretrain.intake import evenly
from dino_adapters.pretrain.learned import NEVER
from dino_adapters.pretrain.optim import Timetable, frozen_steps
from dino_adapters.pretrain.probe import Look
from dino_adapters.pretrain.rows import PREFIX, is_before, is_look, steps_of
from dino_adapters.pretrain.run import Run
from dino_adapters.pretrain.sizes import largest_global
from dino_adapters.pretrain.tensorboard import Board
from dino_adapters.pretrain.together import together
from dino_adapters.runtime.runfolder import RunFolder

LOGGER = logging.getLogger(__name__)
BEST_STATE = "best_state"
PLAIN = 0.2
"""A fall that needs no interval, where images are too few to have one."""


@dataclass(frozen=True, slots=True)
class Event:
    """What follows from a look.

    Attributes:
        ends: the run ends here.
        stops: it ends with an error, for this reason.
        goes_back: it goes back to the best look.
        alarms: features have collapsed or fallen, so that this look is no candidate.
    """

    ends: bool = False
    stops: str = ""
    goes_back: bool = False
    alarms: bool = False


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
        self.images: Tensor | None = None
        self.board: Board | None = None
        self.said: set[str] = set()
        self.candidates = Candidates(run, folder, self.info)

    @property
    def keeps_best(self) -> bool:
        """Whether the best look is delivered, and not the last."""
        return self.on and (self.recipe.gate is not None or self.recipe.monitor.patience > 0)

    def begin(self) -> None:
        """Looks at the start, before the first step; a resumed run has that look already.

        Raises:
            CheckpointError: a gate was added to a run that did not keep its start.
        """
        if not self.on:
            return
        run = self.run
        together(self._prepare, run.world)
        if run.progress.step == 0:
            if self.recipe.gate is not None:
                self._export_start()
            self.look()
            if self.recipe.monitor.on_collapse == "rollback":
                run.save(self.folder.path / BEST_STATE, keep=1)

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
        networks, world = self.run.delivered()[self.student], self.run.world
        event, is_best = together(lambda: self._looked(networks), world)[0]
        if is_best and not event.alarms:
            if self.keeps_best:
                self.run.export(self.candidates.continued)
            if self.recipe.monitor.on_collapse == "rollback":
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
        """Exports the result; with a gate the start, unless the result is shown to be better."""
        run, export = self.run, self.folder.export
        best = self.candidates.continued
        if not self.keeps_best:
            run.export(export)
        elif not run.world.told(best.is_dir()):
            run.export(best)
        if run.world.leads and self.board is not None:
            self.board.close()
        if run.world.leads and self.recipe.gate is None:  # one of an earlier recipe
            (self.folder.path / GATE).unlink(missing_ok=True)
        if self.keeps_best:
            together(lambda: self._choose(best, export), run.world)
        return export

    def _choose(self, best: Path, export: Path) -> None:
        if not self.run.world.leads:
            return
        if self.recipe.gate is None:
            copy_export(best, export)
        else:
            self.candidates.judge(self.recipe.gate)

    def _prepare(self) -> None:
        run = self.run
        if not run.world.leads:
            return
        self.candidates.prepare()
        self.images = self._images()
        self._open_board()

    def _export_start(self) -> None:
        """Keeps the network that the run starts from, as it came, with its own card."""
        backbone = self.run.delivered()[self.student]["backbone"]
        world, keep = self.run.world, self.candidates.keep_start
        together(lambda: keep(backbone) if world.leads else None, world)

    def _looked(self, networks: nn.ModuleDict) -> tuple[Event, bool]:
        """What follows from a look, and whether it is the best so far; the first process looks."""
        if not self.run.world.leads:
            return Event(), False
        row, seen = self._seen(networks.to(self.run.learner.device))
        earlier = [look.get(f"{PREFIX}selection") for look in self._moved()]
        self.note(row)
        is_best = self.run.progress.step > frozen_steps(self.recipe)
        if seen is not None:  # without labels the last is taken for the best
            before = [score for score in earlier if score is not None]
            is_best = is_best and seen.selection > max(before, default=-1.0)
        return self._follows(seen), is_best

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
        if self.candidates.labelled is None:
            return row, None
        seen, noted = self.candidates.look(networks["backbone"], done)
        row |= noted
        return row, seen

    def _follows(self, seen: Look | None) -> Event:
        """What the looks so far ask for; the verdict's images have no say in it."""
        findings, told = self.findings(), self.recipe.monitor
        fallen = self._fallen(seen)
        said = [(finding.kind, finding.sentence) for finding in findings]
        for kind, sentence in [*said, *(("fall", sentence) for sentence in fallen)]:
            if kind not in self.said:
                self.said.add(kind)
                LOGGER.warning("%s", sentence)
        reasons = [sentence for kind, sentence in said if kind == "collapse"] + fallen
        event = self._alarm(reasons[0]) if reasons else Event()
        if event.ends or event.stops or event.goes_back:
            return event
        first = self.looks()[:1] if self.candidates.since == NEVER else []
        looks = [row for row in first if row["step"] == 0] + self._moved()
        scores = [score for row in looks if (score := row.get(f"{PREFIX}selection")) is not None]
        if early_stop(scores, told.patience):
            LOGGER.info("no better look for %d in a row: the run ends here", told.patience)
            return replace(event, ends=True)
        return event

    def _fallen(self, seen: Look | None) -> list[str]:
        """Why a look counts as a fall behind the start, by the images that may choose."""
        first = self.candidates.first_look()
        done = self.run.progress.step
        if seen is None or first is None or done <= frozen_steps(self.recipe):
            return []
        assert self.candidates.labelled is not None
        change = change_of_selection(first, seen, self.candidates.labelled)
        # With rare classes, or few images, one answer is points: chance must be ruled out.
        shown = change.difference < -PLAIN if change.high is None else change.high < 0
        if change.difference >= -DROP or not shown:
            return []
        return [
            f"Features fell behind the start: {100 * seen.selection:.1f} % of the labelled images "
            f"to choose by, and {100 * first.selection:.1f} % before. Try a lower optim.lr, or an "
            "anchor."
        ]

    def _alarm(self, reason: str) -> Event:
        """What the recipe says to do now."""
        told = self.recipe.monitor
        if told.on_collapse == "warn":
            return Event(alarms=True)
        kept = any((self.folder.path / BEST_STATE).glob("step_*"))
        if told.on_collapse == "rollback" and kept:
            if self.run.progress.rollbacks < told.rollbacks:
                self.said.clear()
                return Event(goes_back=True, alarms=True)
            LOGGER.warning("The run went back %d times already.", told.rollbacks)
        if self.recipe.gate is not None:
            LOGGER.warning("The run ends here, and is held against its start.")
            return Event(ends=True, alarms=True)
        return Event(stops=reason, alarms=True)

    def _moved(self) -> list[dict[str, Any]]:
        """Looks at a backbone that training has moved, by the present labels."""
        before = max(frozen_steps(self.recipe), self.candidates.since)
        return [row for row in self.looks() if row["step"] > before]

    def looks(self) -> list[dict[str, Any]]:
        """Rows of all looks so far."""
        return [row for row in self.folder.rows() if is_look(row)]

    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with the run as far as it got."""
        recipe, rows = self.recipe, self.folder.rows()
        return diagnose(
            [row for row in rows if is_look(row)],
            steps_of(rows),
            prototypes=recipe.objective.prototypes if recipe.objective.dino_weight else 0,
            rows=recipe.crops.global_count * recipe.optim.batch_size,
            images=len(self.run.feed.keys),
            frozen_until=frozen_steps(recipe),
        )

    def _images(self) -> Tensor | None:
        """Squares of some images of the run, evenly spread, as the network reads them."""
        size = largest_global(self.recipe)
        squares = []
        for key in evenly(self.run.feed.keys, self.recipe.monitor.images):
            try:
                image = self.run.feed.decode(key)
            except UnreadableFileError:
                continue  # the feed counts and names it
            squares.append(to_square(unit_range(image), size))
        if len(squares) < 2:
            self.run.notices.add("too few readable images to look at while training")
            return None
        info = self.run.infos[""]
        mean, std = (torch.tensor(told)[:, None, None] for told in (info.mean, info.std))
        return (torch.stack(squares) - mean) / std
