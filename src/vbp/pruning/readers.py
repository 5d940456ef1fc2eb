"""The weights by which layers read a site's channels: of one layer, or of all that read them, as one matrix.

Where several layers read the same channels, what a channel's removal costs is a sum over them. Each layer sees the
channels with moments of its own; as one matrix their rows serve in the metric of the consumer, C, after its channels
are scaled by how much more they vary at that layer:

    W = [W_0; W_1 D_1; ...],   D_r = diag(sqrt(var_r / var_0))

Exact where the layers read the same values, as the two that follow a fire module of SqueezeNet. Otherwise every
channel alone costs what it should, and correlations are taken to be those at the consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vbp.method.covariance import ChannelCovariance
from vbp.method.ridge import as_matrix, block_diagonal
from vbp.sites.layers import groups_of, in_groups, without_groups
from vbp.sites.site import Reader, Site
from vbp.statistics.statistics import Statistics

# Share of the typical variance that joins the consumer's: what varies by rounding alone there is no measure.
_FLOOR = 1e-6


def columns(model: nn.Module, reader: Reader, hidden: int) -> Float[Tensor, "out hidden *kernel"]:
    """Return the columns of a layer that read the channels of a site; a view, but for a grouped convolution."""
    weight = model.get_parameter(f"{reader.layer}.weight").detach()
    return without_groups(weight, groups_of(model.get_submodule(reader.layer))).narrow(1, reader.first, hidden)


def set_columns_(
    model: nn.Module,
    reader: Reader,
    keep: Int[Tensor, "kept"],
    fitted: Float[Tensor, "out kept *kernel"],
    hidden: int,
) -> Float[Tensor, "out kept *kernel"]:
    """Set the columns of some channels, in the weight's precision; return what they gained, in float64."""
    before = columns(model, reader, hidden)
    fitted = fitted.to(before.dtype)
    gained = fitted.double() - before[:, keep].double()
    before[:, keep] = fitted
    groups = groups_of(model.get_submodule(reader.layer))
    if groups > 1:
        model.get_parameter(f"{reader.layer}.weight").detach().copy_(in_groups(before, groups))
    return gained


def metric_of(
    model: nn.Module, reader: Reader, covariance: Float[Tensor, "hidden hidden"]
) -> Float[Tensor, "hidden hidden"]:
    """Return a covariance without what a grouped convolution cannot use: that between channels of two groups."""
    groups = groups_of(model.get_submodule(reader.layer))
    return covariance if groups == 1 else block_diagonal(covariance, groups)


def ridge_of(model: nn.Module, reader: Reader, measured: ChannelCovariance, least: float) -> float:
    """Return the penalty of a layer's refit: at least that which so many samples of its channels ask for."""
    return measured.ridge(least, groups_of(model.get_submodule(reader.layer)))


def few_samples(model: nn.Module, sites: Sequence[Site], statistics: Statistics, least: float) -> str:
    """Return a sentence about the refits whose penalty few samples raise above the least; empty if there are none."""
    raised = {}
    for site in sites:
        for reader in site.readers:
            if (measured := statistics.covariances.get(reader.key)) is not None:
                ridge = ridge_of(model, reader, measured, least)
                if ridge > least:
                    raised[reader.key] = ridge
    if not raised:
        return ""
    name = max(raised, key=lambda key: raised[key])
    measured = statistics.covariances[name]
    return (
        f"the refits of {len(raised)} layers have a ridge above {least:g}, up to {raised[name]:.3g} at {name}, which "
        f"has {len(measured.mean)} channels and {measured.count} samples; more images lower it"
    )


def joint_matrix(
    model: nn.Module,
    site: Site,
    statistics: Statistics,
    scaled: Callable[[Reader, Tensor], Tensor] = lambda reader, weight: weight,
) -> Float[Tensor, "rows hidden"]:
    """Return the weights of all layers that read a site as one matrix, in float64, for the consumer's metric.

    Args:
        model: The dense model.
        site: One that a layer reads.
        statistics: Of this model.
        scaled: Bring the weight of a layer to the unit in which the costs of different layers are added.
    """
    parts = []
    consumer = statistics.moments[site.name].m2 / statistics.moments[site.name].count
    typical = torch.where(consumer > 0, consumer, torch.nan).nanmedian().nan_to_num(1.0)
    for reader in site.readers:
        matrix = as_matrix(scaled(reader, columns(model, reader, site.hidden)))
        if reader.key != site.name:
            own = statistics.moments[reader.key].m2 / statistics.moments[reader.key].count
            matrix = matrix * (own / (consumer + _FLOOR * typical)).sqrt().to(matrix)
        parts.append(matrix)
    return torch.cat(parts)
