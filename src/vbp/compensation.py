"""What the consumer of removed channels gets in their place: pure tensor functions."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def mean_shift(
    weight: Float[Tensor, "out hidden *kernel"],
    mean: Float[Tensor, "hidden"],
    removed: Int[Tensor, "removed"],
) -> Float[Tensor, "out"]:
    """Give what the removed channels add to the consumer's output on average: `sum_p W[:, p] mu[p]`.

    A convolution's kernel is summed over space first, which is exact where no padding meets the channels. Computed
    in float64, since the sum over many channels is added to a bias of the same size.

    Args:
        weight: The consumer's weight, before any channel is removed.
        mean: Mean of each hidden channel.
        removed: Indices of the channels that go.

    Source: VBP paper, section 3.3.
    """
    columns = weight.detach()[:, removed].double()
    if columns.ndim > 2:
        columns = columns.flatten(2).sum(2)
    return columns @ mean.to(columns)[removed]
