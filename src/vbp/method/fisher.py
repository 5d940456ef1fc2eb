"""How much a model's prediction depends on each site's consumer: second moments of its weight gradients, sketched.

Let E be an error of a consumer's weights (bias included). Without labels, and up to second order in E, it moves the
model's predictions by

    KL(dense || changed) = 1/2 mean_i <E, G_i>^2,        G_i = sum_t g_t [h_t; 1]',

where h_t is what the consumer reads at token or position t of image i, and g_t the gradient of u'z there: z are the
logits, u a random vector whose covariance is the Fisher information of the prediction. The sum over t stands inside
the square: errors of one image's tokens add up, or cancel. The mean is taken as the product of an input metric
M = mean_i G_i' G_i and an output metric D = mean_i G_i G_i' of trace 1:

    KL = 1/2 tr(D E M E').

A kernel over several positions has one E and one G for each of its offsets. M and D are their sums, and each offset
counts with an equal share of M: what the offsets' errors do together is left out.

Source: Amari (1998), natural gradient; Martens, Grosse (2015) and Gupta, Koren, Singer (2018), the factored form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vbp.method.covariance import ChannelCovariance
from vbp.method.principal import head_blocks

# Share of the sensitivity in the metric that refit and elimination use; the rest is the plain covariance, which says
# what the few images' gradients happen not to say.
SHARE = 0.5


@dataclass(frozen=True)
class SiteSensitivity:
    """Hold sums over `images` images at one site's consumer, float64.

    `inputs` is the sum of G'G, its last row and column that of the bias; `outputs` the sum of GG', without the bias.
    Channels are counted from `pivot`, which is near their means.
    """

    images: int
    pivot: Float[Tensor, "hidden"]
    inputs: Float[Tensor, "hidden_and_one hidden_and_one"]
    outputs: Float[Tensor, "out out"]

    def merge(self, other: SiteSensitivity) -> SiteSensitivity:
        """Return the sums over both sets of images."""
        moved = other.recentred(self.pivot)
        return SiteSensitivity(
            self.images + other.images, self.pivot, self.inputs + moved.inputs, self.outputs + moved.outputs
        )

    def recentred(self, pivot: Float[Tensor, "hidden"]) -> SiteSensitivity:
        """Return the sums with the channels counted from another pivot; `outputs` stays that of the old one."""
        shift = torch.eye(len(self.inputs), dtype=self.inputs.dtype, device=self.inputs.device)
        shift[:-1, -1] = self.pivot - pivot
        return SiteSensitivity(self.images, pivot, shift @ self.inputs @ shift.T, self.outputs)

    def to(self, device: torch.device | str) -> SiteSensitivity:
        """Move to another device."""
        return SiteSensitivity(self.images, self.pivot.to(device), self.inputs.to(device), self.outputs.to(device))

    def blended_covariance(self, covariance: ChannelCovariance, share: float = SHARE) -> ChannelCovariance:
        """Return the input metric as a covariance in the place of the plain one, mixed with it.

        Both are brought to one trace first; `share` is that of the sensitivity, in [0, 1]. The result has the mean
        and the covariance under which the least squared error is the least KL: the refit takes them as they are.
        """
        here = self.recentred(covariance.mean)
        plain = covariance.covariance
        trace = here.inputs.diagonal()[:-1].sum()
        if share == 0 or not float(trace) > 0:
            return covariance  # the prediction depends on no channel, or the share is 0
        scale = plain.trace() / trace
        mixed = share * scale * here.inputs
        mixed[:-1, :-1] += (1 - share) * plain
        mixed[-1, -1] += 1 - share
        step = mixed[:-1, -1] / mixed[-1, -1]
        centred = mixed[:-1, :-1] - mixed[-1, -1] * torch.outer(step, step)
        centred = (centred + centred.T) / 2
        return ChannelCovariance(covariance.count, covariance.mean + step, centred * (covariance.count - 1))

    def scaled_weight(
        self, weight: Float[Tensor, "out hidden *kernel"], covariance: ChannelCovariance
    ) -> Float[Tensor, "out hidden *kernel"]:
        """Return the root of the output metric times a consumer's weight: with it, removals cost nats of KL.

        `covariance` is the plain one, not `blended_covariance` of it.
        """
        offsets = weight[0, 0].numel()
        values, vectors = torch.linalg.eigh(self.outputs.double())
        here = self.recentred(covariance.mean)
        nats = 0.5 * here.inputs.diagonal()[:-1].sum() / (self.images * offsets)
        scale = nats / covariance.covariance.trace().clamp_min(torch.finfo(torch.float64).tiny)
        share = values.clamp_min(0) / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
        root = (vectors * share.sqrt()).T * scale.clamp_min(0).sqrt()
        scaled: Tensor = root @ weight.detach().double().flatten(1)
        return scaled.reshape(weight.shape)


@dataclass(frozen=True)
class LogitSensitivity:
    """Hold sums over `images` images at the queries and keys of one attention, by head, float64.

    With T = sum_t g_t q_t', q the queries and g the gradient there, <E, T> is what a change of the logits q'k to
    q'(I + E')k does. `query` is the sum of T'T, `key` that of TT': as g_t is a mixture of keys that sums to nothing
    over constants, both take the place of the plain moments of queries and of centred keys.
    """

    images: int
    query: Float[Tensor, "heads size size"]
    key: Float[Tensor, "heads size size"]

    def merge(self, other: LogitSensitivity) -> LogitSensitivity:
        """Return the sums over both sets of images."""
        return LogitSensitivity(self.images + other.images, self.query + other.query, self.key + other.key)

    def blended(
        self, query: ChannelCovariance, key: ChannelCovariance, share: float = SHARE
    ) -> tuple[ChannelCovariance, ChannelCovariance]:
        """Return moments of queries, about zero, and of keys that are mixed with the sensitivity, head by head.

        Both are brought to one trace first; between heads they are zero.
        """
        about_zero = query.covariance + torch.outer(query.mean, query.mean)
        queries = _mixed(about_zero, self.query, share) * (query.count - 1)
        keys = _mixed(key.covariance, self.key, share) * (key.count - 1)
        return (
            ChannelCovariance(query.count, torch.zeros_like(query.mean), queries),
            ChannelCovariance(key.count, key.mean, keys),
        )


def _mixed(
    plain: Float[Tensor, "hidden hidden"], sums: Float[Tensor, "heads size size"], share: float
) -> Float[Tensor, "hidden hidden"]:
    blocks, here = head_blocks(plain, len(sums)), sums.to(plain)
    ours, theirs = (matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] for matrix in (blocks, here))
    # A head on which no prediction depends keeps its plain moments.
    told = theirs > 0
    mixed = (1 - share) * blocks + share * ours / torch.where(told, theirs, torch.ones_like(theirs)) * here
    return torch.block_diag(*torch.where(told, mixed, blocks))  # type: ignore[no-untyped-call, no-any-return]


def sensitivity_bytes(sizes: Sequence[tuple[int, int]]) -> int:
    """Return the memory that the running sums of sites of these (hidden, out) channels take, on the device, in bytes.

    During the pass what the consumers read and return in a batch is held until its gradients are known.
    """
    return sum(8 * ((hidden + 1) ** 2 + hidden + out**2) for hidden, out in sizes)


# float16 holds no gradient below 6e-8; a power of two changes no other digit.
FP16_SCALE = 2.0**12


def fisher_direction(
    logits: Float[Tensor, "images classes"], noise: Float[Tensor, "images classes"]
) -> Float[Tensor, "images classes"]:
    """Return for each image a random vector whose covariance is the Fisher information of its prediction.

    With p = softmax(z) that is diag p - p p'. The gradient of a class drawn from p has the same covariance, but where
    the model is confident it is nearly always close to zero and rarely large: more images would be needed. `noise`
    are independent standard normal numbers.
    """
    probabilities = logits.double().softmax(-1)
    spread = probabilities.sqrt() * noise
    return (spread - probabilities * spread.sum(-1, keepdim=True)).to(logits.dtype)
