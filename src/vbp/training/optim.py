"""The learning rate over a run and over the layers of a model; a moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vbp.errors import InputError
from vbp.training.losses import check_below_one


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Set up an exponential moving average of weights and running statistics; it begins after the first step."""
    check_below_one("ema_decay", decay, usual=0.9998)
    mix = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(average: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        if average[0].is_floating_point():
            mix(average, current, count)
            return
        # A mean of whole numbers, rounded down, would shift the indices of a Swin by one.
        for mine, other in zip(average, current, strict=True):
            mine.copy_(other)

    averaged = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    averaged.requires_grad_(False)
    return averaged


def vectors_apart(model: nn.Module, learning_rate: float, factor: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return weights, and biases and norms with `factor` times the rate and no decay, as two groups."""
    parameters = list(model.parameters())
    weights = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = (
        {"params": weights, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": factor * learning_rate, "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def make_schedule(optimizer: Optimizer, steps: int, warmup_steps: int = 0) -> LRScheduler:
    """Take the optimizer's rate as the peak: it is reached after the warm-up, and 0 after all steps.

    Step `k` of a warm-up of `w` steps, counted from 0, has `(k + 1) / (w + 1)` of the peak, so that the first step
    after it is the first with the whole.

    Source: Loshchilov, Hutter (2017), section 3, without restarts.
    """
    if warmup_steps == 0:
        return CosineAnnealingLR(optimizer, T_max=max(1, steps))
    if not 0 < warmup_steps < steps:
        raise InputError(
            f"the warm-up must end before fine-tuning does, got {warmup_steps} warm-up steps of {steps}; lower "
            "--warmup_epochs"
        )

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / (steps - warmup_steps)))) / 2

    return LambdaLR(optimizer, share)


def check_layer_decay(factor: float, model: nn.Module | None = None) -> None:
    """Raise InputError if the learning rate cannot fall by this factor from layer to layer, of a model if given."""
    if not 0 < factor <= 1:
        raise InputError(f"layer_decay must be in (0, 1], got {factor}; 0.75 is usual, 1 leaves it out")
    if factor < 1 and model is not None and not hasattr(model, "group_matcher"):
        raise InputError(
            f"layer_decay needs a model of timm, which says what its layers are, got {type(model).__name__}; leave "
            "--layer_decay out"
        )


def layer_groups(model: nn.Module, learning_rate: float, factor: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters of each layer with its learning rate, `factor` times that of the layer after it.

    The classifier has the whole rate; the weight decay is the same for all.

    Raises:
        InputError: The factor is out of range, or the model does not say what its layers are.

    Source: Clark et al. (2020), ELECTRA, appendix B; the layers are those of timm.
    """
    check_layer_decay(factor, model)
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]  # takes seconds to import

    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model, weight_decay, weight_decay_exclude_1d=False, layer_decay=factor
    )
    return [group | {"lr": learning_rate * group["lr_scale"]} for group in groups]


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    *,
    layer_decay: float = 1.0,
    vector_rate: float | None = None,
) -> Iterable[Any]:
    """Return what the optimizer changes, in groups where rates or decay differ.

    Raises:
        InputError: The model does not say what its layers are, where their rates differ.
    """
    if layer_decay != 1:
        return layer_groups(model, learning_rate, layer_decay, weight_decay)
    if vector_rate is None:
        return model.parameters()
    return vectors_apart(model, learning_rate, vector_rate, weight_decay)
