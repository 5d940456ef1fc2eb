"""Scores of other published criteria, over the same sites: random, magnitude, LAMP, Taylor, SNIP.

A channel is judged by the weights that go with it, its group: the rows of its producers, the columns of its
consumer, and its place in the norms and depthwise convolutions between. Biases and bare parameters do not count, as
in Torch-Pruning, whose importances give the same scores for the same group (there the mean over the layers of a
group, here the sum, which ranks alike).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.sites.site import Site
from vbp.sites.weights import weight_slices


def random_scores(sites: Sequence[Site], *, seed: int = 0) -> dict[str, Float[Tensor, "hidden"]]:
    """Draw the scores of each site evenly from [0, 1); they depend on the seed and the site's name alone."""
    scores = {}
    for site in sites:
        digest = hashlib.sha256(f"{seed} {site.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        scores[site.name] = torch.rand(site.hidden, generator=generator, dtype=torch.float64)
    return scores


def magnitude_scores(model: nn.Module, sites: Sequence[Site], *, power: int) -> dict[str, Float[Tensor, "hidden"]]:
    """Sum `|w|^power` over each channel's group, and divide by the mean of the site.

    Weights of different layers differ in size for reasons that have nothing to do with importance; without the
    division a global ranking would empty the layers of small weights.

    Args:
        model: The dense model.
        sites: From `find_sites`.
        power: 1 for the L1 norm, 2 for the (squared) L2 norm.

    Source: Li et al. (2017), for L1; Torch-Pruning's GroupMagnitudeImportance, for groups and the division.
    """
    sums = _magnitudes(model, sites, power)
    return {name: values / _one_if_zero(values.mean()) for name, values in sums.items()}


def lamp_scores(model: nn.Module, sites: Sequence[Site]) -> dict[str, Float[Tensor, "hidden"]]:
    """Divide the squared L2 norm of each channel's group by the sum of all that are not smaller in the site.

    The largest score of each site is 1, and by this the sites compare.

    Source: Lee et al. (2021), Layer-Adaptive Magnitude-based Pruning; of groups in the place of single weights.
    """
    scores = {}
    for name, values in _magnitudes(model, sites, 2).items():
        rising, order = values.sort(stable=True)
        left = rising.flip(0).cumsum(0).flip(0)
        score = torch.empty_like(values)
        score[order] = rising / _one_if_zero(left)
        scores[name] = score
    return scores


def taylor_scores(
    model: nn.Module, sites: Sequence[Site], gradients: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "hidden"]]:
    """Estimate how the loss changes if a channel's weights vanish: `|sum w * g|` of each layer, summed over layers.

    It is a loss in every site, so the sites compare as they are.

    Args:
        model: The dense model.
        sites: From `find_sites`.
        gradients: From `collect_gradients`.

    Source: Molchanov et al. (2019), Importance Estimation for Neural Network Pruning.
    """
    return _by_products(model, sites, gradients, lambda products: products.sum(1).abs())


def snip_scores(
    model: nn.Module, sites: Sequence[Site], gradients: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "hidden"]]:
    """Sum the connection sensitivities `|w * g|` over each channel's group.

    They compare across sites as they are: SNIP ranks all weights of a network together.

    Args:
        model: The dense model.
        sites: From `find_sites`.
        gradients: From `collect_gradients`.

    Source: Lee et al. (2019), SNIP; summed over groups.
    """
    return _by_products(model, sites, gradients, lambda products: products.abs().sum(1))


def _magnitudes(model: nn.Module, sites: Sequence[Site], power: int) -> dict[str, Tensor]:
    return {
        site.name: _total(
            part.of(model.get_parameter(part.parameter)).abs().pow(power).sum(1)
            for part in weight_slices(model, site)
        )
        for site in sites
    }


def _by_products(
    model: nn.Module, sites: Sequence[Site], gradients: Mapping[str, Tensor], reduce: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    return {
        site.name: _total(
            reduce(part.of(model.get_parameter(part.parameter)).cpu() * part.of(gradients[part.parameter]).cpu())
            for part in weight_slices(model, site)
        )
        for site in sites
    }


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0).cpu()


def _one_if_zero(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))
