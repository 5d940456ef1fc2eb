"""What the consumer of removed channels gets in their place: their mean contribution, added to its bias.

b' = b + sum_{p removed} W[:, p] mu[p]
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def mean_shift(
    weight: Float[Tensor, "out hidden *kernel"],
    mean: Float[Tensor, "hidden"],
    removed: Int[Tensor, "removed"],
) -> Float[Tensor, "out"]:
    """Return what the removed channels add to the consumer's output on average: `sum_p W[:, p] mu[p]`.

    A convolution's kernel is summed over space first, which is exact where no padding meets the channels. Computed
    in float64, since the sum over many channels is added to a bias of the same size.

    Args:
        weight: The consumer's weight, before any channel is removed.
        mean: Mean of each hidden channel.
        removed: Indices of the channels that go.

    Source: VBP paper, section 3.3.

    Example:
        >>> vbp.mean_shift(torch.tensor([[2.0, 3.0]]), torch.tensor([0.5, 1.0]), torch.tensor([1])).item()
        3.0
    """
    columns = weight.detach()[:, removed].double()
    if columns.ndim > 2:
        columns = columns.flatten(2).sum(2)
    return columns @ mean.to(columns)[removed]


def grouped_mean_shift(
    weight: Float[Tensor, "out hidden_per_group *kernel"],
    mean: Float[Tensor, "hidden"],
    removed: Int[Tensor, "removed"],
    groups: int,
) -> Float[Tensor, "out"]:
    """Return what removed channels, counted over all groups, add on average to a grouped convolution's output.

    Each group of outputs reads its own group of inputs; with `groups == hidden` (depthwise) a removed channel shifts
    its own outputs alone. The kernel is summed over space, exact where no padding meets the channels.

    Source: VBP paper, section 3.3, for a block-diagonal weight.
    """
    kernels = weight.detach().double()
    if kernels.ndim > 2:
        kernels = kernels.flatten(2).sum(2)
    gone = kernels.new_zeros(mean.shape[0])
    gone[removed] = mean.to(kernels)[removed]
    blocks = kernels.reshape(groups, kernels.shape[0] // groups, kernels.shape[1])
    return (blocks @ gone.reshape(groups, -1, 1)).reshape(-1)
