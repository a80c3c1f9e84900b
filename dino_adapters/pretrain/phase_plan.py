"""What one phase of a run would be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dino_adapters.pretrain.augment import Sizes
from dino_adapters.pretrain.estimate import MARGIN, Cost
from dino_adapters.pretrain.sizes import all_sizes
from dino_adapters.pretrain.trial import Measured
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import duration


@dataclass(frozen=True)
class PhasePlan:
    """What one phase would be.

    Attributes:
        name: of the phase; empty where the run has no phases.
        recipe: with everything settled.
        images: how many it reads.
        side: shorter side in pixels at which they are read.
        size_note: why at that.
        measured: the largest trial.
        memory: bytes of a step, those of the process included.
        seconds: of a step.
        kept_bytes: decoded images that stay in memory.
        decoding_s: seconds that reading and decoding add to the whole phase.
        looks_s: seconds of all looks at the network, about.
        judging: what a verdict will be read from.
        warnings: those that a run would give while it is built, but for those on settings.
        divided: whether micro-batches were tried, so that `memory` tells them apart.
    """

    name: str
    recipe: PretrainRecipe
    images: int
    side: int
    size_note: str
    measured: Measured
    memory: Cost
    seconds: Cost
    kept_bytes: int
    decoding_s: float
    looks_s: float
    judging: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    divided: bool = False

    @property
    def batch(self) -> int:
        """Images of a step."""
        return self.recipe.optim.batch_size

    @property
    def micro(self) -> int:
        """Images that go through the networks at once."""
        return min(self.recipe.parallel.micro_batch or self.batch, self.batch)

    @property
    def peak_bytes(self) -> int:
        """Most memory at any time."""
        return round(self.memory.of(self.batch, self.micro)) + self.kept_bytes

    @property
    def room_bytes(self) -> int:
        """Memory that may be planned with."""
        return int(MARGIN * self.measured.available_bytes)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves a tenth of the free memory."""
        return self.peak_bytes <= self.room_bytes

    @property
    def largest_batch(self) -> int:
        """Images that fit at once, without micro-batches; 0 where none do."""
        each = self.memory.micro + self.memory.batch
        return max(int((self.room_bytes - self.memory.fixed - self.kept_bytes) / each), 0)

    @property
    def largest_micro(self) -> int:
        """Images at once that fit where the batch is divided; 0 where none do."""
        rest = self.room_bytes - self.memory.of(self.batch, self.batch) - self.kept_bytes
        return min(max(self.batch + math.floor(rest / self.memory.micro), 0), self.batch)

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.seconds.of(self.batch, self.micro)

    @property
    def total_s(self) -> float:
        """Seconds of the phase."""
        return self.recipe.steps * self.step_s + self.decoding_s + self.looks_s

    @property
    def passes(self) -> float:
        """How often each image is seen."""
        return self.recipe.steps * self.batch / self.images

    @property
    def logit_bytes(self) -> tuple[int, int]:
        """Prototype scores of a step, about: of the teacher, with its targets, and the student.

        float32; iBOT's rows are the masked patches, whose targets follow from their scores.
        """
        crops, masks, o = self.recipe.crops, self.recipe.masks, self.recipe.objective
        grid = max(s.global_size for s in all_sizes(self.recipe)) // self.measured.patch_size
        masked = masks.probability * sum(masks.ratio) / 2 * grid**2 * crops.global_count
        patches = masked * (o.ibot_prototypes or o.prototypes) if self.measured.with_ibot else 0.0
        teacher = 2 * (crops.global_count * o.prototypes + patches)
        student = (crops.global_count + crops.local_count) * o.prototypes + patches
        return round(4 * self.batch * teacher), round(4 * self.micro * student)

    @property
    def advice(self) -> tuple[str, ...]:
        """What would make it fit, or how much more would."""
        if self.fits:
            more = min(self.largest_batch, 1 << 20)
            return (f"up to {more:,} images a step fit without micro-batches",)
        return tuple(self._savings())

    def _savings(self) -> Iterator[str]:
        recipe, m = self.recipe, self.measured
        if self.divided and 0 < self.largest_micro < self.micro:
            micro = 1 << (self.largest_micro.bit_length() - 1)
            peak = self.memory.of(self.batch, micro) + self.kept_bytes
            yield f"parallel.micro_batch={micro} fits, with a peak of {gigabytes(peak)}"
        if m.device.startswith("cuda") and m.precision == "fp32":
            yield "precision=bf16 halves activations, about"
        if self.kept_bytes > 0.05 * self.peak_bytes:
            yield f"data.memory_gb=0 saves the {gigabytes(self.kept_bytes)} of decoded images"
        crops = recipe.crops
        if crops.local_count > 2:
            share = (crops.local_count - 2) * local_share(self.recipe) / crops.local_count
            yield f"crops.local_count=2 saves about {share:.0%} of the student's activations"
        if sum(self.logit_bytes) > 0.1 * self.peak_bytes:
            fewer = recipe.objective.prototypes // 4
            yield (
                f"objective.prototypes={fewer} saves most of {gigabytes(sum(self.logit_bytes))} of "
                "prototype scores"
            )
        if torch.cuda.device_count() > 1 and recipe.parallel.sharding == "none":
            state = m.weight_bytes + m.gradient_bytes + m.moment_bytes + m.average_bytes
            yield (
                f"parallel.sharding=full divides {gigabytes(state)} of weights and optimiser over "
                "devices, and so does every device its share of the images"
            )
        if self.largest_batch > 1:
            batch = 1 << (self.largest_batch.bit_length() - 1)
            yield f"optim.batch_size={batch} fits as it is, but changes the training"

    def lines(self) -> tuple[str, ...]:
        """Sentences on size and fit."""
        name = f"{self.name}: " if self.name else ""
        m, verb = self.measured, "fits" if self.fits else "does not fit"
        found = [
            f"{name}a peak of {gigabytes(self.peak_bytes)} {verb} into the "
            f"{gigabytes(m.available_bytes)} that are free on {m.device}, a tenth being left",
            *(name + sentence for sentence in self.advice),
        ]
        if self.size_note:
            found.append(name + self.size_note)
        if self.recipe.schedule.freeze_backbone:
            found.append(f"{name}steps are faster than planned while the backbone is frozen")
        said = (*self.judging, *self.warnings)
        found += [name + sentence.removesuffix(".") for sentence in said]
        return tuple(f"{sentence[0].upper()}{sentence[1:]}." for sentence in found)

    def cells(self) -> dict[str, str]:
        """Everything by name, as text."""
        m, recipe = self.measured, self.recipe
        teacher, student = self.logit_bytes
        sizes = ", ".join(_shown(s, local=recipe.crops.local_count > 0) for s in all_sizes(recipe))
        cells = {
            "network": m.network,
            "images": f"{self.images:,}, read at {self.side} px",
            "crops": f"{recipe.crops.global_count} + {recipe.crops.local_count} of {sizes}",
            "steps": f"{recipe.steps:,} of {self.batch:,} images, {self.passes:.1f} passes",
            "prototypes": f"{recipe.objective.prototypes:,}",
            "device": f"{m.device}, {m.precision}, {gigabytes(m.available_bytes)} free",
            "parameters": f"{m.backbone_parameters:,} in backbones, {m.head_parameters:,} in heads",
            "trained": f"{m.trained_parameters:,}",
            "weights": gigabytes(m.weight_bytes),
            "gradients": gigabytes(m.gradient_bytes),
            "AdamW's moments": gigabytes(m.moment_bytes),
            "moving average": gigabytes(m.average_bytes),
        }
        if m.teacher_bytes:
            cells["other networks"] = gigabytes(m.teacher_bytes)
        return cells | {
            "prototype scores": f"{gigabytes(teacher)} teacher, {gigabytes(student)} student",
            "each image adds": gigabytes(self.memory.micro + self.memory.batch),
            "decoded images kept": gigabytes(self.kept_bytes),
            "at once": f"{self.micro:,} images",
            "peak memory": gigabytes(self.peak_bytes) + ("" if self.fits else ", too much"),
            "largest batch": f"{self.largest_batch:,} at once",
            "a step": f"{self.step_s:.3g} s",
            "reading images": duration(self.decoding_s),
            "looks": duration(self.looks_s),
            "in all": duration(self.total_s),
        }

    def as_json(self) -> dict[str, Any]:
        """For machines: bytes and seconds."""
        teacher, student = self.logit_bytes
        return {
            "name": self.name,
            "images": self.images,
            "side": self.side,
            "steps": self.recipe.steps,
            "batch": self.batch,
            "micro_batch": self.micro,
            "passes": self.passes,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "room_bytes": self.room_bytes,
            "kept_bytes": self.kept_bytes,
            "image_bytes": self.memory.micro + self.memory.batch,
            "teacher_logit_bytes": teacher,
            "student_logit_bytes": student,
            "largest_batch": self.largest_batch,
            "largest_micro_batch": self.largest_micro,
            "step_seconds": self.step_s,
            "decoding_seconds": self.decoding_s,
            "look_seconds": self.looks_s,
            "seconds": self.total_s,
            "advice": list(self.advice),
            "judging": list(self.judging),
            "warnings": list(self.warnings),
            "measured": asdict(self.measured),
        }


def gigabytes(count: float) -> str:
    """Bytes as people say them; a GB is 1e9 bytes."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def local_share(recipe: PretrainRecipe) -> float:
    """Share of the local crops in the student's patches."""
    sizes = max(all_sizes(recipe), key=lambda one: one.global_size)
    whole = recipe.crops.global_count * sizes.global_size**2
    local = recipe.crops.local_count * sizes.local_size**2
    return local / (whole + local)


def _shown(sizes: Sizes, *, local: bool) -> str:
    found = f"{sizes.global_size} px"
    if local:
        found += f" and {sizes.local_size} px"
    return found + (f", Gram {sizes.gram_size} px" if sizes.gram_size else "")
