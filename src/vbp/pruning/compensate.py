"""Change layers so that they compensate the channels that will go: mean shift, or refit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.covariance import ChannelCovariance
from vbp.method.mean_shift import mean_shift
from vbp.method.query_key import LogitRefit, logit_refit
from vbp.method.ridge import Reconstruction, fold_into_weight, reconstruction, ridge_coefficients
from vbp.pruning.plan import SitePlan
from vbp.pruning.readers import columns, metric_of, ridge_of, set_columns_
from vbp.sites.site import Reader, Site
from vbp.statistics.statistics import KEY, QUERY


def compensate_(
    model: nn.Module,
    entries: Sequence[SitePlan],
    means: Mapping[str, Tensor],
    covariances: Mapping[str, ChannelCovariance] | None,
    ridge: float,
) -> tuple[Reconstruction, ...]:
    """Compensate the consumers, and queries for lost query/key channels, at full width; nothing is cut.

    Without covariances it shifts by the means alone, which leaves query/key channels out.

    Returns:
        The errors before and after the refit, one for each layer that reads a site; nothing without covariances.

    Raises:
        InputError: A refit cannot be solved; the model is then untouched.
    """
    # All are solved before the first is applied.
    refits: list[_Refit] = []
    if covariances is not None:
        for entry in entries:
            for reader in entry.site.readers:
                refits.append(_solve(model, entry, reader, covariances, means[reader.key], ridge))
            if entry.keep and refits_logits(entry.site):
                refits.append(_solve_queries(model, entry, covariances, ridge))
    for entry in entries:
        removed = torch.tensor(entry.removed, dtype=torch.long)
        for reader in entry.site.readers:
            shift = mean_shift(columns(model, reader, entry.site.hidden), means[reader.key], removed)
            add_to_bias_(model.get_submodule(reader.layer), shift)
    for _, apply_ in refits:
        apply_()
    return tuple(error for error, _ in refits)


# The errors of a site, and the function that applies its refit.
_Refit = tuple[Reconstruction, Callable[[], None]]


def _solve(
    model: nn.Module,
    entry: SitePlan,
    reader: Reader,
    covariances: Mapping[str, ChannelCovariance],
    mean: Tensor,
    ridge: float,
) -> _Refit:
    name, weight = reader.key, columns(model, reader, entry.site.hidden)
    keep = torch.tensor(entry.keep, dtype=torch.long, device=weight.device)
    removed = torch.tensor(entry.removed, device=weight.device)
    try:
        measured = covariances[name].to(weight.device)
        covariance = metric_of(model, reader, measured.covariance)
        coefficients = ridge_coefficients(covariance, keep, removed, ridge_of(model, reader, measured, ridge))
    except InputError as error:
        raise InputError(f"site {name}: {error}") from error
    fitted = fold_into_weight(weight, coefficients, keep, removed)
    errors = reconstruction(name, covariance, weight, coefficients, keep, removed)
    return errors, partial(_apply_, model, reader, entry, fitted, mean)


def _apply_(model: nn.Module, reader: Reader, entry: SitePlan, fitted: Tensor, mean: Tensor) -> None:
    """Set the kept columns, and take what they add on average out of the bias again."""
    keep = torch.tensor(entry.keep, dtype=torch.long)
    # Of the columns as rounded to the weight's precision: the mean of the output stays what it was.
    added = set_columns_(model, reader, keep, fitted, entry.site.hidden)
    add_to_bias_(model.get_submodule(reader.layer), -mean_shift(added, mean[keep], torch.arange(len(keep))))


def refits_logits(site: Site) -> bool:
    """Return whether queries can compensate channels of this site: nothing may stand between layer and logit."""
    return site.kind == "query_key" and site.exact and not site.inner and not site.parameters


def _solve_queries(
    model: nn.Module, entry: SitePlan, covariances: Mapping[str, ChannelCovariance], ridge: float
) -> _Refit:
    site, layer = entry.site, model.get_submodule(entry.site.producers[0])
    assert isinstance(layer.weight, Tensor)
    device = layer.weight.device
    try:
        seen = covariances[site.name + QUERY].to(device)
        query, mean = seen.covariance, seen.mean
        key = covariances[site.name + KEY].to(device).covariance
        if layer.bias is None:
            query, mean = query + torch.outer(mean, mean), torch.zeros_like(mean)
        keep, removed = (torch.tensor(channels, device=device) for channels in (entry.keep, entry.removed))
        fit = logit_refit(site.name, query, mean, key, keep, removed, heads=site.heads, ridge=ridge)
    except InputError as error:
        raise InputError(f"site {site.name}: {error}") from error
    return fit.error, partial(_apply_to_queries_, layer, entry, fit)


def _apply_to_queries_(layer: nn.Module, entry: SitePlan, fit: LogitRefit) -> None:
    _, places = entry.site.places[0]
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    rows = torch.tensor([places[channel] for channel in entry.keep], device=weight.device)
    with torch.no_grad():
        old = weight[rows].double()
        weight[rows] = (old + (fit.turn @ old.flatten(1)).view_as(old)).to(weight.dtype)
        if isinstance(bias, Tensor):
            old_bias = bias[rows].double()
            bias[rows] = (old_bias + fit.turn @ old_bias + fit.shift).to(bias.dtype)


def add_to_bias_(layer: nn.Module, shift: Tensor) -> None:
    """Add to a layer's bias; a layer without one gains it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    bias = layer.bias
    if bias is None:
        layer.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
        return
    assert isinstance(bias, nn.Parameter)
    add_in_float64_(bias, shift)


def add_in_float64_(values: Tensor, shift: Tensor) -> None:
    """Add to a parameter or buffer with one rounding to its own precision, not two."""
    with torch.no_grad():
        values.copy_((values.double() + shift.to(values.device)).to(values.dtype))


@contextmanager
def restored_unless_kept(model: nn.Module, layers: Iterable[str]) -> Iterator[Callable[[], None]]:
    """Restore the weights of layers in the end, whatever happened, unless the yielded function was called."""
    saved = copied_weights(model, layers)
    try:
        yield saved.clear
    finally:
        put_weights_(model, saved)


LayerWeights = dict[tuple[str, str], nn.Parameter | None]


def copied_weights(model: nn.Module, layers: Iterable[str]) -> LayerWeights:
    """Return copies of weight and bias of some layers."""
    names = itertools.product(layers, ("weight", "bias"))
    return {(layer, name): copy.deepcopy(getattr(model.get_submodule(layer), name)) for layer, name in names}


def weights_between(start: LayerWeights, end: LayerWeights, share: float) -> LayerWeights:
    """Return weights that lie at a share of the way between two; a bias that is only in the end begins at 0."""
    between: LayerWeights = {}
    for place, last in end.items():
        first = start[place]
        if last is not None:
            moved = last.lerp(last.new_zeros(()).expand_as(last) if first is None else first, 1 - share)
            last = nn.Parameter(moved.detach(), requires_grad=last.requires_grad)
        between[place] = last
    return between


def put_weights_(model: nn.Module, weights: LayerWeights) -> None:
    """Put what `copied_weights` returned into a model."""
    for (layer, name), parameter in weights.items():
        model.get_submodule(layer).register_parameter(name, parameter)
