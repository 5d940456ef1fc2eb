"""Find the largest plan that meets a latency or a speed-up: predicted from layer times, decided by measurement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from vbp.cost.budget import Budget, BudgetResult
from vbp.cost.search import PlanFor, PlanSearch
from vbp.cost.timing import LatencyComparison, Spread, compare_models
from vbp.cost.widths import LayerTimes
from vbp.errors import InputError
from vbp.pruning.plan import PruningPlan
from vbp.pruning.surgery import cut_
from vbp.runtime.decode import to_json
from vbp.runtime.forward import copy_model
from vbp.runtime.precision import Precision

# Measured savings further from the predicted ones than this are noise more likely than truth.
_CORRECTION = (0.25, 4.0)

# A plan that is faster than asked for by more than this could keep more channels. The search aims at half of it.
_SLACK = 0.02


def compare_in_turns(
    model: nn.Module,
    plan: PruningPlan,
    images: Tensor,
    *,
    precision: Precision,
    rounds: int = 15,
    budget_s: float = 10,
) -> LatencyComparison:
    """Time a dense model against a copy that is pruned by a plan; the arguments are those of `compare_models`."""
    pruned = copy_model(model)
    cut_(pruned, plan)
    return compare_models(model, pruned, images, precision=precision, rounds=rounds, budget_s=budget_s)


def check_faster(budget: Budget, times: LayerTimes) -> None:
    """Raise InputError for a latency that the dense model has already."""
    if budget.quantity == "latency_ms" and budget.amount >= times.dense_ms:
        raise InputError(
            f"target_latency_ms must be below the {times.dense_ms:.2f} ms that the dense model takes for a batch of "
            f"{times.conditions.batch[0]}, got {budget.amount}; lower it"
        )


def check_reachable_time(
    budget: Budget, floor: PruningPlan, times: LayerTimes, compare: Callable[[PruningPlan], LatencyComparison]
) -> None:
    """Refuse a latency or speed-up that the narrowest plan is neither predicted nor measured to reach.

    Raises:
        InputError: The measured time of the narrowest plan is named.
    """
    if times.share(floor) <= allowed_share(budget, times.dense_ms):
        return
    attempt = _Attempt(budget, floor, times.share(floor), compare(floor))
    if attempt.met or attempt.measured.low <= budget.amount <= attempt.measured.high:
        return
    raise InputError(
        f"{budget.flag} must be within reach, got {budget.amount:g}: with every site at its floor (min_keep_ratio "
        f"{floor.min_keep_ratio}, round_to {floor.round_to}) {attempt.measured.median:.2f} was measured; change "
        "it or lower min_keep_ratio, or give best_effort to take the nearest plan"
    )


def meet_latency(
    budget: Budget,
    plan_for: PlanFor,
    times: LayerTimes,
    compare: Callable[[PruningPlan], LatencyComparison],
    *,
    attempts: int = 5,
    budget_s: float = 60,
) -> BudgetResult:
    """Find the largest keep ratio whose plan is measured to meet a latency or a speed-up.

    The layer times propose a plan, the measurement decides. Where the target is missed, or beaten by more than 2 %
    and more than the measured spread, the savings that the layer times promise are scaled by what was measured, and
    another plan is proposed; at most `attempts` are measured, and none after `budget_s` seconds of comparing.

    Every process may call it: with the same times, the same comparisons (made by one process for all) and a
    deterministic `plan_for`, which takes the keep ratio, all return the same plan.

    Raises:
        InputError: The dense model takes no longer than that already.
    """
    check_faster(budget, times)
    search, tried = PlanSearch(plan_for), list[_Attempt]()
    scale, dense_ms = 1.0, times.dense_ms
    while len(tried) < attempts and sum(attempt.timing.seconds for attempt in tried) <= budget_s:
        allowed = _between(tried, 1 - (1 - allowed_share(budget, dense_ms)) / scale)
        plan = search.largest(times.share, allowed) or search.floor
        if any(plan.widths == attempt.plan.widths for attempt in tried):
            break
        timing = compare(plan)
        tried.append(_Attempt(budget, plan, times.share(plan), timing))
        if tried[-1].close or (plan is search.floor and not tried[-1].met):
            break
        dense_ms = timing.dense_ms.median
        # Of all attempts: each alone is noisy.
        scale = statistics.median(attempt.scale for attempt in tried)
    return _result(budget, times, search.floor, tried)


@dataclass(frozen=True)
class _Attempt:
    """A plan that was measured, and the predicted share of the dense time."""

    budget: Budget
    plan: PruningPlan
    share: float
    timing: LatencyComparison

    @property
    def measured(self) -> Spread:
        return self.timing.speedup if self.budget.quantity == "speedup" else self.timing.pruned_ms

    @property
    def slack(self) -> float:
        """Return how much better than asked for it is, as a share."""
        ratio = self.measured.median / self.budget.amount
        return ratio - 1 if self.budget.quantity == "speedup" else 1 / ratio - 1

    @property
    def met(self) -> bool:
        return self.slack >= 0

    @property
    def close(self) -> bool:
        """Return whether it is met, and by no more than the measurement can tell."""
        return self.met and (self.slack <= _SLACK or self.measured.low <= self.budget.amount <= self.measured.high)

    @property
    def scale(self) -> float:
        """Return the measured savings over the predicted ones."""
        low, high = _CORRECTION
        promised = 1 - self.share
        return min(high, max(low, (1 - 1 / self.timing.speedup.median) / promised)) if promised > 0 else 1.0


def allowed_share(budget: Budget, dense_ms: float) -> float:
    """Return the part of the dense time that a proposed plan may take."""
    share = 1 / budget.amount if budget.quantity == "speedup" else budget.amount / dense_ms
    return min(1.0, share * (1 - _SLACK / 2))


def _between(tried: list[_Attempt], share: float) -> float:
    """Keep a proposal between the largest plan that met the target and the smallest that missed it."""
    met = max((attempt.share for attempt in tried if attempt.met), default=-math.inf)
    missed = min((attempt.share for attempt in tried if not attempt.met), default=math.inf)
    if met < share < missed or not (math.isfinite(met) and math.isfinite(missed)):
        return share
    return (met + missed) / 2


def _result(budget: Budget, times: LayerTimes, floor: PruningPlan, tried: list[_Attempt]) -> BudgetResult:
    met = [attempt for attempt in tried if attempt.met]
    best = max(met, key=lambda attempt: attempt.share) if met else max(tried, key=lambda attempt: attempt.slack)
    speed = budget.quantity == "speedup"
    reason = ""
    if not met and best.plan.widths == floor.widths:
        reason = (
            f"every site is at its floor (min_keep_ratio {floor.min_keep_ratio}, round_to {floor.round_to}), and the "
            f"rest of the model takes {1 / best.timing.speedup.median:.0%} of the dense time"
        )
    elif not met:
        reason = f"none of {len(tried)} plans was fast enough when measured; the layer times promised more"
    return BudgetResult(
        budget,
        best.plan,
        budget.amount,
        1.0 if speed else best.timing.dense_ms.median,
        best.measured.median,
        bool(met),
        reason,
        1 / best.share if speed else best.share * best.timing.dense_ms.median,
        (best.measured.low, best.measured.high),
        {
            "conditions": to_json(times.conditions),
            "attempts": [
                {"kept": attempt.plan.kept, "predicted_speedup": 1 / attempt.share, **asdict(attempt.timing)}
                for attempt in tried
            ],
        },
    )
