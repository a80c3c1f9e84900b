"""Start and best result of a run, side by side: kept, looked at, judged, one of them delivered."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from dino_adapters.backbones import build_network, export_backbone
from dino_adapters.backbones.card import read_card
from dino_adapters.contracts import BackboneInfo, CheckpointError
from dino_adapters.pretrain.delivery import copy_export, resize_export
from dino_adapters.pretrain.gate import (
    CANDIDATES,
    GATE,
    Choice,
    agreed,
    change_of_selection,
    delivered,
    delivery_sentence,
    judge,
    unlabelled,
    unopposed,
)
from dino_adapters.pretrain.labelled import LabelledSet
from dino_adapters.pretrain.learned import NEVER, without_learned
from dino_adapters.pretrain.probe import Look, look, sizes_for
from dino_adapters.pretrain.rows import PREFIX
from dino_adapters.pretrain.run import Run
from dino_adapters.pretrain.sizes import largest_global
from dino_adapters.pretrain.verdict import Verdict
from dino_adapters.recipes.running import GateRecipe
from dino_adapters.runtime.files import write_json
from dino_adapters.runtime.runfolder import RunFolder

LOGGER = logging.getLogger(__name__)
START: Choice = "start"
CONTINUED: Choice = "continued"
START_LOOK, LEARNED = "start.json", "learned.json"


class Candidates:
    """The two networks that a run may deliver; only the first process asks.

    Args:
        run: the run.
        folder: where it lives.
        info: card of the network that is watched, as it was at the start.
    """

    def __init__(self, run: Run, folder: RunFolder, info: BackboneInfo) -> None:
        self.run, self.folder, self.info = run, folder, info
        self.labelled: LabelledSet | None = run.labelled
        self.since = NEVER
        """Step after which looks are of the present labels."""
        self.sizes = sizes_for(info, largest_global(run.recipe), run.feed.side)
        self.path = folder.path / CANDIDATES
        self.start, self.continued = self.path / START, self.path / CONTINUED

    def prepare(self) -> None:
        """Refuses a gate that a run did not begin with, and images that it chose by as queries.

        Raises:
            CheckpointError: the start was not kept.
        """
        begun = self.run.progress.step > 0
        if self.run.recipe.gate is not None and begun and not self.start.is_dir():
            raise CheckpointError(
                f"{self.folder.path} began without a gate, so its start was not kept and nothing "
                "can be held against it. Go on without gate, or start anew with it."
            )
        if self.labelled is not None:
            self.labelled, self.since = without_learned(
                self.labelled, self.path / LEARNED, self.run.progress.step, self.run.notices
            )

    def keep_start(self, backbone: nn.Module) -> None:
        """Exports the network that the run starts from, as it came, with its own card."""
        export_backbone(backbone, self.info, self.start, overwrite=True)

    def look(self, backbone: nn.Module, done: int) -> tuple[Look, dict[str, Any]]:
        """What the labelled images say after so many steps, and the numbers to note."""
        assert self.labelled is not None
        first = self.first_look()
        # Always all sizes: where training clearly moves the best one, less would look like a fall.
        usual = None if first is None else first.size
        seen = look(backbone, self.info, self.labelled, self.sizes, usual=usual)
        row: dict[str, Any] = {"knn": seen.knn, "linear": seen.linear}
        row |= {"selection": seen.selection, "size": seen.size}
        if done == 0:
            write_json(self.path / START_LOOK, seen.as_json())
        elif first is not None:
            verdict = judge(first, seen, self.labelled)
            gains = {"gain": verdict.difference, "gain_low": verdict.low}
            gains |= {"gain_high": verdict.high}
            row |= {name: gain for name, gain in gains.items() if gain is not None}
        # Not what the queries say: who tunes settings by it would choose on them.
        LOGGER.info(
            "step %d: balanced accuracy of %.1f %% on the labelled images to choose by (k-NN and "
            "linear probe averaged, read at %d px)",
            done,
            100 * seen.selection,
            seen.size if usual is None else usual,
        )
        return seen, {f"{PREFIX}{name}": value for name, value in row.items()}

    def first_look(self) -> Look | None:
        """The look at the start; once more, where labels came or changed since."""
        path = self.path / START_LOOK
        if self.labelled is None or self.run.progress.step == 0:
            return None
        if path.exists():
            found = Look.from_json(json.loads(path.read_text(encoding="utf-8")))
            if found.labelled == self.labelled.digest:
                return found
        if not self.start.is_dir():
            return None
        LOGGER.info("the labelled images are new: the start is looked at again")
        found = self._look_at(START, self.labelled, self.sizes)
        write_json(path, found.as_json())
        return found

    def judge(self, gate: GateRecipe) -> None:
        """The verdict on the best look, written down, and the export that follows from it."""
        first, verdict = self.first_look(), unlabelled(self.run.notices)
        step = int(read_card(self.continued).training["steps"])
        if self.labelled is not None and first is not None:
            LOGGER.info("the network of step %d is read once more, to be judged", step)
            last = self._look_at(CONTINUED, self.labelled, self.sizes, usual=first.size)
            verdict = rival = self._compared(first, last, self.labelled)
            if last.size != first.size:
                start = self._look_at(START, self.labelled, (last.size,))
                rival = self._compared(start, last, self.labelled)
            verdict = agreed(verdict, rival)
            resize_export(self.continued, last.size)
        choice = delivered(verdict, gate)
        sentence = f"{verdict.sentence} {delivery_sentence(verdict, gate, step)}"
        found = verdict.as_json() | {"exported": choice, "step": step, "sentence": sentence}
        write_json(self.folder.path / GATE, found)
        copy_export(self.path / choice, self.folder.export)
        if choice == START and first is not None:  # the candidate stays as it came
            resize_export(self.folder.export, first.size)
        LOGGER.info("%s", sentence)

    def _compared(self, start: Look, last: Look, labelled: LabelledSet) -> Verdict:
        """One reading of the start against the result."""
        verdict, change = judge(start, last, labelled), change_of_selection(start, last, labelled)
        return unopposed(verdict, change, seen=labelled.seen)

    def _look_at(
        self,
        candidate: str,
        labelled: LabelledSet,
        sizes: Sequence[int],
        usual: int | None = None,
    ) -> Look:
        network, info = build_network(self.path / candidate)
        network = network.to(self.run.learner.device)
        return look(network, info, labelled, sizes, usual=usual)
