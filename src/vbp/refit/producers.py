"""Refit the layers that make the hidden channels, too, so that they suit the channels that are left.

The refit of a site changes the consumer alone: it predicts what is gone from what stays. The producer can do its
share, for its rows were made for a layer in which all channels took part. Site by site, both layers take one
Gauss-Newton step towards what the dense MLP returns (`vbp.method.gauss_newton`), at the positions that matter to the
predictions (`vbp.statistics.mlp_samples`): many positions for few numbers, without labels.

An eighth of the images is held out and decides, site by site, which of two steps is taken, one bold and one
cautious, or none. Predictions are not compared here: statistics and plan have usually seen the images that
could, and look better on them than on new ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.activations import Activation
from vbp.method.gauss_newton import HiddenFit, HiddenLayers, MLPSample, fit_hidden
from vbp.pruning.compensate import add_in_float64_, add_to_bias_
from vbp.runtime.log_file import told_if_slow
from vbp.sites.branches import has_layer
from vbp.sites.layers import output_channels
from vbp.sites.mlp import FoundMLP
from vbp.sites.site import Site
from vbp.statistics.mlp_samples import MLPSamples

_log = logging.getLogger(__name__)

# Ridge and damping of `fit_hidden`. In early blocks of DeiT-tiny, where all tokens matter, the bold step leaves 0.8
# of the error on other images, the cautious one 0.86; in late ones, where one token matters, only the latter helps.
_PENALTIES = ((0.01, 0.1), (1.0, 1.0))


@dataclass(frozen=True)
class ProducerRefit:
    """Tell what refitting the producers did, on the held-out eighth of the images of the samples.

    `errors` are those of each site's MLP output before and after, as a share of the output's variance, each position
    and direction weighted by how much the predictions depend on it.
    """

    images: int
    errors: Mapping[str, tuple[float, float]]

    def sentence(self) -> str:
        """Return in words what became of the model."""
        before, after = (sum(one[place] for one in self.errors.values()) for place in range(2))
        better, sites = sum(one[1] < one[0] for one in self.errors.values()), max(1, len(self.errors))
        return (
            f"the producers of {better} of {len(self.errors)} sites are refitted to {self.images} images: mean error "
            f"of the outputs {before / sites:.4f} -> {after / sites:.4f} of their variance (on images left out)"
        )


@told_if_slow(_log, "refitting the producers")
def refit_producers_(pruned: nn.Module, samples: MLPSamples) -> ProducerRefit:
    """Bring each pruned MLP nearer to the dense one, once all steps are found; the model is on its device.

    Same result on all processes of the samples, which must all call it; the sites are shared out among them.

    Raises:
        InputError: A value that the pruned model computes is not finite.
    """
    left = [mlp for mlp in samples.mlps if has_layer(pruned, mlp.site.consumer)]
    widths = {mlp: output_channels(pruned.get_submodule(mlp.site.producers[0])) for mlp in left}
    mlps = [mlp for mlp, width in widths.items() if width < mlp.site.hidden]
    steps = _steps(pruned, mlps, samples)
    for mlp, step in zip(mlps, steps, strict=True):
        if step.better:
            add_step_(pruned, mlp.site, step)
    errors = {mlp.site.name: (step.before, step.after) for mlp, step in zip(mlps, steps, strict=True)}
    return ProducerRefit(samples.images, errors)


def _steps(pruned: nn.Module, mlps: Sequence[FoundMLP], samples: MLPSamples) -> list[HiddenFit]:
    """Return what is to be added to both layers of each site; each process finds some, all get all."""
    processes, mine = samples.session.processes, {}
    for place in range(processes.rank, len(mlps), processes.world):
        site, activation = mlps[place].site, mlps[place].activation
        tried = (
            step_of(pruned, site, activation, samples.samples[site.name], ridge=ridge, damping=damping)
            for ridge, damping in _PENALTIES
        )
        mine[place] = min(tried, key=lambda step: step.after)
    merged = {place: step for part in processes.all_gather(mine) for place, step in part.items()}
    return [merged[place] for place in range(len(mlps))]


def step_of(
    model: nn.Module,
    site: Site,
    activation: Activation | None,
    sample: MLPSample,
    *,
    ridge: float,
    damping: float,
) -> HiddenFit:
    """Return what is to be added to the layers of a pruned model's MLP site, on the CPU, and the errors with it.

    The work is done where the model is. Without an activation, where the hidden layer is not a plain one, the
    consumer alone is fitted. Ridge and damping are as for `fit_hidden`.

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
    return replace(fit, layers=HiddenLayers(step, (fitted.consumer - layers.consumer).cpu()))


def add_step_(model: nn.Module, site: Site, step: HiddenFit) -> None:
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
