"""The sections of a pretraining recipe. Frozen; unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
StudentName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Count = Annotated[int, Field(ge=0), BeforeValidator(lambda v: 0 if v == "auto" else v)]
"""A number that `auto`, or 0, leaves to the data; see `pretrain.resolve`."""


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_a_word(cls, value: Any, info: ValidationInfo) -> Any:
        """`none`, which a command line reads as None, where the word is one of the choices."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        is_choice = get_origin(annotation) is Literal and "none" in get_args(annotation)
        return "none" if value is None and is_choice else value


def _check_ascends(name: str, pair: tuple[float, float]) -> None:
    if pair[0] > pair[1]:
        raise ValueError(f"{name} is {pair}. Give the smaller number first")


def _check_local(local_size: int, global_size: int) -> None:
    if local_size >= global_size:
        raise ValueError(
            f"local_size is {local_size} and global_size is {global_size}. A local crop must be "
            "the smaller one: lower the first or raise the second"
        )


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


class SizesRecipe(Section):
    """Sizes that all crops of a step share (high-resolution adaptation, arXiv 2508.10104)."""

    global_size: int = Field(ge=8)
    """Side of a global crop in pixels."""
    local_size: int = Field(ge=8)
    """Side of a local crop in pixels."""
    gram_size: int | None = Field(default=None, ge=8)
    """Side of the Gram teacher's crop in pixels; None is that of the global crop."""
    probability: float = Field(default=1.0, gt=0.0)
    """Share of the steps, relative to the other entries."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_local(self.local_size, self.global_size)
        return self


class CropsRecipe(Section):
    """Multi-crop views, made in batches on the device (DINO, arXiv 2104.14294, section 3.1)."""

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
    mixture: tuple[SizesRecipe, ...] = ()
    """Sizes drawn anew for each step, the same on all devices, in place of `global_size`,
    `local_size` and `gram.size`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.local_count and not self.mixture:
            _check_local(self.local_size, self.global_size)
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
    bins: Literal["edges", "uniform"] = "edges"
    """Each masked crop's share: the upper edge of its bin (DINOv3), or drawn inside it (DINOv2)."""
    shift: bool = False
    """Turn each mask by a random number of rows and columns, around the borders."""
    block_limit: Literal["half", "reference"] = "half"
    """Largest block: half of the grid, or the reference's floors, less than half on odd grids."""

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
    drop_diagonal: bool = True
    """Leave out the pairs of a global crop with itself."""
    local_weight: tuple[NotNegative, NotNegative] = (1.0, 1.0)
    """Factor on the local crops' share of the class-token term, before and after
    `schedule.local_ramp`; without renormalising."""
    regularizer: Literal["koleo", "kde", "sigreg", "none"] = "koleo"
    """What spreads class tokens: KoLeo (nearest neighbour), KDE (density; for near-duplicates,
    arXiv 2504.05186) or SIGReg (towards a Gaussian, arXiv 2511.08544; here on the class tokens,
    as its gradient vanishes on a small head's bottleneck)."""
    regularizer_weight: float = Field(default=0.1, ge=0.0)
    """Its weight. Use about 0.05 for KDE and SIGReg."""
    koleo_neighbours: int = Field(default=1, ge=1)
    """Nearest neighbours that KoLeo pushes away."""
    koleo_group: int | None = Field(default=None, ge=2)
    """Images among which KoLeo looks for neighbours; None is the whole batch."""
    prototypes: Count = 1024
    """K of the DINO head; `auto` follows batch and number of images. Keep
    log(K / (2 * batch size)) below about 3."""
    ibot_prototypes: int | None = Field(default=None, ge=2)
    """K of the iBOT head; None takes `prototypes`."""
    hidden_dim: int = Field(default=512, ge=1)
    """Width of the heads' hidden layers."""
    bottleneck_dim: int = Field(default=128, ge=1)
    """Width of the normalised layer before the prototypes."""
    ibot_hidden_dim: int | None = Field(default=None, ge=1)
    """The same of the iBOT head; None takes `hidden_dim`."""
    ibot_bottleneck_dim: int | None = Field(default=None, ge=1)
    """The same of the iBOT head; None takes `bottleneck_dim`."""
    prototype_norm: float | None = Field(default=None, gt=0.0)
    """Length of the prototypes at the start. None is DINOv3's (0.02 * sqrt(bottleneck_dim)), made
    for long runs; 1, as in DINO and DINOv2, sharpens the targets from the first step."""
    student_temperature: float = Field(default=0.1, gt=0.0)
    """Divides the student's logits."""
    teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07)
    """Divides the teacher's logits: at the start, and after its warm-up."""
    sinkhorn_rounds: int = Field(default=3, ge=1)
    """Rounds of Sinkhorn-Knopp that balance the teacher's targets."""
    centering: Literal["sinkhorn", "softmax"] = "sinkhorn"
    """How targets are balanced: Sinkhorn-Knopp, or a softmax about a moving centre (DINO)."""
    center_momentum: Fraction = 0.9
    """Of that centre."""
    shared_head: bool = False
    """One head for both terms, as in DINOv2's short recipe."""
    head_layers: int = Field(default=3, ge=1)
    """Linear layers of a head before the prototypes."""
    weight_norm: Literal["none", "free", "fixed"] = "none"
    """Prototypes of unit direction with a gain that starts at 1: trained (DINOv2) or fixed
    (DINO). DINOv3 has none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        own = ("ibot_prototypes", "ibot_hidden_dim", "ibot_bottleneck_dim")
        given = [name for name in own if getattr(self, name) is not None]
        if self.shared_head and given:
            raise ValueError(
                f"{given[0]} is given, and with shared_head=True iBOT has no head of its own. "
                "Leave one of them out"
            )
        return self


class OptimRecipe(Section):
    """AdamW and what it is applied to."""

    batch_size: Count = 32
    """Images of one step, over all devices and micro-batches; `auto` follows their number."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate, before `lr_rule`."""
    lr_rule: Literal["none", "sqrt_1024", "linear_256"] = "none"
    """Factor on the learning rate: none, `4 * sqrt(batch / 1024)` (DINOv3's own), or
    `batch / 256`."""
    lr_end: float = Field(default=1e-6, ge=0.0)
    """Learning rate at the last step."""
    weight_decay: tuple[NotNegative, NotNegative] = (0.04, 0.4)
    """At the first and the last step; half a cosine between."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's averages of the gradient and its square."""
    clip: float | None = Field(default=3.0, gt=0.0)
    """Largest gradient norm of the backbone and of each head, each by itself."""
    clip_each: Literal["module", "tensor"] = "module"
    """What is clipped by itself: backbone and heads, or every tensor (DINO)."""
    decay_rule: Literal["shape", "name"] = "shape"
    """What weight decay spares: vectors and tokens, or the reference's list of words, which
    decays tokens and some norms of ConvNeXt."""
    layer_decay: float = Field(default=0.9, gt=0.0, le=1.0)
    """Learning rate of a block over that of the next one, or of a stage in networks of timm that
    have no blocks."""
    patch_embed_multiplier: float = Field(default=0.2, ge=0.0)
    """Further factor on the learning rate of a transformer's patch embedding."""


