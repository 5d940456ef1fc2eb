"""In which order channels are removed if the rest is refitted after each: greedy, exact, blocked.

`cost(S) = tr(W_P (C_PP - C_PS (C_SS + L)^-1 C_SP) W_P')` is the error of the consumer's output after the refit of
`ridge_coefficients`, plus the penalty that the refit pays: what the refit minimises, and an upper bound of the error.
With M = C + L it is `tr(W_P (M / M_SS) W_P')`, a Schur complement, less `sum_p L_p |w_p|^2`, which does not depend on
what else goes. The first part is the least squared error of the refitted weights w~ in the metric M, so the removal
of one more channel j is the optimal-brain-surgeon step on w~, and raises the cost by exactly

    d_j = |w~_j|^2 / K_jj - L_j |w_j|^2,        K = (M_SS)^-1, w_j the original column.

It can lie below zero by no more than the penalty. The step updates K and Q = w~'w~ by one rank each:

    K <- K - l l',   Q <- Q - l g' - g l',   l = K_:j / sqrt(K_jj),   g = Q_:j / sqrt(K_jj) - l Q_jj / (2 K_jj).

This is a pivoted Cholesky factorisation of K that takes Q along. Done channel by channel it reads and writes all of
K and Q for each; here only the diagonals follow each step, rows are brought up to date as they are needed, and the
matrices once in a block of steps, by matrix products. About hidden^3 multiply-adds a site, two matrices in memory.

Source: Hassibi, Stork (1993), for the increment; Harbrecht, Peters, Schneider (2012), for the deferred update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vbp.method.ridge import RIDGE, as_matrix, cholesky, ridge_penalty

# Steps between two updates of the matrices: more cost more in bringing rows up to date, fewer in memory traffic.
_BLOCK = 64


@dataclass(frozen=True)
class Elimination:
    """Hold the order in which the channels of a site go, the first to go first, and what that costs.

    Entry k of `cost` is the cost once the first k channels are gone, in variance of the consumer's output (summed
    over outputs and kernel offsets): the first is 0, the last the variance of the output itself. Where several heads
    must keep the same number, only every heads-th entry is a set that may be used.
    """

    order: Int[Tensor, "hidden"]
    cost: Float[Tensor, "hidden_and_one"]

    def to(self, device: torch.device | str) -> Elimination:
        """Move to another device."""
        return Elimination(self.order.to(device), self.cost.to(device))

    @property
    def scores(self) -> Float[Tensor, "hidden"]:
        """Return the cost of each channel's step, by channel, so that sorting them restores the order.

        The steps are made to rise (the largest so far), each by at least one unit in the last place.
        """
        steps = self.cost.diff()
        scores = torch.empty_like(steps)
        scores[self.order] = strictly_rising(steps)
        return scores


def strictly_rising(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return the largest value so far at each place, each at least one unit in the last place above the one before.

    Values are float64, not negative but for rounding. Sorting scores made this way restores their order; ties would
    be broken by channel index.
    """
    # The bits of positive floats are whole numbers in the same order: whole units are added as rising ranks.
    places = torch.arange(len(values), device=values.device)
    bits = values.cummax(0).values.clamp_min(torch.finfo(values.dtype).tiny).view(torch.int64)
    return ((bits - places).cummax(0).values + places).view(torch.float64)


def eliminate(
    covariance: Float[Tensor, "hidden hidden"],
    weight: Float[Tensor, "out hidden *kernel"],
    *,
    ridge: float = RIDGE,
    heads: int = 1,
) -> Elimination:
    """Remove one channel after the other, each time the one whose loss raises the cost least.

    The work is done where the covariance lies. With several heads, channels go in rounds, one from each, so that the
    heads keep the same number.

    Raises:
        InputError: The covariance is not finite or no covariance, or the ridge is out of range or too small.
    """
    cov = covariance.double()
    extra = ridge_penalty(cov, ridge)
    matrix = as_matrix(weight).to(cov.device)
    norms = extra * matrix.square().sum(0)
    inverse = torch.cholesky_inverse(cholesky(cov + torch.diag(extra), ridge))
    state = _State(inverse, matrix.T @ matrix, norms, torch.arange(len(cov), device=cov.device))
    rounds = _HeadBalance(len(cov), heads, cov.device)
    order, steps = [], []
    while len(state.channels):
        channels, increments = state.remove_block_(min(_BLOCK, len(state.channels)), rounds)
        order.append(channels)
        steps.append(increments)
    cost = torch.cat([cov.new_zeros(1), torch.cat(steps).cumsum(0)])
    return Elimination(torch.cat(order), cost)


