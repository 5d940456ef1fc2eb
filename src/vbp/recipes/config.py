"""The configuration of a run: every default and every help text, in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import tyro

from vbp.cost.budget import Budget
from vbp.deploy.hub import check_repository
from vbp.errors import InputError
from vbp.method.ridge import RIDGE, check_ridge
from vbp.method.sampling import TokenSample
from vbp.pruning.criteria import Criterion, needs_of
from vbp.statistics.evidence import Need

ModelType = Literal["vit", "convnext", "swin", "auto"]


Compensation = Literal["refit", "mean", "none"]


Wish = Literal["auto", "on", "off"]


Amp = Literal["auto", "off", "bf16", "fp16"]


MatmulPrecision = Literal["highest", "high"]


# Flags of what is refitted after surgery, in the order in which it is.
REFITS: Final = ("refit_producers", "refit_stream", "refit_head")


# What the benchmark script does unless told otherwise: the published method.
PAPER: Final[Mapping[str, Any]] = {"criterion": "variance", "compensation": "mean"}


# With more the statistics pass of DeiT-tiny on a CPU would take over 1.3 times the bare forward pass
# (benchmarks/results).
COVARIANCE_TOKENS = 0.2


_TARGETS = ("target_macs", "target_params", "target_latency_ms", "target_speedup")


# What only fine-tuning reads.
_TUNING = (
    "train_batch_size", "lr_ft", "use_kd", "kd_alpha", "kd_beta", "kd_T", "grad_accum", "weight_decay",
    "warmup_epochs", "clip_grad", "label_smoothing", "mixup", "cutmix", "ema", "ema_decay", "compile",
    "grad_checkpointing", "checkpoint_minutes", "log_dir",
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Prune a trained image classifier, keep what can be kept without training, and fine-tune it.

    Example: vbp run --data_path DATA --model_name deit_tiny_patch16_224 --keep_ratio 0.65 --use_kd
    """

    data_path: str
    """Folder with train/<class>/ and val/<class>/; or hfds/... or wds/..., see docs/data.md."""

    # Model
    model_type: ModelType = "vit"
    """Family that the model must belong to (vit includes DeiT); auto checks nothing."""
    model_name: str = "google/vit-base-patch16-224"
    """A folder with a Hugging Face model, a hub id (with /), or a timm name."""
    checkpoint: Path | None = None
    """Weights for a timm model (.safetensors, .pth, .pt) in the place of a download."""
    convnext_checkpoint: Path | None = None
    """One of Facebook's original ConvNeXt checkpoints (.pth), with --model_type convnext."""
    allow_random_init: bool = False
    """Allow weights that no file provides to stay at random."""
    img_size: int | None = None
    """Override the model's preprocessing: height and width of the input, in pixels."""
    crop_pct: float | None = None
    """Override the model's preprocessing: share of the resized image that the centre crop keeps."""
    interpolation: str | None = None
    """Override the model's preprocessing: bicubic, bilinear or nearest."""
    mean: tuple[float, ...] | None = None
    """Override the model's preprocessing: mean of each colour, for pixels in 0..1."""
    std: tuple[float, ...] | None = None
    """Override the model's preprocessing: standard deviation of each colour, for pixels in 0..1."""

    # Data
    train_batch_size: int = 64
    """Images in a fine-tuning batch of one process."""
    val_batch_size: int = 128
    """Images in a calibration or evaluation batch of one process."""
    num_workers: int = 4
    """Processes that read images, for each process of the job; 0 reads in the process itself."""
    prefetch: int = 2
    """Batches that each of them reads ahead."""
    calib_samples: int | Literal["auto"] = 0
    """Training images for the statistics, chosen class-balanced by the seed; 0 takes all; auto stops when the plan
    has settled."""
    limit_val: int = 0
    """Validation images, chosen class-balanced by the seed; 0 takes all."""

    # Pruning
    keep_ratio: float = 0.65
    """Share of the hidden MLP channels to keep, in (0, 1], unless a target is given."""
    target_macs: str | None = None
    """In the place of keep_ratio: MACs of one image, as 0.94G, or as a share of the dense model's, as 0.75 or 75%."""
    target_params: str | None = None
    """In the place of keep_ratio: parameters, as 4.3M, or as a share of the dense model's."""
    target_latency_ms: float | None = None
    """In the place of keep_ratio: milliseconds of a batch on this device."""
    target_speedup: float | None = None
    """In the place of keep_ratio: how many times as fast as the dense model on this device, above 1."""
    latency_batch: int | None = None
    """Images in the batch that is timed; by default val_batch_size on a GPU, on a CPU what takes about a second."""
    criterion: Criterion = "auto"
    """Which channels go: auto (the plan whose answers stay nearest to the dense model's), variance (the paper),
    output_variance, elimination, random, l1, l2, lamp, taylor, snip; see docs/refit.md."""
    global_pruning: bool = False
    """Rank the channels of all layers together; otherwise every layer keeps the same share. auto decides itself."""
    equal_widths: bool = False
    """Return layers of one width exactly the same number of channels, as checkpoints without vbp need them."""
    norm_per_layer: bool = False
    """With --criterion variance: divide the variances of a layer by their mean before ranking."""
    compensation: Compensation = "refit"
    """What stands in for removed channels: a prediction from those that stay (refit), their mean in the next bias
    (mean), or nothing (none)."""
    covariance_tokens: float = COVARIANCE_TOKENS
    """With refit: share of the tokens of each image that count for the covariance, in (0, 1]."""
    ridge: float = RIDGE
    """How much the refit is held back, as a share of each kept channel's variance."""
    refit_producers: Wish = "auto"
    """With refit: also refit the layers that make the hidden channels, by a Gauss-Newton step in each MLP, where
    there is one of two layers with a known activation between them (auto), always (on) or never (off)."""
    refit_stream: Wish = "auto"
    """With refit: also bring the residual stream back to the dense model's, by a fit at three depths, where
    there is one (auto), always (on) or never (off)."""
    refit_head: Wish = "auto"
    """With refit: also refit the last layer to the dense model's answers, where the model ends in a linear layer
    (auto), always (on) or never (off)."""
    refit_views: int | Literal["auto"] = "auto"
    """With refit: how many views of each image the refits after surgery read, one in so many as for evaluation, the
    others random crops; auto is 4 on a GPU and 1 on a CPU."""
    round_to: int | Literal["auto"] = 1
    """Keep channel counts at multiples of this; 8 or 64 suit most hardware; auto takes what suits the device."""
    min_keep_ratio: float = 0.02
    """Floor: no layer keeps a smaller share than this."""
    bottleneck: bool = False
    """Prune inside attention too: value channels, and query and key channels in pairs, the same in every head."""
    attn_keep_ratio: float | None = None
    """With --bottleneck: share of the channels of every head to keep; keep_ratio unless given."""
    stats_path: Path | None = None
    """A statistics.safetensors of the same model and data, reused in the place of a calibration pass."""

    # Fine-tuning
    epochs_ft: int = 10
    """Epochs of fine-tuning; 0 only prunes."""
    lr_ft: float = 1.5e-5
    """Peak learning rate of AdamW, down to 0 by a cosine over all steps."""
    use_kd: bool = False
    """Distil from the unpruned model."""
    kd_alpha: float = 0.7
    """With --use_kd: weight of the cross-entropy."""
    kd_beta: float = 0.3
    """With --use_kd: weight of the divergence from the teacher."""
    kd_T: float = 2.0  # noqa: N815 (the published flag)
    """With --use_kd: temperature."""
    grad_accum: int = 1
    """Batches whose gradients make one step of the optimizer."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises from 0 to its peak."""
    clip_grad: float | None = None
    """Largest norm of the gradient; larger ones are scaled down to it."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    mixup: float = 0.0
    """Alpha of Mixup; 0 leaves it out."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 leaves it out."""
    ema: bool = False
    """Evaluate and save a moving average of the weights."""
    ema_decay: float = 0.9998
    """With --ema: what remains of the average at each step."""

    # Speed and memory
    amp: Amp = "auto"
    """Autocast of statistics, evaluation and fine-tuning: bf16, fp16, off, or auto (bf16 where the GPU has it)."""
    compile: bool = False
    """Compile student and teacher for fine-tuning (torch.compile)."""
    matmul_precision: MatmulPrecision = "high"
    """Float32 products on a GPU: high uses TF32, highest does not."""
    grad_checkpointing: bool = False
    """Keep fewer activations in fine-tuning and compute them again: less memory, about a third slower."""

    # Long runs
    resume: str | None = None
    """Go on from the last checkpoint in save_dir, if there is one (auto), or from a checkpoint or run folder."""
    checkpoint_minutes: float = 30.0
    """Besides one at the end of each epoch, write a checkpoint every so many minutes; 0 does not."""
    log_dir: Path | None = None
    """Folder for TensorBoard."""
    timeout_minutes: float = 30.0
    """Longest wait of one process for another before the job ends with an error."""

    # Run
    save_dir: Path = Path("./output/vbp")
    """Where log, checkpoints and report go: ./output/vbp unless told otherwise."""
    overwrite: bool = False
    """Replace the results of another run in save_dir."""
    seed: int = 0
    """Seed of subsets, order and augmentation."""
    device: str = "auto"
    """auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N; under torchrun a GPU for each process."""
    disable_ddp: bool = False
    """Run as one plain process, without torchrun."""
    local_rank: Annotated[int | None, tyro.conf.arg(help="Accepted and ignored: older launchers pass it.")] = None
    push_to_hub: str | None = None
    """OWNER/NAME: upload the pruned model with a model card there when the run has ended."""
    compare_uncompensated: bool = False
    """Also evaluate the pruned model without compensation, for the report."""

    # For programs alone: the command lines do not show these.
    model_kwargs: Annotated[dict[str, Any], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)
    hflip: Annotated[bool, tyro.conf.Suppress] = True
    crop_scale: Annotated[tuple[float, float], tyro.conf.Suppress] = (0.08, 1.0)

    @property
    def budget(self) -> Budget:
        """Return what the pruned model may cost.

        Raises:
            InputError: More than one budget was given, or its number is none.
        """
        targets = {name: getattr(self, name) for name in _TARGETS if getattr(self, name) is not None}
        if not targets or self.keep_ratio != _default("keep_ratio"):
            targets["keep_ratio"] = self.keep_ratio
        return Budget.of(**targets)

    @property
    def needs(self) -> frozenset[Need]:
        """Return what must be collected from the calibration images."""
        needs: set[Need] = {"statistics", *needs_of([self.criterion])}
        if self.compensation == "refit":
            needs.add("covariance")
        return frozenset(needs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data from which the run can be repeated."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> RunConfig:
        """Read what `to_dict` gave.

        Raises:
            InputError: A name is unknown or the data path is missing.
        """
        fields = {field.name: field for field in dataclasses.fields(RunConfig)}
        unknown = sorted(set(value) - set(fields))
        if unknown or "data_path" not in value:
            raise InputError(
                f"a run's configuration must hold data_path and known names, got unknown {unknown}; "
                "use the config.json of a run of this version"
            )
        paths = {"checkpoint", "convnext_checkpoint", "stats_path", "save_dir", "log_dir"}
        read: dict[str, Any] = {
            name: Path(item)
            if name in paths and item is not None
            else (tuple(item) if isinstance(item, list) else item)
            for name, item in value.items()
        }
        return RunConfig(**read)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def check_config(config: RunConfig) -> None:
    """Check the values that need no file, before any work.

    Raises:
        InputError: A value is out of range, or flags contradict each other.
    """
    _check_ranges(config)
    _check_effect(config)
    if config.push_to_hub is not None:
        check_repository(config.push_to_hub)
    if config.convnext_checkpoint is not None and config.checkpoint is not None:
        raise InputError("checkpoint and convnext_checkpoint were both given; give the one that holds the weights")


def _check_ranges(config: RunConfig) -> None:
    _ = config.budget
    TokenSample(config.covariance_tokens)
    check_ridge(config.ridge)
    if config.refit_views != "auto" and config.refit_views < 1:
        raise InputError(f"refit_views must be at least 1 or auto, got {config.refit_views}; 1 reads images once")
    if config.latency_batch is not None and config.latency_batch < 1:
        raise InputError(f"latency_batch must be at least 1, got {config.latency_batch}; 1 times single images")
    for name, usual in (("train_batch_size", 64), ("val_batch_size", 128), ("grad_accum", 1), ("prefetch", 2)):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}; {usual} is usual")
    counts = ("num_workers", "limit_val", "epochs_ft", "seed", "weight_decay", "warmup_epochs", "mixup", "cutmix")
    for name in (*counts, "checkpoint_minutes", *(("calib_samples",) if config.calib_samples != "auto" else ())):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"{name} must be at least 0, got {getattr(config, name)}; leave it out for the default")
    if not 0 < config.lr_ft < 1:
        raise InputError(f"lr_ft must be in (0, 1), got {config.lr_ft}; the paper uses 1.5e-5")
    for name, usual_share in (("label_smoothing", 0.1), ("ema_decay", 0.9998)):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{name} must be in [0, 1), got {getattr(config, name)}; {usual_share} is usual")
    for name in ("clip_grad", "timeout_minutes"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be above 0, got {value}; leave it out for the default")
    if 0 < config.epochs_ft <= config.warmup_epochs:
        raise InputError(
            f"warmup_epochs must be below epochs_ft, got {config.warmup_epochs} and {config.epochs_ft}; warm up for "
            "fewer epochs"
        )


def _check_effect(config: RunConfig) -> None:
    """Refuse flags that would change nothing: whoever gives them expects something else."""
    _check_criterion(config)
    if config.equal_widths and config.global_pruning:
        raise InputError(
            "equal_widths keeps as many channels in layers of one width and global_pruning lets layers compete, got "
            "both; leave one of them out"
        )
    if config.norm_per_layer and not config.global_pruning:
        raise InputError(
            "norm_per_layer changes nothing unless layers are ranked together, got it without global_pruning; "
            "add --global_pruning or leave --norm_per_layer out"
        )
    if config.resume is not None and config.overwrite:
        raise InputError(
            "resume keeps what is in save_dir and overwrite replaces it, got both; leave one of them out"
        )
    if config.prefetch != 2 and config.num_workers == 0:
        raise InputError(
            f"prefetch changes nothing without num_workers, got {config.prefetch} with num_workers 0; leave "
            "--prefetch out or give --num_workers"
        )
    if config.attn_keep_ratio is not None and not config.bottleneck:
        raise InputError(
            "attn_keep_ratio changes nothing unless attention is pruned, got it without bottleneck; add --bottleneck "
            "or leave --attn_keep_ratio out"
        )
    idle = _changed(config, _TUNING)
    if config.epochs_ft == 0 and idle:
        raise InputError(
            f"{', '.join(idle)} change nothing without fine-tuning, got them with epochs_ft 0; leave them out or "
            "give more --epochs_ft"
        )
    _check_idle(config, ("kd_alpha", "kd_beta", "kd_T"), "use_kd", "distillation")
    _check_idle(config, ("ema_decay",), "ema", "a moving average")


def _check_criterion(config: RunConfig) -> None:
    if config.criterion == "auto" and config.compensation != "refit":
        raise InputError(
            f"the criterion auto chooses for the refit, got compensation {config.compensation}; leave --compensation "
            "out or choose another criterion"
        )
    if config.criterion == "auto" and config.global_pruning:
        raise InputError(
            "the criterion auto decides itself how many channels each layer keeps, got global_pruning; leave "
            "--global_pruning out or choose another criterion"
        )
    if config.norm_per_layer and config.criterion != "variance":
        raise InputError(
            f"norm_per_layer divides variances, got criterion {config.criterion}; add --criterion variance or leave "
            "--norm_per_layer out"
        )
    for name in (*REFITS, "refit_views"):
        if config.compensation != "refit" and (wish := getattr(config, name)) != "auto":
            raise InputError(
                f"{name} changes nothing without the refit, got {wish} with compensation {config.compensation}; "
                f"leave --{name} out, or choose the compensation refit"
            )
    if config.refit_views != "auto" and all(getattr(config, name) == "off" for name in REFITS):
        raise InputError(
            f"refit_views changes nothing where nothing is refitted after surgery, got {config.refit_views} with "
            f"{', '.join(REFITS)} off; leave --refit_views out"
        )
    if "covariance" not in config.needs:
        for name in ("covariance_tokens", "ridge"):
            if getattr(config, name) != _default(name):
                raise InputError(
                    f"{name} changes nothing without covariances, got {getattr(config, name)}; choose the "
                    f"compensation refit or leave --{name} out"
                )


def _changed(config: RunConfig, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(config, name) != _default(name)]


def _check_idle(config: RunConfig, names: tuple[str, ...], switch: str, what: str) -> None:
    idle = _changed(config, names)
    if idle and not getattr(config, switch):
        raise InputError(
            f"{', '.join(idle)} change nothing without {what}, got them without {switch}; add --{switch} or leave "
            "them out"
        )


def _default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(RunConfig) if field.name == name)
