"""The configuration of a run and of the demo: every default and every help text; nothing here needs torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import tyro

from vbp.errors import InputError
from vbp.recipes.options import (
    DataOptions,
    Launch,
    LoadingOptions,
    Local,
    ModelOptions,
    ProcessOptions,
    RefitOptions,
    Result,
    Role,
    Speed,
    Tuning,
    WidthOptions,
)
from vbp.runtime.choices import Compensation, Criterion, ObjectiveChoice, Toggle
from vbp.runtime.decode import from_json, to_json

if TYPE_CHECKING:
    from vbp.cost.budget import Budget
    from vbp.statistics.evidence import Need

# What the benchmark script does unless told otherwise: the published method.
PAPER: Final[Mapping[str, Any]] = {"criterion": "variance", "compensation": "mean", "batchnorm": "keep"}
_TARGETS = ("target_macs", "target_params", "target_latency_ms", "target_speedup")


@dataclass(frozen=True)
class PlanOptions:
    """How much is removed, and which channels."""

    keep_ratio: Result[float] = 0.65
    """Share of the hidden MLP channels to keep, in (0, 1], unless a target is given."""
    target_macs: Result[str | None] = None
    """In the place of keep_ratio: MACs of one image, as 0.94G, or as a share of the dense model's, as 0.75 or 75%."""
    target_params: Result[str | None] = None
    """In the place of keep_ratio: parameters, as 4.3M, or as a share of the dense model's."""
    target_latency_ms: Result[float | None] = None
    """In the place of keep_ratio: milliseconds of a batch on this device."""
    target_speedup: Result[float | None] = None
    """In the place of keep_ratio: how many times as fast as the dense model on this device, above 1."""
    best_effort: Launch[bool] = False
    """With a target: take the nearest plan where it cannot be met, and end without an error."""
    latency_batch: Result[int | None] = None
    """Images in the batch that is timed; by default val_batch_size on a GPU, on a CPU what takes about a second."""
    criterion: Result[Criterion] = "auto"
    """Which channels go: auto (the plan whose predictions stay nearest to the dense model's), variance (the
    paper), output_variance, elimination, random, l1, l2, lamp, taylor, snip; see docs/refit.md."""
    global_pruning: Result[bool] = False
    """Rank the channels of all layers together; otherwise every layer keeps the same share. auto decides itself."""
    equal_widths: Result[bool] = False
    """Let layers of one width keep equally many channels, as checkpoints without vbp need them."""
    cost_aware: Result[Toggle] = "auto"
    """With a target: divide the score of a channel by what it saves of the target's quantity, where layers are ranked
    together: with --criterion auto, whose scores are costs in nats (auto), with every criterion (on), never (off)."""
    norm_per_layer: Result[bool] = False
    """With --criterion variance: divide the variances of a layer by their mean before ranking."""
    compensation: Result[Compensation] = "refit"
    """What stands in for removed channels: a prediction from those that stay (refit), their mean in the next bias
    (mean), or nothing (none)."""
    attention: Result[Toggle] = "auto"
    """With --criterion auto and a target: let attention share the budget with the MLPs, in the principal basis of its
    heads, where it can be cut so (auto), always (on) or never (off)."""
    attn_keep_ratio: Result[float | None] = None
    """With --bottleneck: share of the channels of every head to keep; keep_ratio unless given, or, with --criterion
    auto and a target, what each layer's share of the budget leaves."""
    objective: Result[ObjectiveChoice] = "auto"
    """What is preserved, by which plans and refits are judged: the logits of a classifier, the features of a model
    without a head, image-text similarities (zeroshot, with --text_embeddings), or what the model returns (auto)."""
    text_embeddings: Local[Path | None] = None
    """With --objective zeroshot: a .safetensors or .npy file with one row for each text."""


@dataclass(frozen=True)
class LabelFreeOptions:
    """How the pruned model is trained to predict what the dense one does, without labels."""

    tune: Result[int | str] = "off"
    """After surgery and refits: train on crops and mixtures of the calibration images towards the dense model's
    predictions, without labels: epochs as 8, a time as 90s, 5m or 1h, auto (8 epochs, of at most 1,000 images on a
    CPU and 10,000 on a GPU) or off. Held-out images choose the learning rate, and whether the result is kept."""


