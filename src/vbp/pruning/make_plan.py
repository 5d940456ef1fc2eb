"""Decide which channels stay: exact counts, floors, rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vbp.errors import InputError
from vbp.method.allocation import AllowedWidths, counts_by_saving, global_counts, per_layer_counts
from vbp.pruning.plan import PruningPlan, SitePlan, first_of_heads
from vbp.runtime.choices import Basis, Scope
from vbp.sites.site import Site, units_of

# The usual floor: below it whole branches may go too.
MIN_KEEP_RATIO: Final = 0.02


def check_keep_ratio(name: str, ratio: float) -> None:
    """Raise InputError if a share of channels to keep, the setting of this name, is out of range."""
    if not 0 < ratio <= 1:
        raise InputError(f"{name} must be in (0, 1], got {ratio}; 0.65 keeps 65 % of the channels")


def check_ratios(
    keep_ratio: float, min_keep_ratio: float, round_to: int, attn_keep_ratio: float | None = None
) -> None:
    """Raise InputError if one of the numbers that a plan is made from is out of range."""
    for name, ratio in (("keep_ratio", keep_ratio), ("attn_keep_ratio", attn_keep_ratio)):
        if ratio is not None:
            check_keep_ratio(name, ratio)
    if not 0 <= min_keep_ratio <= 1:
        raise InputError(f"min_keep_ratio must be in [0, 1], got {min_keep_ratio}; 0.02 is the default")
    if min_keep_ratio > keep_ratio:
        raise InputError(
            f"min_keep_ratio must not exceed keep_ratio, got {min_keep_ratio} > {keep_ratio}; lower min_keep_ratio"
        )
    if round_to < 1:
        raise InputError(f"round_to must be at least 1, got {round_to}; 1 rounds nothing, 8 suits most hardware")


def make_plan(
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    *,
    keep_ratio: float,
    scope: Scope = "global",
    round_to: int = 1,
    min_keep_ratio: float = MIN_KEEP_RATIO,
    attn_keep_ratio: float | None = None,
    attn_basis: Basis = "channels",
) -> PruningPlan:
    """Keep the best `round(total * keep_ratio)` channels, or the nearest count that rounding and floors allow.

    Channels of equal score go in the order of site, then index. With `round_to` above 1 a site that loses channels
    keeps a multiple of it, and a site narrower than `round_to` stays whole. `per_layer` gives each site the same
    share as nearly as the total allows: to within one step, further off only where floors or narrow sites bind.
    `equal` rounds each site by itself, so that sites of one width keep as many channels; the total follows from that,
    and may miss `round(total * keep_ratio)` by half a step a site.

    Args:
        sites: From `find_sites`.
        scores: Site name -> score of each hidden channel; the lowest go first.
        keep_ratio: Share of all hidden channels to keep, in (0, 1].
        scope: `global`, `per_layer` or `equal`.
        round_to: Step of the channel counts.
        min_keep_ratio: Floor of each site, as a share of its channels; at least one channel stays in any case.
        attn_keep_ratio: Share of its channels that every head of an attention keeps, to the nearest multiple of
            `round_to`, in queries, keys and values alike, for the tensors stay rectangular; by default `keep_ratio`.
        attn_basis: What heads keep: their best channels by score, or, where any basis serves, their first directions
            in the `principal` one, which surgery finds from covariances.

    Raises:
        InputError: A number is out of range, or scores are missing, of the wrong length, or not finite.

    Source: VBP paper, section 3.2.

    Example:
        >>> vbp.make_plan(sites, vbp.variance_scores(statistics), keep_ratio=0.5).kept
        128
    """
    check_ratios(keep_ratio, min_keep_ratio, round_to, attn_keep_ratio)
    if scope not in get_args(Scope):
        raise InputError(f"scope must be one of {', '.join(get_args(Scope))}, got {scope!r}")
    mlps = [site for site in sites if site.kind == "mlp"]
    ranked = [_removal_order(site.name, site.hidden, scores, site.heads) for site in mlps]
    target = round(sum(site.hidden for site in mlps) * keep_ratio)
    bounds = [AllowedWidths.of(site.hidden, math.lcm(round_to, site.heads), min_keep_ratio) for site in mlps]
    counts: list[int] = []
    if mlps and scope == "global":
        counts = global_counts([ascending for _, ascending in ranked], bounds, target)
    elif mlps and scope == "per_layer":
        counts = per_layer_counts(keep_ratio, bounds, target)
    else:
        counts = [bound.nearest(site.hidden * keep_ratio) for site, bound in zip(mlps, bounds, strict=True)]
    entries = {
        site: SitePlan(site, tuple(sorted(order[site.hidden - count :].tolist())))
        for site, (order, _), count in zip(mlps, ranked, counts, strict=True)
    }
    attention = [site for site in sites if site.kind != "mlp"]
    attn_ratio = (keep_ratio if attn_keep_ratio is None else attn_keep_ratio) if attention else None
    for site in attention:
        assert attn_ratio is not None
        count = AllowedWidths.of(size := site.hidden // site.heads, round_to, 0.0).nearest(size * attn_ratio)
        if attn_basis == "principal" and site.rotatable:
            entries[site] = SitePlan(site, first_of_heads(site, count), "principal")
        else:
            entries[site] = _plan_heads(site, scores, count)
    return PruningPlan(
        tuple(entries[site] for site in sites), keep_ratio, scope, round_to, min_keep_ratio, attn_ratio
    )


def shared_plan(
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    savings: Mapping[str, float],
    *,
    share: float,
    round_to: int = 1,
    min_keep_ratio: float = MIN_KEEP_RATIO,
) -> PruningPlan:
    """Remove what loses least for what it saves, MLP channels or directions of heads, until a share remains.

    A direction goes from all heads of an attention, with its query, key and value. An attention that does not allow
    any basis stays whole. A site whose channels go all, with its branch, is no exception from the floor unless that
    is the usual one or lower.

    Args:
        sites: From `find_sites`.
        scores: Of each channel of an MLP, and, by the name of its value site, of each direction of an attention, the
            first ones highest: what it loses for each unit that it saves.
        savings: What a channel, or a direction, saves, by the same names.
        share: Of all savings, in (0, 1].
        round_to: Step of the counts, of directions too.
        min_keep_ratio: Floor of each site.

    Raises:
        InputError: A number is out of range, or scores are missing, of the wrong length, or not finite.
    """
    check_ratios(share, min_keep_ratio, round_to)
    units = [unit for unit in units_of(sites) if shares_budget(unit)]
    groups = [unit[0].heads if unit[0].kind == "mlp" else 1 for unit in units]
    sizes = [unit[0].hidden // unit[0].heads * group for unit, group in zip(units, groups, strict=True)]
    ranked = [
        _removal_order(unit[0].name, size, scores, group)
        for unit, size, group in zip(units, sizes, groups, strict=True)
    ]
    counts = counts_by_saving(
        [ascending for _, ascending in ranked],
        [
            _or_none(AllowedWidths.of(size, math.lcm(round_to, group), min_keep_ratio), unit, min_keep_ratio)
            for unit, size, group in zip(units, sizes, groups, strict=True)
        ],
        [savings[unit[0].name] for unit in units],
        share,
    )
    entries = {site: SitePlan(site, tuple(range(site.hidden))) for site in sites}
    for unit, size, (order, _), count in zip(units, sizes, ranked, counts, strict=True):
        for site in unit:
            if site.kind == "mlp":
                entries[site] = SitePlan(site, tuple(sorted(order[size - count :].tolist())))
            else:
                entries[site] = SitePlan(site, first_of_heads(site, count), "principal")
    plan = PruningPlan(tuple(entries.values()), share, "global", round_to, min_keep_ratio)
    kept = plan.kept / plan.total if plan.total else share
    return replace(plan, keep_ratio=kept, attn_keep_ratio=plan.attention_share)


def shares_budget(unit: Sequence[Site]) -> bool:
    """Return whether a unit of sites can lose what costs least: an MLP, or an attention that allows any basis."""
    sizes = {site.hidden // site.heads for site in unit}
    return unit[0].kind == "mlp" or (len(sizes) == 1 and all(site.rotatable for site in unit))


def _or_none(widths: AllowedWidths, unit: Sequence[Site], min_keep_ratio: float) -> AllowedWidths:
    """Allow no channel at all where a whole branch may go."""
    droppable = min_keep_ratio <= MIN_KEEP_RATIO and all(site.branch for site in unit)
    return AllowedWidths((*widths.counts, 0)) if droppable else widths


@dataclass(frozen=True)
class PlanRules:
    """Hold what all plans of a job have in common: the arguments of `make_plan` beside scores and keep ratio.

    `include` and `exclude` are the patterns by which the sites were chosen: they stand in the plan. `attn_shared`
    lets the criterion auto divide the budget between MLPs and attention, in the place of `attn_keep_ratio`.
    """

    scope: Scope = "global"
    round_to: int = 1
    min_keep_ratio: float = MIN_KEEP_RATIO
    attn_keep_ratio: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    attn_basis: Basis = "channels"
    attn_shared: bool = False

    def shared(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor], savings: Mapping[str, float], share: float
    ) -> PruningPlan:
        """Make a plan in which MLP channels and directions of heads compete for one budget; see `shared_plan`."""
        plan = shared_plan(
            sites, scores, savings, share=share, round_to=self.round_to, min_keep_ratio=self.min_keep_ratio
        )
        return replace(plan, include=self.include, exclude=self.exclude)

    def plan(self, sites: Sequence[Site], scores: Mapping[str, Tensor], keep_ratio: float) -> PruningPlan:
        """Make a plan by these rules."""
        rules = dict(vars(self))
        del rules["attn_shared"]
        patterns = {name: rules.pop(name) for name in ("include", "exclude")}
        return replace(make_plan(sites, scores, keep_ratio=keep_ratio, **rules), **patterns)

    def neutral(self, sites: Sequence[Site], keep_ratio: float) -> PruningPlan:
        """Make a plan of the right widths before there are scores: the same share in every site."""
        scores = {site.name: torch.zeros(site.hidden) for site in sites}
        return replace(self, scope="per_layer").plan(sites, scores, keep_ratio)


def _plan_heads(site: Site, scores: Mapping[str, Tensor], count: int) -> SitePlan:
    """Keep the best channels of every head, as many in each."""
    size = site.hidden // site.heads
    order, _ = _removal_order(site.name, site.hidden, scores)
    heads = [order[order // size == head] for head in range(site.heads)]
    return SitePlan(site, tuple(sorted(np.concatenate([head[size - count :] for head in heads]).tolist())))


def _removal_order(
    name: str, size: int, scores: Mapping[str, Tensor], groups: int = 1
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the channels of a site in the order in which they go, and their scores in that order.

    Where the channels of an MLP lie in groups of a convolution, those of a round share their mean score.
    """
    if name not in scores:
        raise InputError(f"scores must hold every site, got none for {name}; collect its statistics")
    score = scores[name].detach().double().cpu().numpy()
    if score.shape != (size,) or not np.isfinite(score).all():
        raise InputError(
            f"scores of {name} must be {size} finite numbers, got shape {score.shape}, "
            f"{int((~np.isfinite(score)).sum())} not finite; collect the statistics again"
        )
    order = np.argsort(score, kind="stable")
    if groups > 1:
        # Rounds of one channel of each group: a round goes or stays as a whole.
        rounds = np.stack([order[order // (size // groups) == group] for group in range(groups)], 1)
        return rounds.ravel(), np.repeat(score[rounds].mean(1), groups)
    return order, score[order]
