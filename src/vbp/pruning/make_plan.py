"""Decide which channels stay: exact counts, floors, rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vbp.errors import InputError
from vbp.method.allocation import AllowedWidths, global_counts, per_layer_counts
from vbp.pruning.plan import PruningPlan, SitePlan, first_of_heads
from vbp.runtime.choices import Basis, Scope
from vbp.sites.site import Site


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
    min_keep_ratio: float = 0.02,
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
    ranked = [_removal_order(site, scores) for site in mlps]
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


@dataclass(frozen=True)
class PlanRules:
    """Hold what all plans of a job have in common: the arguments of `make_plan` beside scores and keep ratio.

    `include` and `exclude` are the patterns by which the sites were chosen: they stand in the plan.
    """

    scope: Scope = "global"
    round_to: int = 1
    min_keep_ratio: float = 0.02
    attn_keep_ratio: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    attn_basis: Basis = "channels"

    def plan(self, sites: Sequence[Site], scores: Mapping[str, Tensor], keep_ratio: float) -> PruningPlan:
        """Make a plan by these rules."""
        rules = dict(vars(self))
        patterns = {name: rules.pop(name) for name in ("include", "exclude")}
        return replace(make_plan(sites, scores, keep_ratio=keep_ratio, **rules), **patterns)

    def neutral(self, sites: Sequence[Site], keep_ratio: float) -> PruningPlan:
        """Make a plan of the right widths before there are scores: the same share in every site."""
        scores = {site.name: torch.zeros(site.hidden) for site in sites}
        return replace(self, scope="per_layer").plan(sites, scores, keep_ratio)


def _plan_heads(site: Site, scores: Mapping[str, Tensor], count: int) -> SitePlan:
    """Keep the best channels of every head, as many in each."""
    size = site.hidden // site.heads
    order, _ = _removal_order(site, scores)
    heads = [order[order // size == head] for head in range(site.heads)]
    return SitePlan(site, tuple(sorted(np.concatenate([head[size - count :] for head in heads]).tolist())))


def _removal_order(site: Site, scores: Mapping[str, Tensor]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the channels of a site in the order in which they go, and their scores in that order.

    Where the channels of an MLP lie in groups of a convolution, those of a round share their mean score.
    """
    if site.name not in scores:
        raise InputError(f"scores must hold every site, got none for {site.name}; collect its statistics")
    score = scores[site.name].detach().double().cpu().numpy()
    if score.shape != (site.hidden,) or not np.isfinite(score).all():
        raise InputError(
            f"scores of {site.name} must be {site.hidden} finite numbers, got shape {score.shape}, "
            f"{int((~np.isfinite(score)).sum())} not finite; collect the statistics again"
        )
    order = np.argsort(score, kind="stable")
    if site.kind == "mlp" and site.heads > 1:
        # Rounds of one channel of each group: a round goes or stays as a whole.
        groups = [order[order // (site.hidden // site.heads) == group] for group in range(site.heads)]
        rounds = np.stack(groups, 1)
        return rounds.ravel(), np.repeat(score[rounds].mean(1), site.heads)
    return order, score[order]
