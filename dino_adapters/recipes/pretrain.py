"""PretrainRecipe: everything that a pretraining run is told. Frozen; unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dino_adapters.recipes.data import DataRecipe

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def _check_ascends(name: str, pair: tuple[float, float]) -> None:
    if pair[0] > pair[1]:
        raise ValueError(f"{name} is {pair}. Give the smaller number first")


class ModelRecipe(Section):
    """The student; the teacher is its moving average."""

    source: str = "vitmicro8"
    """A catalogue name (random start), or anything that `load_backbone` opens (its weights)."""
    architecture: dict[str, Any] = Field(default_factory=dict)
    """Changes to the named architecture, e.g. `model.architecture.depth=6`; only with a
    catalogue name."""
    checkpoint: str | None = None
    """Weights file for a timm name, where they are not its own download."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Stochastic depth of the student (DINOv3: 0.3 for ViT-L on 2,048 images a step)."""


class CropsRecipe(Section):
    """Multi-crop views, made in batches on the device (DINOv3, section 2.5 of its recipes)."""

    global_size: int = Field(default=64, ge=8)
    """Side of a global crop in pixels; a multiple of the patch size."""
    global_count: int = Field(default=2, ge=2)
    """Global crops of an image; the teacher sees all of them."""
    global_scale: tuple[Fraction, Fraction] = (0.32, 1.0)
    """Area of a global crop as a share of the image."""
    local_size: int = Field(default=32, ge=8)
    """Side of a local crop in pixels; a multiple of the patch size."""
    local_count: int = Field(default=4, ge=0)
    """Local crops of an image; only the student sees them."""
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.32)
    """Area of a local crop as a share of the image."""
    horizontal_flip: bool = True
    """Mirror left and right with probability 0.5."""
    vertical_flip: bool = False
    """Mirror top and bottom with probability 0.5: right for images that have no up."""
    jitter: Fraction = 0.8
    """Probability of brightness 0.4, contrast 0.4, saturation 0.2 and hue 0.1 jitter."""
    grayscale: Fraction = 0.2
    """Probability of dropping colour; RGB only."""
    blur: tuple[Fraction, Fraction, Fraction] = (0.0, 0.9, 0.5)
    """Probability of a Gaussian blur in the first global, other global and local crops. The
    default is what the released DINOv2 and DINOv3 were really trained with."""
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels of the crop."""
    solarize: Fraction = 0.2
    """Probability of inverting bright pixels, in global crops after the first; RGB only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.local_count and self.local_size >= self.global_size:
            raise ValueError(
                f"local_size is {self.local_size} and global_size is {self.global_size}. A local "
                "crop must be the smaller one: lower the first or raise the second"
            )
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= 1.0:
                raise ValueError(
                    f"{name} is ({low}, {high}). Give two shares of the image's area with "
                    "0 < low <= high <= 1"
                )
        _check_ascends("blur_sigma", self.blur_sigma)
        return self


class MasksRecipe(Section):
    """Which patches of global crops are hidden from the student (iBOT)."""

    probability: Fraction = 0.5
    """Share of global crops that are masked."""
    ratio: tuple[Fraction, Fraction] = (0.1, 0.5)
    """Masked share of the patches of such a crop, spread evenly over the masked crops."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_ascends("ratio", self.ratio)
        return self


class ObjectiveRecipe(Section):
    """Terms of the loss and the heads they need."""

    dino_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the class-token term."""
    ibot_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the masked-patch term; networks without mask tokens train without it."""
    koleo_weight: float = Field(default=0.1, ge=0.0)
    """Weight of the term that spreads class tokens."""
    prototypes: int = Field(default=1024, ge=2)
    """K of the DINO head. Keep log(K / (2 * batch size)) below about 3."""
    ibot_prototypes: int | None = Field(default=None, ge=2)
    """K of the iBOT head; None takes `prototypes`."""
    hidden_dim: int = Field(default=512, ge=1)
    """Width of the heads' hidden layers."""
    bottleneck_dim: int = Field(default=128, ge=1)
    """Width of the normalised layer before the prototypes."""
    prototype_norm: float | None = Field(default=None, gt=0.0)
    """Length of the prototypes at the start. None is DINOv3's (0.02 * sqrt(bottleneck_dim)), made
    for long runs; 1, as in DINO and DINOv2, sharpens the targets from the first step."""
    student_temperature: float = Field(default=0.1, gt=0.0)
    """Divides the student's logits."""
    teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07)
    """Divides the teacher's logits: at the start, and after its warm-up."""
    sinkhorn_rounds: int = Field(default=3, ge=1)
    """Rounds of Sinkhorn-Knopp that balance the teacher's targets."""


class OptimRecipe(Section):
    """AdamW and what it is applied to."""

    batch_size: int = Field(default=32, ge=1)
    """Images of one step."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate, used as it is: no hidden scaling with the batch size."""
    lr_end: float = Field(default=1e-6, ge=0.0)
    """Learning rate at the last step."""
    weight_decay: tuple[NotNegative, NotNegative] = (0.04, 0.4)
    """At the first and the last step; half a cosine between."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's averages of the gradient and its square."""
    clip: float | None = Field(default=3.0, gt=0.0)
    """Largest gradient norm of the backbone and of each head, each by itself."""
    layer_decay: float = Field(default=0.9, gt=0.0, le=1.0)
    """Learning rate of a block over that of the next one; ViT only."""
    patch_embed_multiplier: float = Field(default=0.2, ge=0.0)
    """Further factor on the learning rate of our networks' patch embedding."""


class ScheduleRecipe(Section):
    """When things change, as fractions of the run."""

    warmup: Fraction = 0.1
    """Linear rise of the learning rate; half a cosine follows."""
    freeze_last_layer: Fraction = 0.01
    """The prototypes stay as they start for so long."""
    temperature_warmup: Fraction = 0.3
    """Linear rise of the teacher's temperature."""
    momentum: tuple[Fraction, Fraction] = (0.992, 1.0)
    """Of the teacher's moving average, at the first and the last step; half a cosine between."""


class CheckpointRecipe(Section):
    """What is kept on disk while training."""

    every_steps: int = Field(default=200, ge=1)
    """Training state, from which `--resume` goes on."""
    keep: int = Field(default=2, ge=1)
    """The last so many states stay."""
    snapshots: int = Field(default=0, ge=0)
    """Teacher backbones exported on the way, evenly spread, to measure progress with."""


class PretrainRecipe(Section):
    """One pretraining run."""

    data: DataRecipe
    """The images."""
    split: str | None = None
    """A split (JSON or CSV) of these images: only its training part is read."""
    model: ModelRecipe = ModelRecipe()
    """The network."""
    crops: CropsRecipe = CropsRecipe()
    """The views."""
    masks: MasksRecipe = MasksRecipe()
    """The hidden patches."""
    objective: ObjectiveRecipe = ObjectiveRecipe()
    """The loss."""
    optim: OptimRecipe = OptimRecipe()
    """The optimiser."""
    schedule: ScheduleRecipe = ScheduleRecipe()
    """The run in time."""
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    """What is kept."""
    steps: int = Field(default=1000, ge=1)
    """Optimiser steps of the whole run."""
    seed: int = Field(default=0, ge=0)
    """Same seed, same weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; weights and losses are fp32. auto: bf16 on CUDA, fp32 on CPU."""
    imports: tuple[str, ...] = ()
    """Modules imported before names are looked up, for networks and readers of your own."""