class _HeadBalance:
    """Let each head lose one channel before any loses the next; with one head it blocks none."""

    def __init__(self, hidden: int, heads: int, device: torch.device) -> None:
        self._head = torch.arange(hidden, device=device) // (hidden // heads)
        self._lost = torch.zeros(heads, dtype=torch.int64, device=device)

    def blocked(self, channels: Int[Tensor, "left"]) -> Tensor | None:
        """Return which channels must wait; None if none."""
        if len(self._lost) == 1:
            return None
        return (self._lost > self._lost.min())[self._head[channels]]

    def record_(self, channel: Int[Tensor, "1"]) -> None:
        """Count a removal."""
        if len(self._lost) > 1:
            self._lost[self._head[channel]] += 1


@dataclass
class _State:
    """Hold what is left of a site: `inverse` is K, `gram` is Q, both of the channels `channels`."""

    inverse: Float[Tensor, "left left"]
    gram: Float[Tensor, "left left"]
    penalties: Float[Tensor, "left"]
    channels: Int[Tensor, "left"]

    def remove_block_(self, steps: int, rounds: _HeadBalance) -> tuple[Int[Tensor, "steps"], Float[Tensor, "steps"]]:
        """Take some steps; return the channels that went and what each cost.

        Nothing in a step waits for the device.
        """
        left = len(self.channels)
        # Row t of `low` and `mix` is l and g of step t: contiguous, for each is read by all later steps.
        low, mix = self.inverse.new_zeros(steps, left), self.inverse.new_zeros(steps, left)
        inverse_diagonal, gram_diagonal = self.inverse.diagonal().clone(), self.gram.diagonal().clone()
        gone = torch.zeros(left, dtype=torch.bool, device=low.device)
        places = torch.empty(steps, dtype=torch.int64, device=low.device)
        increments = low.new_empty(steps)
        for step in range(steps):
            cost = gram_diagonal / inverse_diagonal - self.penalties
            blocked = rounds.blocked(self.channels)
            waiting = gone if blocked is None else gone | blocked
            place = cost.masked_fill_(waiting, torch.inf).argmin().reshape(1)
            places[step : step + 1] = place
            increments[step : step + 1] = cost[place]
            earlier, along = low[:step], mix[:step]
            low_here, mix_here = earlier[:, place][:, 0], along[:, place][:, 0]
            pivot = inverse_diagonal[place]
            root = pivot.sqrt()
            row = (self.inverse[place][0] - low_here @ earlier) / root
            image = self.gram[place][0] - mix_here @ earlier - low_here @ along
            image = image / root - row * (gram_diagonal[place] / (2 * pivot))
            low[step], mix[step] = row, image
            inverse_diagonal -= row.square()
            gram_diagonal -= 2 * row * image
            gone[place] = True
            rounds.record_(self.channels[place])
        channels = self.channels[places]
        self._update_(low, mix, gone)
        return channels, increments

    def _update_(self, low: Tensor, mix: Tensor, gone: Tensor) -> None:
        """Move what stays to the front, so that nothing else needs copying, and bring it up to date."""
        left = len(gone) - len(low)
        holes, movers = gone[:left].nonzero()[:, 0], (~gone[left:]).nonzero()[:, 0] + left
        for rows in (self.inverse, self.gram):
            rows[holes] = rows[movers]
        for rows in (self.inverse, self.gram, low, mix):
            rows[:, holes] = rows[:, movers]
        for values in (self.penalties, self.channels):
            values[holes] = values[movers]
        self.inverse, self.gram = self.inverse[:left, :left], self.gram[:left, :left]
        self.penalties, self.channels = self.penalties[:left], self.channels[:left]
        low, mix = low[:, :left], mix[:, :left]
        self.inverse.addmm_(low.T, low, alpha=-1)
        self.gram.addmm_(torch.cat([low, mix]).T, torch.cat([mix, low]), alpha=-1)
