"""How many channels each site keeps: the total as asked for, floors and rounding respected.

With n_i the kept channels of site i, among those that its floor and the rounding allow, and N the total asked for:

    minimise  |sum_i n_i - N|,  then  sum_i loss_i(n_i)

where the loss is the sum of the scores that go (`global_counts`), or the squared distance from the site's share of N
(`per_layer_counts`). Where every count is allowed a sort finds it, otherwise dynamic programming.

Where the channels of different sites save different amounts, a total of channels says little: `counts_by_saving`
removes what loses least for what it saves, until enough is saved.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AllowedWidths:
    """Hold the channel counts that a site may have, descending: all, then multiples of the step down to the floor."""

    counts: tuple[int, ...]

    @property
    def is_gapless(self) -> bool:
        """Return whether every count from the first to the last is allowed."""
        return self.counts[0] - self.counts[-1] == len(self.counts) - 1

    def nearest(self, quota: float) -> int:
        """Return the count nearest to a quota, the larger of two that are as near."""
        return min(self.counts, key=lambda count: abs(count - quota))

    @staticmethod
    def of(hidden: int, step: int, min_keep_ratio: float) -> AllowedWidths:
        """Return the counts of a site; one narrower than `step` stays whole."""
        # The tolerance undoes binary fractions: 0.07 * 100 is 7.000000000000001 and must ask for 7 channels.
        return AllowedWidths.down_to(max(1, math.ceil(hidden * min_keep_ratio - 1e-9)), hidden, step)

    @staticmethod
    def down_to(least: int, hidden: int, step: int, unit: int = 1) -> AllowedWidths:
        """Return all units of channels, and the multiples of `step` units from there down to a least number."""
        multiples = range(hidden // step * step, math.ceil(least / step) * step - 1, -step)
        return AllowedWidths(tuple(count * unit for count in (hidden, *(m for m in multiples if m != hidden))))


def global_counts(scores: Sequence[Floats], bounds: Sequence[AllowedWidths], target: int) -> list[int]:
    """Remove the channels of lowest score over all sites; of equal ones the first, by site, then by order.

    Scores are those of each site's channels, ascending. The total nearest to `target` that can be reached is kept,
    the larger of two that are as near.
    """
    if not all(bound.is_gapless for bound in bounds):
        # What goes with each count of a site: its lowest scores, summed.
        sums = [np.concatenate(([0.0], np.cumsum(score))) for score in scores]
        return _allocate(
            bounds,
            [
                [float(total[bound.counts[0] - count]) for count in bound.counts]
                for total, bound in zip(sums, bounds, strict=True)
            ],
            target,
        )
    removable = [score[: bound.counts[0] - bound.counts[-1]] for score, bound in zip(scores, bounds, strict=True)]
    site_of = np.repeat(np.arange(len(bounds)), [len(score) for score in removable])
    gone = max(0, sum(bound.counts[0] for bound in bounds) - target)
    # A stable sort breaks ties by site order and, inside a site, by the order of removal.
    lost = np.bincount(site_of[np.argsort(np.concatenate(removable), kind="stable")[:gone]], minlength=len(bounds))
    return [bound.counts[0] - int(number) for bound, number in zip(bounds, lost, strict=True)]


def per_layer_counts(keep_ratio: float, bounds: Sequence[AllowedWidths], target: int) -> list[int]:
    """Return every site the same share, as nearly as the total allows."""
    quotas = [bound.counts[0] * keep_ratio for bound in bounds]
    if not all(bound.is_gapless for bound in bounds):
        losses = [
            [(count - quota) ** 2 for count in bound.counts] for quota, bound in zip(quotas, bounds, strict=True)
        ]
        return _allocate(bounds, losses, target)
    counts = [max(int(quota), bound.counts[-1]) for quota, bound in zip(quotas, bounds, strict=True)]
    while (missing := target - sum(counts)) != 0:
        # Largest remainders: the site that is furthest from its quota moves by one channel.
        sign = 1 if missing > 0 else -1
        movable = [
            index
            for index, (count, bound) in enumerate(zip(counts, bounds, strict=True))
            if bound.counts[-1] <= count + sign <= bound.counts[0]
        ]
        if not movable:
            return counts
        counts[max(movable, key=lambda index: (sign * (quotas[index] - counts[index]), -index))] += sign
    return counts


def counts_by_saving(
    scores: Sequence[Floats], bounds: Sequence[AllowedWidths], savings: Sequence[float], share: float
) -> list[int]:
    """Remove step by step what has the lowest score, until no more than a share of all savings remains.

    A step leads from one allowed count of a site to the next; its score is the mean over its channels. The last step
    may save more than is wanted: then steps before it that are no longer needed are taken back.

    Args:
        scores: Of each site's channels, ascending: what a channel loses for each unit that it saves.
        bounds: Of each site.
        savings: What a channel of each site saves.
        share: Of the sum of all savings, in [0, 1]; where floors bind more remains.
    """
    steps = []
    for place, (score, bound, saving) in enumerate(zip(scores, bounds, savings, strict=True)):
        gone = [bound.counts[0] - count for count in bound.counts]
        for before, after in pairwise(gone):
            steps.append((float(score[before:after].mean()), place, (after - before) * saving))
    wanted = (1 - share) * sum(bound.counts[0] * saving for bound, saving in zip(bounds, savings, strict=True))
    wanted *= 1 - 1e-12
    taken, saved = list[tuple[int, float]](), 0.0
    # Stable: of equal ones the first site, and the steps of a site in their order.
    for _, place, saving in sorted(steps, key=lambda step: step[0]):
        if saved >= wanted:
            break
        taken.append((place, saving))
        saved += saving
    numbers = Counter(place for place, _ in taken)
    fixed = set[int]()
    for place, saving in reversed(taken):
        if place not in fixed and saved - saving >= wanted:
            numbers[place] -= 1
            saved -= saving
        else:
            fixed.add(place)  # its steps before this one are needed too
    return [bound.counts[numbers[place]] for place, bound in enumerate(bounds)]


def _allocate(bounds: Sequence[AllowedWidths], losses: Sequence[Sequence[float]], target: int) -> list[int]:
    """Choose a count for each site: first the total nearest to the target, then the least summed loss.

    Dynamic programming over the number of removed channels: exact where widths are no multiples of the step too.
    """
    removals = [[bound.counts[0] - count for count in bound.counts] for bound in bounds]
    unit = math.gcd(*(removed for site in removals for removed in site)) or 1
    wanted = (sum(bound.counts[0] for bound in bounds) - target) / unit
    # No reachable total further off than one step of one site can be the nearest.
    widest = max((max(np.diff(site)) for site in removals if len(site) > 1), default=0)
    size = max(1, math.floor(wanted + widest / unit) + 1)
    best = np.full(size, np.inf)
    best[0] = 0.0
    choices = []
    for site, loss in zip(removals, losses, strict=True):
        after, choice = np.full(size, np.inf), np.zeros(size, dtype=np.int32)
        for option, (removed, cost) in enumerate(zip(site, loss, strict=True)):
            shift = removed // unit
            if shift >= size:
                break
            candidate = best[: size - shift] + cost
            better = candidate < after[shift:]
            after[shift:][better] = candidate[better]
            choice[shift:][better] = option
        best = after
        choices.append(choice)
    reachable = np.flatnonzero(np.isfinite(best))
    left = int(reachable[np.argmin(np.abs(reachable - wanted))])
    counts = []
    for bound, site, choice in zip(reversed(bounds), reversed(removals), reversed(choices), strict=True):
        option = int(choice[left])
        counts.append(bound.counts[option])
        left -= site[option] // unit
    return counts[::-1]
