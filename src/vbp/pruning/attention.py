"""Turn the heads of an attention to their principal basis, in place: the model computes what it did before.

A plan whose entry has the basis `principal` keeps directions instead of channels. Surgery first changes the basis, of
the weights and of what was measured; then a direction is a channel like any other: it is cut, compensated, refitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.covariance import ChannelCovariance
from vbp.method.principal import head_blocks, query_key_basis, value_basis
from vbp.method.ridge import as_matrix
from vbp.pruning.plan import SitePlan
from vbp.statistics.statistics import KEY, QUERY

# Share of a head's largest variance that rounding may leave of none: moments are sums of products in float32.
_ROUNDING = 1e-6

Means = Mapping[str, Tensor]
Covariances = Mapping[str, ChannelCovariance]


def rotate_(
    model: nn.Module, entries: Sequence[SitePlan], means: Means | None, covariances: Covariances
) -> tuple[Means | None, Covariances]:
    """Change the basis of those entries whose plan is in the principal one.

    Args:
        model: At full width.
        entries: Those with another basis are left alone.
        means: Site name -> mean of each channel.
        covariances: Of value sites, queries and keys, by the names of `observed_names`.

    Returns:
        Means and covariances in the new basis, the directions of most variance first in each head.

    Raises:
        InputError: A covariance is missing, or has values that are not finite.
    """
    new_means, new = dict(means or {}), dict(covariances)
    for entry in entries:
        if entry.basis == "channels" or not entry.keep:
            continue
        if entry.site.kind == "value":
            change = _rotate_values_(model, entry, covariances)
            new[entry.site.name] = changed_covariance(covariances[entry.site.name], change)
            if means is not None:
                new_means[entry.site.name] = _by_heads(change, means[entry.site.name].to(change))
        else:
            for name, change in zip((QUERY, KEY), _rotate_queries_and_keys_(model, entry, covariances), strict=True):
                new[entry.site.name + name] = changed_covariance(covariances[entry.site.name + name], change)
    return None if means is None else new_means, new


def _rotate_values_(model: nn.Module, entry: SitePlan, covariances: Covariances) -> Float[Tensor, "heads size size"]:
    site, consumer = entry.site, model.get_submodule(entry.site.consumer)
    weight = consumer.weight
    assert isinstance(weight, Tensor)
    covariance = _finite(site.name, covariances).to(weight.device).covariance
    by_head = as_matrix(weight).unflatten(1, (site.heads, -1)).movedim(1, 0)  # type: ignore[no-untyped-call]
    basis = value_basis(head_blocks(covariance, site.heads), by_head)
    columns = basis.columns.movedim(0, 1).flatten(1)
    out, hidden, *kernel = weight.shape
    with torch.no_grad():
        weight.copy_(columns.reshape(out, *kernel, hidden).movedim(-1, 1).to(weight.dtype))
    ((name, places),) = site.places
    _mix_rows_(model.get_submodule(name), places, basis.value)
    return basis.value


def _rotate_queries_and_keys_(
    model: nn.Module, entry: SitePlan, covariances: Covariances
) -> tuple[Float[Tensor, "heads size size"], Float[Tensor, "heads size size"]]:
    site = entry.site
    (query, first), (key, second) = site.places
    device = next(model.get_submodule(query).parameters()).device
    queries, keys = (_finite(site.name + name, covariances).to(device) for name in (QUERY, KEY))
    moment = queries.covariance + torch.outer(queries.mean, queries.mean)
    basis = query_key_basis(head_blocks(moment, site.heads), head_blocks(keys.covariance, site.heads))
    _mix_rows_(model.get_submodule(query), first, basis.query)
    _mix_rows_(model.get_submodule(key), second, basis.key)
    return basis.query, basis.key


def _mix_rows_(layer: nn.Module, places: Sequence[int], change: Float[Tensor, "heads size size"]) -> None:
    """Replace the rows of each head, at these places, by their mixtures."""
    rows = list(places)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if isinstance(parameter, Tensor):
                parameter[rows] = _by_heads(change, parameter[rows].double()).to(parameter.dtype)


def _finite(name: str, covariances: Covariances) -> ChannelCovariance:
    found = covariances[name]
    if not bool(found.mean.isfinite().all() and found.m2.isfinite().all()):
        raise InputError(
            f"site {name}: the covariance must be one of finite samples, got values that are not finite; collect the "
            "statistics again"
        )
    return found


def changed_covariance(covariance: ChannelCovariance, change: Float[Tensor, "heads size size"]) -> ChannelCovariance:
    there = covariance.to(change.device)
    m2 = _by_heads(change, _by_heads(change, there.m2).T)
    # Of a direction without variance nothing but rounding is left, which may be negative.
    variance = m2.diagonal().reshape(change.shape[:2])
    nothing = (variance <= _ROUNDING * variance.amax(1, keepdim=True)).flatten()
    m2[nothing] = 0
    m2[:, nothing] = 0
    return ChannelCovariance(there.count, _by_heads(change, there.mean), (m2 + m2.T) / 2)


def _by_heads(change: Float[Tensor, "heads size size"], values: Tensor) -> Tensor:
    """Multiply the rows of each head by its matrix."""
    return (change @ values.reshape(*change.shape[:2], -1)).reshape(values.shape)
