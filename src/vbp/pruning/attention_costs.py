"""What each direction of an attention's heads costs, in the nats in which `auto` counts the channels of MLPs.

A direction goes from all heads of a layer at once, with its query, key and value, the last ones of the principal
basis first. Its cost is what the divergence of the predictions grows by, to second order where the dense model is:

    values    1/2 E |R W_P (o_P - A o_S)|^2, R the root of the output metric, o_P predicted from what stays (ridge),
    logits    1/2 sum_heads sum_{i > r} s_i^2 t / (tr Sq tr Sk),  s_i^2 the costs of `query_key_basis`,

for with T = sum_t g_t q_t' (`vbp.method.fisher`) a change E of the logits costs 1/2 E<E, T>^2, and E[T T'] and
E[T' T], of trace t, stand for the moments of keys and queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.method.covariance import ChannelCovariance
from vbp.method.elimination import strictly_rising
from vbp.method.principal import head_blocks, query_key_basis, value_basis
from vbp.method.ridge import RIDGE, as_matrix, reconstruction, ridge_coefficients
from vbp.pruning.attention import changed_covariance
from vbp.sites.site import Site
from vbp.statistics.statistics import KEY, QUERY, Statistics

# Costs are computed at this many ranks, and in a straight line between them.
_RANKS = 16


def direction_costs(
    model: nn.Module,
    unit: Sequence[Site],
    statistics: Statistics,
    metrics: Mapping[str, ChannelCovariance],
    *,
    ridge: float = RIDGE,
) -> Float[Tensor, "size"]:
    """Return what each direction of an attention costs, in nats, the first ones most.

    Where the costs of single ranks do not rise as directions go, neighbours share theirs.

    Args:
        model: The dense model.
        unit: The value site, the query/key site, or both; any basis must serve them.
        statistics: With covariances and sensitivities.
        metrics: From `refit_metrics`.
        ridge: Of the refit.
    """
    lost = torch.zeros(unit[0].hidden // unit[0].heads + 1, dtype=torch.float64)
    for site in unit:
        more = (
            _values(model, site, statistics, metrics, ridge) if site.consumer else _logits(site, statistics, metrics)
        )
        lost = lost + more
    from sklearn.isotonic import isotonic_regression  # slow to import

    # From the last direction, which goes first.
    single = (lost[:-1] - lost[1:]).flip(0)
    rising = torch.as_tensor(isotonic_regression(single.numpy()), dtype=torch.float64)
    return strictly_rising(rising.clamp_min(0)).flip(0)


def _values(
    model: nn.Module, site: Site, statistics: Statistics, metrics: Mapping[str, ChannelCovariance], ridge: float
) -> Float[Tensor, "size_and_one"]:
    """Return the nats that go where the first 0, 1, ... directions of all heads stay."""
    weight = model.get_submodule(site.consumer).weight
    assert isinstance(weight, Tensor)
    heads, size, device = site.heads, site.hidden // site.heads, weight.device
    covariance = metrics[site.name].to(device).covariance
    by_head = as_matrix(weight).unflatten(1, (heads, -1)).movedim(1, 0)  # type: ignore[no-untyped-call]
    basis = value_basis(head_blocks(covariance, heads), by_head)
    turned = changed_covariance(metrics[site.name].to(device), basis.value).covariance
    columns = basis.columns.movedim(0, 1).flatten(1)
    plain, sensitivity = statistics.covariances[site.name].to(device), statistics.sensitivities[site.name].to(device)
    out, hidden, *kernel = weight.shape
    weighed = sensitivity.scaled_weight(columns.reshape(out, *kernel, hidden).movedim(-1, 1), plain)
    everything = torch.arange(site.hidden, device=device).view(heads, size)
    ranks = torch.linspace(0, size, min(size, _RANKS) + 1).round().long().tolist()
    found = []
    for rank in ranks:
        keep, removed = everything[:, :rank].flatten(), everything[:, rank:].flatten()
        coefficients = ridge_coefficients(turned, keep, removed, metrics[site.name].ridge(ridge))
        found.append(reconstruction(site.name, turned, weighed, coefficients, keep, removed).refit)
    return _between(ranks, found)


def _logits(
    site: Site, statistics: Statistics, metrics: Mapping[str, ChannelCovariance]
) -> Float[Tensor, "size_and_one"]:
    sensitivity = statistics.logit_sensitivities[site.name]
    query, key = metrics[site.name + QUERY], metrics[site.name + KEY]
    moment = head_blocks(query.covariance + torch.outer(query.mean, query.mean), site.heads)
    keys = head_blocks(key.covariance, site.heads)
    traces = moment.diagonal(dim1=-2, dim2=-1).sum(-1) * keys.diagonal(dim1=-2, dim2=-1).sum(-1)
    told = sensitivity.query.diagonal(dim1=-2, dim2=-1).sum(-1).to(traces) / max(1, sensitivity.images)
    nats = 0.5 * told / torch.where(traces > 0, traces, torch.ones_like(traces))
    cost = (query_key_basis(moment, keys).cost * nats[:, None]).sum(0)
    return torch.cat([cost.flip(0).cumsum(0).flip(0), cost.new_zeros(1)]).cpu()


def _between(ranks: Sequence[int], values: Sequence[float]) -> Float[Tensor, "size_and_one"]:
    return torch.from_numpy(np.interp(range(ranks[-1] + 1), ranks, values))
