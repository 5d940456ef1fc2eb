"""Check a configuration before any work, without reading a file."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import get_args

from vbp.deploy.hub import check_repository
from vbp.errors import InputError
from vbp.method.ridge import check_ridge
from vbp.method.sampling import TokenSample
from vbp.pruning.criteria import needs_of
from vbp.pruning.make_plan import check_ratios
from vbp.recipes.config import PruneConfig, RunConfig, default_of
from vbp.recipes.options import REFITS, Role, fields_with
from vbp.recipes.sweep_config import SweepConfig
from vbp.report.sweep_report import Setting
from vbp.runtime.choices import Compensation, Scope
from vbp.runtime.files import check_path
from vbp.statistics.evidence import Need
from vbp.training.losses import DistillationLoss, check_below_one

_AFTER_REFIT = (*REFITS, "refit_views")
_COVARIANCE = ("covariance_tokens", "ridge")


def check_config(config: RunConfig) -> None:
    """Check the values that need no file, before any work."""
    _check_paths(config)
    check_pruning(config)
    _check_ranges(config)
    _check_effect(config)
    if config.push_to_hub is not None:
        check_repository(config.push_to_hub)
    if config.convnext_checkpoint is not None and config.checkpoint is not None:
        raise InputError("checkpoint and convnext_checkpoint were both given; give the one that holds the weights")


def check_labelled(what: str, labelled: bool) -> None:
    """Raise InputError if there are no labels, or the model has no classes; `what` says what they are for."""
    if not labelled:
        raise InputError(f"{what}, got images without labels or a model without classes; prune it by vbp run")


def check_without_labels(config: RunConfig, needs: Collection[Need], *, classifies: bool) -> None:
    """Check that a run needs no labels, where the images have none, or the model has no classes.

    Raises:
        InputError: The criterion ranks by labels, or fine-tuning would learn from them.
    """
    if config.objective == "logits" and not classifies:
        raise InputError(
            f"the objective logits needs a model with a head, got {config.model_name} without; give --objective auto"
        )
    why = "images without class folders" if classifies else "a model that is preserved by its features"
    if "gradients" in needs:
        raise InputError(
            f"the criterion {config.criterion} ranks by labels, got {why}; choose one that needs none, as auto"
        )
    if classifies and config.epochs_ft > 0:
        raise InputError(
            f"fine-tuning a classifier needs labels, got {why}; give --epochs_ft 0, or a folder for each class"
        )
    by_labels = ("use_kd", "kd_alpha", "kd_beta", "kd_T", "label_smoothing", "mixup", "cutmix")
    if idle := _changed(config, by_labels):
        raise InputError(
            f"{', '.join(idle)} change nothing without labels: such a model is distilled from the dense one by its "
            "output alone; leave them out"
        )


def _check_paths(config: RunConfig) -> None:
    models = ("model_name", "checkpoint", "convnext_checkpoint", "teacher")
    for name in (*models, "stats_path", "save_dir", "log_dir", "resume", "text_embeddings"):
        check_path(getattr(config, name) or "", name)


def check_pruning(config: PruneConfig) -> None:
    """Check the values that say how a model is pruned, whatever it is."""
    _ = config.budget
    TokenSample(config.covariance_tokens)
    check_ridge(config.ridge)
    if config.refit_views != "auto" and config.refit_views < 1:
        raise InputError(f"refit_views must be at least 1 or auto, got {config.refit_views}; 1 reads images once")
    if config.latency_batch is not None and config.latency_batch < 1:
        raise InputError(f"latency_batch must be at least 1, got {config.latency_batch}; 1 times single images")
    _check_criterion(config)
    if config.objective != "zeroshot":
        _check_unused(config, ("text_embeddings",), "without the objective zeroshot", "add --objective zeroshot")
    elif config.text_embeddings is None:
        raise InputError("the objective zeroshot needs text embeddings, got none; give --text_embeddings FILE")
    if config.equal_widths and config.global_pruning:
        raise InputError(
            "equal_widths keeps as many channels in layers of one width and global_pruning lets layers compete, got "
            "both; leave one of them out"
        )
    if not config.global_pruning:
        _check_unused(config, ("norm_per_layer",), "unless layers are ranked together", "add --global_pruning")
    if not config.bottleneck:
        _check_unused(config, ("attn_keep_ratio",), "unless attention is pruned", "add --bottleneck")
    if config.budget.quantity == "keep_ratio":
        targeted = ("best_effort", "cost_aware")
        _check_unused(config, targeted, "without a target", "give --target_speedup or another target")
    if not config.global_pruning and config.criterion != "auto":
        _check_unused(config, ("cost_aware",), "unless layers are ranked together", "add --global_pruning")


def _check_ranges(config: RunConfig) -> None:
    counts = ("train_batch_size", "val_batch_size", "grad_accum", "prefetch", "max_pixels")
    for name, usual in ((name, default_of(name)) for name in counts):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}; {usual} is usual")
    amounts = ("num_workers", "limit_val", "epochs_ft", "seed", "weight_decay", "warmup_epochs", "mixup", "cutmix")
    for name in (*amounts, "checkpoint_minutes", *(("calib_samples",) if config.calib_samples != "auto" else ())):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"{name} must be at least 0, got {getattr(config, name)}; leave it out for the default")
    if not 0 < config.lr_ft < 1:
        raise InputError(f"lr_ft must be in (0, 1), got {config.lr_ft}; the paper uses 1.5e-5")
    DistillationLoss(config.kd_alpha, config.kd_beta, config.kd_T, config.label_smoothing)
    check_below_one("ema_decay", config.ema_decay, usual=0.9998)
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
    if config.resume is not None and config.overwrite:
        raise InputError(
            "resume keeps what is in save_dir and overwrite replaces it, got both; leave one of them out"
        )
    if config.num_workers == 0:
        _check_unused(config, ("prefetch",), "without num_workers", "give --num_workers")
    idle = _changed(config, fields_with(RunConfig, Role.TUNING))
    if config.epochs_ft == 0 and idle:
        raise InputError(
            f"{', '.join(idle)} change nothing without fine-tuning, got them with epochs_ft 0; leave them out or "
            "give more --epochs_ft"
        )
    _check_idle(config, ("kd_alpha", "kd_beta", "kd_T", "teacher"), "use_kd", "distillation")
    _check_idle(config, ("ema_decay",), "ema", "a moving average")


def _check_criterion(config: PruneConfig) -> None:
    if config.criterion == "auto" and config.compensation != "refit":
        raise InputError(
            f"the criterion auto chooses for the refit, got compensation {config.compensation}; leave --compensation "
            "out or choose another criterion"
        )
    if config.norm_per_layer and config.criterion != "variance":
        raise InputError(
            f"norm_per_layer divides variances, got criterion {config.criterion}; add --criterion variance or leave "
            "--norm_per_layer out"
        )
    if config.compensation != "refit":
        remedy = "choose the compensation refit"
        _check_unused(config, _AFTER_REFIT, "without the refit", remedy, f" with compensation {config.compensation}")
    if config.refit_views != "auto" and all(getattr(config, name) == "off" for name in REFITS):
        raise InputError(
            f"refit_views changes nothing where nothing is refitted after surgery, got {config.refit_views} with "
            f"{', '.join(REFITS)} off; leave --refit_views out"
        )
    if "covariance" not in config.needs:
        _check_unused(config, _COVARIANCE, "without covariances", "choose the compensation refit")


def _check_unused(
    config: PruneConfig | SweepConfig, names: Sequence[str], without: str, remedy: str, besides: str = ""
) -> None:
    for name in names:
        if (value := getattr(config, name)) != default_of(name):
            raise InputError(
                f"{name} changes nothing {without}, got {value}{besides}; {remedy}, or leave --{name} out"
            )


def _changed(config: RunConfig, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(config, name) != default_of(name)]


def _check_idle(config: RunConfig, names: tuple[str, ...], switch: str, what: str) -> None:
    idle = _changed(config, names)
    if idle and not getattr(config, switch):
        raise InputError(
            f"{', '.join(idle)} change nothing without {what}, got them without {switch}; add --{switch} or leave "
            "them out"
        )


def settings_of(
    criteria: Sequence[str],
    compensations: Sequence[str],
    keep_ratios: Sequence[float],
    scopes: Sequence[str] = ("global",),
) -> tuple[Setting, ...]:
    """Return every combination once, ratios innermost.

    `l2/none` stands for this criterion with this compensation alone. `auto` is `auto/refit`, and finds the widths of
    the layers itself: it is there once, as global, whatever the scopes.
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


def check_sweep(config: SweepConfig) -> None:
    """Check the values that need no file, before any work."""
    needs = sweep_needs(config.settings)
    for ratio in config.keep_ratios:
        check_ratios(ratio, config.min_keep_ratio, 1 if config.round_to == "auto" else config.round_to)
    check_config(config.run_config())
    if "covariance" not in needs:
        _check_unused(config, _COVARIANCE, "without refit or elimination", "ask for one of them")
    if not any(setting.compensation == "refit" for setting in config.settings):
        _check_unused(config, _AFTER_REFIT, "without the refit", "ask for it")
    if config.stats_path is not None and not needs & {"statistics", "covariance"}:
        raise InputError(
            f"stats_path changes nothing, for nothing that was asked for reads statistics, got {config.stats_path}; "
            "leave --stats_path out"
        )
