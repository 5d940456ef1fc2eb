"""The sites of a job, the rules of its plans, and the budget that they must meet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vbp.cost.latency_search import compare_in_turns
from vbp.cost.layer_timing import measure_layer_times
from vbp.cost.target import BudgetTarget
from vbp.cost.timing import LatencyComparison
from vbp.cost.widths import recommended_round_to
from vbp.errors import InputError
from vbp.pruning.make_plan import PlanRules, shares_budget
from vbp.pruning.plan import PruningPlan
from vbp.pruning.surgery import check_prunable
from vbp.recipes.config import PruneConfig
from vbp.runtime.choices import Scope
from vbp.runtime.session import Session
from vbp.sites.find import find_sites
from vbp.sites.selection import select_sites
from vbp.sites.site import Site, units_of

_log = logging.getLogger(__name__)


def plan_rules(config: PruneConfig, session: Session, sites: Sequence[Site]) -> PlanRules:
    """Return what all plans of a job have in common."""
    round_to = config.round_to
    if round_to == "auto":
        dtype = session.precision.dtype or torch.float32
        round_to = recommended_round_to(session.device, dtype, sites)
        _log.info("round_to %d suits %s in %s", round_to, session.device.type, dtype)
    if config.criterion == "auto" and config.global_pruning:
        _log.info("the criterion auto ranks the channels of all layers together, with or without global_pruning")
    scope: Scope = "global" if config.global_pruning else "equal" if config.equal_widths else "per_layer"
    shared = config.shares_budget and any(site.kind != "mlp" for site in sites)
    return PlanRules(
        scope, round_to, config.min_keep_ratio, config.attn_keep_ratio, config.include, config.exclude,
        attn_shared=shared,
    )  # fmt: skip


def sites_of(config: PruneConfig, model: nn.Module, example: Tensor) -> tuple[Site, ...]:
    """Return the sites that the configuration asks for: attention too where it shares the budget and can be cut.

    Raises:
        InputError: There is none, a pattern fits none, the model does not run with fewer channels in them, or
            attention is asked for and cannot be pruned.
    """
    asked = config.bottleneck or (config.shares_budget and config.attention == "on")
    try:
        found = find_sites(model, example, attention=asked or config.shares_budget, convolutions=config.convolutions)
    except InputError as error:
        if asked or not config.shares_budget:
            raise
        found = find_sites(model, example, convolutions=config.convolutions)
        _log.info("attention stays whole: %s", error)
    if not config.bottleneck:
        whole = [site for unit in units_of(found) if not shares_budget(unit) for site in unit]
        layers = {name for site in whole for name in site.producers}
        for site in whole:
            _log.info("%s of attention %s stay whole: its heads do not allow any basis", site.kind, site.name)
        # Rows of one layer are cut together, or not at all.
        found = tuple(site for site in found if site not in whole and not layers & set(site.producers))
    sites = select_sites(found, config.include, config.exclude)
    try:
        check_prunable(model, sites, example)
    except InputError as error:
        mlps = tuple(site for site in sites if site.kind == "mlp")
        if asked or not mlps or len(mlps) == len(sites):
            raise
        check_prunable(model, mlps, example)
        _log.info("attention stays whole: %s", error)
        return mlps
    return sites


def comparison_by_main(
    session: Session, model: nn.Module, images: Tensor
) -> Callable[[PruningPlan], LatencyComparison]:
    """Return what times a plan against the dense model: on the main process, for all."""

    def compare(plan: PruningPlan) -> LatencyComparison:
        job = partial(compare_in_turns, model, plan, images, precision=session.precision)
        return session.processes.from_main(job)

    return compare


def find_target(
    config: PruneConfig,
    session: Session,
    model: nn.Module,
    sites: Sequence[Site],
    example: Tensor,
    batch: int,
    rules: PlanRules,
    *,
    planned: bool = False,
) -> BudgetTarget:
    """Find about which share of channels meets the budget; one of time is measured, by the main process for all.

    Where the plan is known already, of a run that goes on, nothing is timed: this device may be busier now, or idler.

    Raises:
        InputError: The model cannot meet it, or nothing would be removed.
    """
    budget, times, processes = config.budget, None, session.processes
    images = example.repeat(batch, 1, 1, 1)
    if budget.timed and not planned:
        if processes.is_main:
            _log.info("timing the layers at several widths, batch %d", batch)
            times = measure_layer_times(model, sites, images, precision=session.precision, round_to=rules.round_to)
            _log.info("the dense model takes %.2f ms for a batch of %d", times.dense_ms, batch)
        times = processes.all_gather(times)[0]
    compare = None if config.best_effort else comparison_by_main(session, model, images)
    target = BudgetTarget.of(budget, model, sites, example, rules, times, compare)
    _check_removes(config, sites, target, rules)
    return target


def _check_removes(config: PruneConfig, sites: Sequence[Site], target: BudgetTarget, rules: PlanRules) -> None:
    """Refuse settings under which nothing would go; how many channels go does not depend on their scores."""
    plan = rules.neutral(sites, target.keep_ratio)
    asked = min(target.keep_ratio, config.attn_keep_ratio or 1.0)
    if asked < 1 and all(kept == total for kept, total in plan.widths.values()):
        raise InputError(
            f"keep_ratio {target.keep_ratio:g} with round_to {plan.round_to} and min_keep_ratio "
            f"{plan.min_keep_ratio} removes none of {plan.total} channels; lower keep_ratio or round_to"
        )
