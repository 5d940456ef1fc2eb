"""Estimate BatchNorm statistics again on calibration images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vbp.errors import InputError
from vbp.modes import evaluation_mode


def reestimate_batchnorm_(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None) -> None:
    """Replace the running mean and variance of every BatchNorm by the average over all batches.

    Pruning changes the variance that a BatchNorm sees, which the mean shift does not mend. Nothing else of the model
    changes; dropout stays off.

    Args:
        model: A model with BatchNorm layers.
        loader: Image tensors "batch channels height width", or tuples that begin with one; each batch counts the
            same, so give batches of one size, as large as the memory allows.
        device: Where the images go; by default where the model is.

    Raises:
        InputError: The model has no BatchNorm with running statistics, or there is no image; nothing changes then.
    """
    norms = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        raise InputError(
            f"{type(model).__name__} has no BatchNorm with running statistics; there is none to estimate"
        )
    target = torch.device(device) if device is not None else next(model.parameters()).device
    before = [
        (norm, norm.momentum, {key: value.clone() for key, value in norm.state_dict().items()}) for norm in norms
    ]
    images = 0
    try:
        with evaluation_mode(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over batches
                norm.train()
            for batch in loader:
                pixels = batch if isinstance(batch, Tensor) else batch[0]
                model(pixels.to(target, non_blocking=True))
                images += pixels.shape[0]
    finally:
        for norm, momentum, state in before:
            norm.momentum = momentum
            if not images:
                norm.load_state_dict(state)
    if not images:
        raise InputError("BatchNorm statistics need at least one image, got none; check the loader")
