"""The configuration of a sweep: what it varies, and the flags of a run that it shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from vbp.errors import InputError
from vbp.method.ridge import RIDGE
from vbp.pruning.criteria import needs_of
from vbp.pruning.make_plan import check_ratios
from vbp.pruning.plan import Scope
from vbp.recipes.config import (
    COVARIANCE_TOKENS,
    REFITS,
    Amp,
    MatmulPrecision,
    ModelType,
    RunConfig,
    Wish,
    check_config,
)
from vbp.report.sweep_report import Compensation, Setting
from vbp.statistics.evidence import Need


def settings_of(
    criteria: Sequence[str],
    compensations: Sequence[str],
    keep_ratios: Sequence[float],
    scopes: Sequence[str] = ("global",),
) -> tuple[Setting, ...]:
    """Return every combination once, ratios innermost.

    Args:
        criteria: Names; `l2/none` stands for this criterion with this compensation alone. `auto` is `auto/refit`.
        compensations: For the criteria that name none, but `auto`.
        keep_ratios: Shares of the channels to keep.
        scopes: Of `global`, `per_layer` and `equal`. `auto` finds the widths of the layers itself: it is there once,
            as global, whatever the scopes.

    Raises:
        InputError: A value is unknown, out of range, without effect, or nothing is asked for.
    """
    for name, values in (("criteria", criteria), ("keep_ratios", keep_ratios), ("scopes", scopes)):
        if not values:
            raise InputError(f"{name} must hold at least one value, got none")
    for ratio in keep_ratios:
        check_ratios(ratio, 0.0, 1)
    _check_known("scope", scopes, get_args(Scope))
    methods: list[tuple[str, str, Sequence[str]]] = []
    for entry in criteria:
        criterion, slash, own = entry.partition("/")
        needs_of([criterion])
        if criterion == "auto":
            if slash and own != "refit":
                raise InputError(
                    f"criterion auto goes with compensation refit alone, got {entry}; write auto, or choose another "
                    "criterion"
                )
            methods.append((criterion, "refit", ("global",)))
            continue
        if not slash and not compensations:
            raise InputError(f"compensations must hold at least one value for criterion {criterion}, got none")
        methods += [(criterion, choice, scopes) for choice in ([own] if slash else compensations)]
    _check_known("compensation", [choice for _, choice, _ in methods], get_args(Compensation))
    return tuple(
        dict.fromkeys(
            Setting(criterion, compensation, scope, ratio)  # type: ignore[arg-type]
            for criterion, compensation, allowed in methods
            for scope in allowed
            for ratio in keep_ratios
        )
    )


def _check_known(what: str, values: Sequence[str], allowed: Sequence[str]) -> None:
    for value in values:
        if value not in allowed:
            raise InputError(f"{what} must be one of {', '.join(allowed)}, got {value!r}")


def sweep_needs(settings: Collection[Setting]) -> frozenset[Need]:
    """Return what must be collected from calibration images for some settings."""
    compensations = {setting.compensation for setting in settings}
    needs = set(needs_of(setting.criterion for setting in settings))
    if compensations & {"mean", "refit"}:
        needs.add("statistics")
    if "refit" in compensations:
        needs.add("covariance")
    return frozenset(needs)


@dataclass(frozen=True)
class SweepConfig:
    """Prune one dense model in many ways, each from the dense weights, and compare; nothing is fine-tuned.

    Example: vbp sweep --data_path DATA --model_name deit_tiny_patch16_224 --criteria variance/mean auto
    """

    data_path: str
    """Folder with train/<class>/ and val/<class>/; or hfds/... or wds/..., see docs/data.md."""

    # What varies
    keep_ratios: tuple[float, ...] = (0.95, 0.9, 0.8, 0.65, 0.5, 0.4)
    """Shares of the hidden MLP channels to keep, in (0, 1]."""
    criteria: tuple[str, ...] = ("variance/mean", "auto")
    """auto (always with refit, and with widths of its own whatever the scopes), variance, output_variance,
    elimination, random, l1, l2, lamp, taylor, snip; l2/none for one compensation alone."""
    compensations: tuple[str, ...] = ("mean", "refit")
    """What stands in for removed channels: none, mean, refit; for each criterion that names none, but auto."""
    scopes: tuple[str, ...] = ("global",)
    """global (the channels of all layers compete), per_layer (each keeps the same share), equal (layers of one width
    keep exactly as many), or several of them."""
    latency: bool = False
    """Also time each pruned model, in turns with the dense one."""
    covariance_tokens: float = COVARIANCE_TOKENS
    """Share of the tokens of each image that count for the covariance, in (0, 1]."""
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
    ridge: float = RIDGE
    """How much the refit is held back, as a share of each kept channel's variance."""

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
    val_batch_size: int = 128
    """Images in a calibration or evaluation batch of one process."""
    num_workers: int = 4
    """Processes that read images, for each process of the job; 0 reads in the process itself."""
    prefetch: int = 2
    """Batches that each of them reads ahead."""
    calib_samples: int = 0
    """Training images for statistics and gradients, chosen class-balanced by the seed; 0 takes all."""
    limit_val: int = 0
    """Validation images, chosen class-balanced by the seed; 0 takes all."""

    # Pruning
    round_to: int | Literal["auto"] = 1
    """Keep channel counts at multiples of this; 8 or 64 suit most hardware; auto takes what suits the device."""
    min_keep_ratio: float = 0.02
    """Floor: no layer keeps a smaller share than this."""
    bottleneck: bool = False
    """Prune inside attention too: value channels, and query and key channels in pairs, the same in every head."""
    stats_path: Path | None = None
    """A statistics.safetensors of the same model and data, reused in the place of a calibration pass."""

    # Speed and memory
    amp: Amp = "auto"
    """Autocast of statistics and evaluation: bf16, fp16, off, or auto (bf16 where the GPU has it); not of
    gradients."""
    matmul_precision: MatmulPrecision = "high"
    """Float32 products on a GPU: high uses TF32, highest does not."""
    timeout_minutes: float = 30.0
    """Longest wait of one process for another before the job ends with an error."""

    # Run
    save_dir: Path = Path("./output/sweep")
    """Where table, figure, statistics and log go; a sweep that was stopped there goes on."""
    overwrite: bool = False
    """Replace the results of another run in save_dir."""
    seed: int = 0
    """Seed of subsets, of sampled tokens, of sensitivities and of the random criterion."""
    device: str = "auto"
    """auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N; under torchrun a GPU for each process."""

    # For programs alone: the command lines do not show it.
    model_kwargs: Annotated[dict[str, Any], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Return all that is asked for.

        Raises:
            InputError: A value is unknown or out of range.
        """
        return settings_of(self.criteria, self.compensations, self.keep_ratios, self.scopes)

    def run_config(self) -> RunConfig:
        """Return the configuration by which model and data are loaded, as for a run that only prunes."""
        names = {field.name for field in dataclasses.fields(RunConfig)}
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}
        # What is needed of the images, and whether the folder may be written, is the sweep's to say: its own results
        # may be there.
        fixed = {"criterion": "variance", "compensation": "refit", "epochs_ft": 0, "overwrite": True}
        return RunConfig(**shared | fixed | {"keep_ratio": min(self.keep_ratios)})


def check_sweep(config: SweepConfig) -> None:
    """Check the values that need no file, before any work.

    Raises:
        InputError: A value is out of range, or flags contradict each other.
    """
    needs = sweep_needs(config.settings)
    for ratio in config.keep_ratios:
        check_ratios(ratio, config.min_keep_ratio, 1 if config.round_to == "auto" else config.round_to)
    check_config(config.run_config())
    for name, default in (("covariance_tokens", COVARIANCE_TOKENS), ("ridge", RIDGE)):
        value = getattr(config, name)
        if value != default and "covariance" not in needs:
            raise InputError(f"{name} changes nothing without refit or elimination, got {value}; leave --{name} out")
    for name in (*REFITS, "refit_views"):
        wish = getattr(config, name)
        if wish != "auto" and not any(setting.compensation == "refit" for setting in config.settings):
            raise InputError(f"{name} changes nothing without the refit, got {wish}; leave --{name} out")
    if config.stats_path is not None and not needs & {"statistics", "covariance"}:
        raise InputError(
            f"stats_path changes nothing, for nothing that was asked for reads statistics, got {config.stats_path}; "
            "leave --stats_path out"
        )
