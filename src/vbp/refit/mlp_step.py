"""Fit the layers of one MLP inside a model: read them, take a step of `vbp.method.gauss_newton`, add it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.activations import Activation
from vbp.method.gauss_newton import HiddenLayers, MLPSample, fit_hidden
from vbp.pruning.compensate import add_in_float64_, add_to_bias_
from vbp.sites.site import Site


@dataclass(frozen=True)
class MLPStep:
    """Hold what is to be added to the layers of a site, on the CPU, and the errors without and with it."""

    layers: HiddenLayers
    before: float
    after: float

    @property
    def better(self) -> bool:
        """Return whether the step lowers the error."""
        return self.after < self.before


def step_of(
    model: nn.Module,
    site: Site,
    activation: Activation | None,
    sample: MLPSample,
    *,
    ridge: float,
    damping: float,
) -> MLPStep:
    """Return what is to be added to the layers of a pruned model's MLP site; the work is done where the model is.

    Without an activation, where the hidden layer is not a plain one, the consumer alone is fitted. Ridge and damping
    are as for `fit_hidden`.

    Raises:
        InputError: The output of the layers is not finite.
    """
    consumer = model.get_submodule(site.consumer)
    sample = sample.to(next(consumer.parameters()).device)
    dtype = sample.inputs.dtype
    hidden = None if activation is None else _matrix(model.get_submodule(site.producers[0]), dtype)
    layers = HiddenLayers(hidden, _matrix(consumer, dtype))
    try:
        fit = fit_hidden(layers, activation or _same, sample, ridge=ridge, damping=damping)
    except InputError as error:
        raise InputError(f"site {site.name}: {error}") from error
    fitted = fit.layers
    step = None if fitted.hidden is None or hidden is None else (fitted.hidden - hidden).cpu()
    return MLPStep(HiddenLayers(step, (fitted.consumer - layers.consumer).cpu()), fit.before, fit.after)


def add_step_(model: nn.Module, site: Site, step: MLPStep) -> None:
    """Add to the layers of a site what `step_of` returned."""
    if step.layers.hidden is not None:
        _add_(model.get_submodule(site.producers[0]), step.layers.hidden)
    _add_(model.get_submodule(site.consumer), step.layers.consumer)


def _same(values: Tensor) -> Tensor:
    return values


def _matrix(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return a layer's weight, its bias as the last column."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    column = weight.new_zeros(len(weight)) if bias is None else bias
    assert isinstance(column, Tensor)
    return torch.cat([weight.detach().flatten(1), column.detach()[:, None]], 1).to(dtype)


def _add_(layer: nn.Module, step: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    add_in_float64_(weight, step[:, :-1].reshape(weight.shape))
    add_to_bias_(layer, step[:, -1])