@dataclass(frozen=True)
class PruneConfig(LabelFreeOptions, WidthOptions, RefitOptions, PlanOptions):
    """How a model is pruned, whatever model and images these are."""

    @property
    def budget(self) -> Budget:
        """Return what the pruned model may cost.

        Raises:
            InputError: More than one budget was given, or its number is none.
        """
        from vbp.cost.budget import Budget

        targets = {name: getattr(self, name) for name in _TARGETS if getattr(self, name) is not None}
        if not targets or self.keep_ratio != default_of("keep_ratio"):
            targets["keep_ratio"] = self.keep_ratio
        return Budget.of(**targets)

    @property
    def ranks_by_cost(self) -> bool:
        """Return whether the score of a channel is divided by what it saves."""
        if self.budget.quantity == "keep_ratio":
            return False
        return self.cost_aware == "on" or (self.cost_aware == "auto" and self.criterion == "auto")

    @property
    def shares_budget(self) -> bool:
        """Return whether the criterion auto divides the budget between MLPs and attention, where there is any."""
        return (
            self.criterion == "auto"
            and self.attention != "off"
            and self.attn_keep_ratio is None
            and self.ranks_by_cost
        )

    @property
    def needs(self) -> frozenset[Need]:
        """Return what must be collected from the calibration images."""
        from vbp.pruning.criteria import needs_of

        needs: set[Need] = {"statistics", *needs_of([self.criterion])}
        if self.compensation == "refit":
            needs.add("covariance")
        return frozenset(needs)


@dataclass(frozen=True)
class TuningOptions:
    """How the pruned model is fine-tuned."""

    train_batch_size: Tuning[int] = 64
    """Images in a fine-tuning batch of one process."""
    epochs_ft: Result[int] = 10
    """Epochs of fine-tuning; 0 only prunes."""
    lr_ft: Tuning[float] = 1.5e-5
    """Peak learning rate of AdamW, down to 0 by a cosine over all steps."""
    layer_decay: Tuning[float] = 1.0
    """Factor of the learning rate from each layer to the one before it, down from the last one; 1 leaves it out."""
    use_kd: Tuning[bool] = False
    """Distil from the unpruned model."""
    kd_alpha: Tuning[float] = 0.7
    """With --use_kd: weight of the cross-entropy."""
    kd_beta: Tuning[float] = 0.3
    """With --use_kd: weight of the divergence from the teacher."""
    kd_T: Tuning[float] = 2.0  # noqa: N815 (the published flag)
    """With --use_kd: temperature."""
    teacher: Annotated[str | None, Role.LOCAL, Role.TUNING] = None
    """With --use_kd or --tune: the model to learn from, as for --model_name, in the place of the one that is pruned
    here; source for the dense model that a pruned one was made from."""
    grad_accum: Tuning[int] = 1
    """Batches whose gradients make one step of the optimizer."""
    weight_decay: Tuning[float] = 0.01
    """Weight decay of AdamW."""
    warmup_epochs: Tuning[float] = 0.0
    """Epochs over which the learning rate rises from 0 to its peak."""
    clip_grad: Tuning[float | None] = None
    """Largest norm of the gradient; larger ones are scaled down to it."""
    label_smoothing: Tuning[float] = 0.0
    """Share of each label that is spread over all classes."""
    hflip: Result[bool] = True
    """Mirror half of the training images, and of the views of the refits; not for digits, letters or road signs."""
    crop_scale: Result[tuple[float, float]] = (0.08, 1.0)
    """Least and largest share of an image that a random crop shows, in training and in the views of the refits."""
    auto_augment: Tuning[str | None] = None
    """Augment the training images by a policy of timm, as rand-m9-mstd0.5-inc1 (RandAugment), augmix-m3-w3 or
    original; by none unless given."""
    reprob: Tuning[float] = 0.0
    """Probability that a rectangle of a training image is erased (random erasing)."""
    drop_path: Tuning[float] = 0.0
    """Rate at which residual branches of the last block are left out in training, falling to 0 at the first one
    (stochastic depth)."""
    mixup: Tuning[float] = 0.0
    """Alpha of Mixup; 0 leaves it out."""
    cutmix: Tuning[float] = 0.0
    """Alpha of CutMix; 0 leaves it out."""
    ema: Tuning[bool] = False
    """Evaluate and save a moving average of the weights."""
    ema_decay: Tuning[float] = 0.9998
    """With --ema: what remains of the average at each step."""
    compile: Tuning[bool] = False
    """Compile student and teacher for fine-tuning (torch.compile)."""
    grad_checkpointing: Tuning[bool] = False
    """Keep fewer activations in fine-tuning and compute them again: less memory, about a third slower."""


