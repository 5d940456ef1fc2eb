"""Check a configuration before any work, without reading a file."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from vbp.data.augmentation import check_augmentation
from vbp.deploy.hub import check_repository
from vbp.errors import InputError
from vbp.method.ridge import check_ridge
from vbp.method.sampling import TokenSample
from vbp.recipes.config import PruneConfig, RunConfig, default_of
from vbp.recipes.options import REFITS, Role, fields_with
from vbp.runtime.files import check_path
from vbp.statistics.evidence import Need
from vbp.training.drop_path import check_drop_path
from vbp.training.losses import DistillationLoss, check_below_one
from vbp.training.optim import check_layer_decay
from vbp.training.tuning_length import TuningLength

AFTER_REFIT = (*REFITS, "refit_views")
# Of those of fine-tuning, what tuning without labels reads too.
_BY_TUNING = (
    *("train_batch_size", "grad_accum", "weight_decay", "clip_grad"),
    *("compile", "grad_checkpointing", "checkpoint_minutes", "teacher"),
)
OF_COVARIANCE = ("covariance_tokens", "ridge")


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
    TuningLength.of(config.tune)
    if config.calib_views < 1:
        raise InputError(f"calib_views must be at least 1, got {config.calib_views}; 1 reads each image once")
    if config.calib_views > 1 and config.stats_path is not None:
        raise InputError(
            f"calib_views changes nothing where statistics come from a file, got {config.calib_views} with "
            f"stats_path {config.stats_path}; leave one of them out"
        )
    if config.refit_views != "auto" and config.refit_views < 1:
        raise InputError(f"refit_views must be at least 1 or auto, got {config.refit_views}; 1 reads images once")
    if config.latency_batch is not None and config.latency_batch < 1:
        raise InputError(f"latency_batch must be at least 1, got {config.latency_batch}; 1 times single images")
    _check_criterion(config)
    if config.objective != "zeroshot":
        check_unused(config, ("text_embeddings",), "without the objective zeroshot", "add --objective zeroshot")
    elif config.text_embeddings is None:
        raise InputError("the objective zeroshot needs text embeddings, got none; give --text_embeddings FILE")
    if config.equal_widths and config.global_pruning:
        raise InputError(
            "equal_widths keeps as many channels in layers of one width and global_pruning lets layers compete, got "
            "both; leave one of them out"
        )
    if not config.global_pruning:
        check_unused(config, ("norm_per_layer",), "unless layers are ranked together", "add --global_pruning")
    if not config.bottleneck:
        check_unused(config, ("attn_keep_ratio",), "unless attention is pruned", "add --bottleneck")
    if config.budget.quantity == "keep_ratio":
        targeted = ("best_effort", "cost_aware", "attention")
        check_unused(config, targeted, "without a target", "give --target_speedup or another target")
    _check_attention(config)
    if not config.global_pruning and config.criterion != "auto":
        check_unused(config, ("cost_aware",), "unless layers are ranked together", "add --global_pruning")


def _check_attention(config: PruneConfig) -> None:
    if config.criterion != "auto":
        check_unused(config, ("attention",), "without the criterion auto", "choose it")
    if config.attention == "on" and not config.shares_budget:
        other = "attn_keep_ratio" if config.attn_keep_ratio is not None else "cost_aware off"
        raise InputError(
            "attention on lets attention share the budget by what each direction costs and saves, got it with "
            f"{other}; leave one of them out"
        )
    if config.attention == "off" and config.bottleneck:
        raise InputError(
            "attention off keeps attention whole and bottleneck prunes it, got both; leave one of them out"
        )


def _check_ranges(config: RunConfig) -> None:
    counts = ("train_batch_size", "val_batch_size", "grad_accum", "prefetch", "max_pixels", "processes")
    for name, usual in ((name, default_of(name)) for name in counts):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}; {usual} is usual")
    amounts = ("num_workers", "limit_val", "epochs_ft", "seed", "weight_decay", "warmup_epochs", "mixup", "cutmix")
    for name in (*amounts, "checkpoint_minutes", *(("calib_samples",) if config.calib_samples != "auto" else ())):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"{name} must be at least 0, got {getattr(config, name)}; leave it out for the default")
    if not 0 < config.lr_ft < 1:
        raise InputError(f"lr_ft must be in (0, 1), got {config.lr_ft}; the paper uses 1.5e-5")
    check_augmentation(config.auto_augment, config.reprob)
    check_layer_decay(config.layer_decay)
    check_drop_path(config.drop_path)
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
        check_unused(config, ("prefetch",), "without num_workers", "give --num_workers")
    tuned = _BY_TUNING if config.tune != "off" else ()
    idle = [name for name in _changed(config, fields_with(RunConfig, Role.TUNING)) if name not in tuned]
    if config.epochs_ft == 0 and idle:
        raise InputError(
            f"{', '.join(idle)} change nothing without fine-tuning, got them with epochs_ft 0; leave them out or "
            "give more --epochs_ft"
        )
    distilled = [name for name in ("kd_alpha", "kd_beta", "kd_T", "teacher") if name not in tuned]
    _check_idle(config, distilled, "use_kd", "distillation")
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
        check_unused(config, AFTER_REFIT, "without the refit", remedy, f" with compensation {config.compensation}")
    if config.refit_views != "auto" and all(getattr(config, name) == "off" for name in REFITS):
        raise InputError(
            f"refit_views changes nothing where nothing is refitted after surgery, got {config.refit_views} with "
            f"{', '.join(REFITS)} off; leave --refit_views out"
        )
    if "covariance" not in config.needs:
        check_unused(config, OF_COVARIANCE, "without covariances", "choose the compensation refit")


def check_unused(config: object, names: Sequence[str], without: str, remedy: str, besides: str = "") -> None:
    """Refuse settings of these names that are not as by default, where they would change nothing."""
    for name in names:
        if (value := getattr(config, name)) != default_of(name):
            raise InputError(
                f"{name} changes nothing {without}, got {value}{besides}; {remedy}, or leave --{name} out"
            )


def _changed(config: RunConfig, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(config, name) != default_of(name)]


def _check_idle(config: RunConfig, names: Sequence[str], switch: str, what: str) -> None:
    idle = _changed(config, names)
    if idle and not getattr(config, switch):
        raise InputError(
            f"{', '.join(idle)} change nothing without {what}, got them without {switch}; add --{switch} or leave "
            "them out"
        )
