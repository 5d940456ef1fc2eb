"""Scores of other published criteria, over the same sites: random, magnitude, LAMP, Taylor, SNIP.

A channel is scored by the weights that go with it, its group: the rows of its producers, the columns of its
consumer, and its place in the norms and depthwise convolutions between. Biases and bare parameters do not count, as
in Torch-Pruning, whose importances return the same scores for the same group (there the mean over the layers of a
group, here the sum, which ranks alike).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.method.scores import lamp, magnitude, mean_normalised, snip, taylor
from vbp.sites.site import Site, WeightSlice, weight_slices


def random_scores(sites: Sequence[Site], *, seed: int = 0) -> dict[str, Float[Tensor, "hidden"]]:
    """Draw the scores of each site evenly from [0, 1); they depend on the seed and the site's name alone."""
    scores = {}
    for site in sites:
        digest = hashlib.sha256(f"{seed} {site.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        scores[site.name] = torch.rand(site.hidden, generator=generator, dtype=torch.float64)
    return scores


def magnitude_scores(model: nn.Module, sites: Sequence[Site], *, power: int) -> dict[str, Float[Tensor, "hidden"]]:
    """Sum `|w|^power` over each channel's group, and divide by the mean of the site; power 2 is the squared L2 norm.

    Weights of different layers differ in size for reasons that have nothing to do with importance; without the
    division a global ranking would empty the layers of small weights.

    Source: Li et al. (2017), for L1; Torch-Pruning's GroupMagnitudeImportance, for groups and the division.
    """
    return {name: mean_normalised(values) for name, values in _magnitudes(model, sites, power).items()}


def lamp_scores(model: nn.Module, sites: Sequence[Site]) -> dict[str, Float[Tensor, "hidden"]]:
    """Divide the squared L2 norm of each channel's group by the sum of all that are not smaller in the site.

    The largest score of each site is 1, and by this the sites compare.

    Source: Lee et al. (2021), Layer-Adaptive Magnitude-based Pruning; of groups in the place of single weights.
    """
    return {name: lamp(squares) for name, squares in _magnitudes(model, sites, 2).items()}


def taylor_scores(
    model: nn.Module, sites: Sequence[Site], gradients: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "hidden"]]:
    """Estimate how the loss changes if a channel's weights vanish: `|sum w * g|` of each layer, summed over layers.

    It is a loss in every site, so the sites compare as they are.

    Source: Molchanov et al. (2019), Importance Estimation for Neural Network Pruning.
    """
    return _by_gradients(model, sites, gradients, taylor)


def snip_scores(
    model: nn.Module, sites: Sequence[Site], gradients: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "hidden"]]:
    """Sum the connection sensitivities `|w * g|` over each channel's group.

    They compare across sites as they are: SNIP ranks all weights of a network together.

    Source: Lee et al. (2019), SNIP; summed over groups.
    """
    return _by_gradients(model, sites, gradients, snip)


def _magnitudes(model: nn.Module, sites: Sequence[Site], power: int) -> dict[str, Tensor]:
    return _summed(model, sites, lambda part, weight: magnitude(part.of(weight), power))


def _by_gradients(
    model: nn.Module,
    sites: Sequence[Site],
    gradients: Mapping[str, Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    return _summed(
        model, sites, lambda part, weight: score(part.of(weight).cpu(), part.of(gradients[part.parameter]).cpu())
    )


def _summed(
    model: nn.Module, sites: Sequence[Site], score: Callable[[WeightSlice, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the sum of a score over the weights that go with each site's channels, on the CPU."""
    sums = {}
    for site in sites:
        scores = [score(part, model.get_parameter(part.parameter)) for part in weight_slices(model, site)]
        sums[site.name] = torch.stack(scores).sum(0).cpu()
    return sums