class ScheduleRecipe(Section):
    """When things change, as fractions of the run."""

    family: Literal["v3", "v2"] = "v3"
    """Ends of a schedule: the cosine reaches its last value (DINOv3), or stops one step short after
    a warm-up that holds the peak twice (DINO and DINOv2)."""

    warmup: Fraction = 0.1
    """Linear rise of the learning rate; half a cosine follows."""
    freeze_backbone: Fraction = 0.0
    """The backbone stays as it starts for so long while new heads learn; nothing is computed
    backwards through it, unless bands that it never saw need a patch embedding."""
    backbone_ramp: Fraction = 0.0
    """Linear rise of the backbone's learning rate from 0 after that, on top of `warmup`."""
    freeze_last_layer: Fraction = 0.01
    """The prototypes stay as they start for so long."""
    temperature_warmup: Fraction = 0.3
    """Linear rise of the teacher's temperature."""
    momentum: tuple[Fraction, Fraction] = (0.992, 1.0)
    """Of the teacher's moving average, at the first and the last step; half a cosine between."""
    momentum_span: Fraction = 0.0
    """Share of the run that the moving average spans at the start: above 0, the first value of
    `momentum` is `1 - 1 / (share * steps)`, so that short runs move their teacher, too."""

    local_ramp: Fraction = 0.0
    """Half a cosine between the two values of `objective.local_weight`."""
    regularizer_warmup: Fraction = 0.0
    """Linear rise of the regularizer's weight: at the very start KoLeo outweighs all else."""


class CheckpointRecipe(Section):
    """What is kept on disk while training."""

    every_steps: int = Field(default=200, ge=1)
    """Training state, from which `--resume` goes on."""
    keep: int = Field(default=2, ge=1)
    """The last so many states stay."""
    snapshots: int = Field(default=0, ge=0)
    """Teacher backbones exported on the way, evenly spread, to measure progress with."""