@dataclass(frozen=True)
class LongRunOptions:
    """How a run is taken up again, watched and published."""

    resume: Launch[str | None] = None
    """Go on from the last checkpoint in save_dir, if there is one (auto), or from a checkpoint or run folder."""
    checkpoint_minutes: Annotated[float, Role.SPEED, Role.TUNING] = 30.0
    """Besides one at the end of each epoch, write a checkpoint every so many minutes; 0 does not."""
    log_dir: Annotated[Path | None, Role.LAUNCH, Role.TUNING] = None
    """Folder for TensorBoard."""
    disable_ddp: Speed[bool] = False
    """Run as one plain process, without torchrun."""
    local_rank: Launch[int | None] = None
    """Accepted and ignored: older launchers pass it."""
    push_to_hub: Launch[str | None] = None
    """OWNER/NAME: upload the pruned model with a model card there when the run has ended."""


@dataclass(frozen=True)
class RunConfig(LongRunOptions, ProcessOptions, TuningOptions, PruneConfig, DataOptions, ModelOptions):
    """Prune a trained image classifier, keep what can be kept without training, and fine-tune it.

    Example: vbp run --data_path DATA --model_name deit_tiny_patch16_224 --keep_ratio 0.65 --use_kd
    """

    compare_uncompensated: Local[bool] = False
    """Also evaluate the pruned model without compensation, for the report."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data from which the run can be repeated."""
        plain: dict[str, Any] = to_json(self)
        return plain

    @staticmethod
    def from_dict(value: dict[str, Any]) -> RunConfig:
        """Read what `to_dict` returned.

        Raises:
            InputError: A name is unknown, the data path is missing, or a value is of another type.
        """
        remedy = "use the config.json of a run of this version"
        unknown = sorted(set(value) - {field.name for field in dataclasses.fields(RunConfig)})
        if unknown or "data_path" not in value:
            raise InputError(
                f"a run's configuration must hold data_path and known names, got unknown {unknown}; {remedy}"
            )
        return from_json(RunConfig, value, "a run's configuration", remedy, use_defaults=True)


def default_of(name: str) -> Any:
    """Return the default of a setting of a run."""
    return next(field.default for field in dataclasses.fields(RunConfig) if field.name == name)


@dataclass(frozen=True)
class FinetuneConfig(LongRunOptions, ProcessOptions, TuningOptions, LabelFreeOptions, LoadingOptions):
    """Fine-tune a pruned model that vbp saved, without pruning it further.

    Example: vbp finetune output/vbp --data_path DATA --use_kd --save_dir output/tuned
    """

    artifact: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)
    """The folder of a run, or a pruned model that vbp saved."""
    data_path: str = dataclasses.field(kw_only=True)
    """Folder with train/<class>/ and val/<class>/; or hfds/... or wds/..., see docs/data.md."""
    calib_samples: int = 0
    """With --tune: training images for it, chosen class-balanced by the seed; 0 takes all."""
    teacher: str | None = "source"
    """With --use_kd or --tune: the model to learn from: source for the dense model that the pruned one was made from,
    or another as for vbp run --model_name."""
    epochs_ft: int = 10
    """Epochs of fine-tuning; 0 only with --tune."""
    save_dir: Path = Path("./output/finetune")
    """Where log, checkpoints and report go."""

    def run_config(self) -> RunConfig:
        """Return the same as a run that removes nothing from the pruned model."""
        names = {field.name for field in dataclasses.fields(RunConfig)}
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}
        pruning = {"keep_ratio": 1.0, "criterion": "variance", "compensation": "none", "batchnorm": "keep"}
        teacher = {"teacher": self.teacher if self.use_kd or self.tune != "off" else None}
        return RunConfig(**shared | pruning | teacher | {"model_name": self.artifact, "model_type": "auto"})


@dataclass(frozen=True)
class DemoConfig:
    """Prune a small ViT on scikit-learn's handwritten digits: no download, no GPU, about a minute."""

    folder: Path = Path("./output/demo")
    """Digits go to data/ in it, results to run/, where those of an earlier demo are replaced."""
    keep_ratio: float = 0.5
    """Share of the hidden MLP channels to keep, in (0, 1]."""
    criterion: Criterion = "variance"
    """Which channels go: variance (the paper), auto, ...; as for vbp run."""
    compensation: Compensation = "mean"
    """What stands in for removed channels: their mean in the next bias (mean, the paper), refit or none."""
    epochs_ft: int = 5
    """Epochs of fine-tuning; 0 only prunes."""
    seed: int = 0
    """Seed of order and augmentation."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N; the model is too small to gain from a GPU."""
