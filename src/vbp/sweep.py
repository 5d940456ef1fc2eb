"""Many prunings of one dense model, each from the dense weights: ratios x criteria x compensations."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

from torch import Tensor, nn

from vbp.covariance import ChannelCovariance
from vbp.criteria import Evidence, Need, criterion_scores, needs_of
from vbp.errors import InputError
from vbp.plan import PruningPlan, Scope
from vbp.planning import check_ratios, make_plan
from vbp.report import Measured
from vbp.sites import Site
from vbp.surgery import prune_
from vbp.sweep_report import Compensation, Setting, SweepReport, SweepRow

_log = logging.getLogger(__name__)


class Planned(Protocol):
    """A plan, and what surgery takes with it."""

    @property
    def plan(self) -> PruningPlan:
        """What stays."""

    @property
    def means(self) -> Mapping[str, Tensor] | None:
        """For the mean shift and the refit."""

    @property
    def covariances(self) -> Mapping[str, ChannelCovariance] | None:
        """For the refit."""


@dataclass(frozen=True)
class _FromScores:
    plan: PruningPlan
    means: Mapping[str, Tensor] | None
    covariances: Mapping[str, ChannelCovariance] | None


def settings_of(
    criteria: Sequence[str],
    compensations: Sequence[str],
    keep_ratios: Sequence[float],
    scopes: Sequence[str] = ("global",),
) -> tuple[Setting, ...]:
    """Give every combination once, ratios innermost.

    Args:
        criteria: Names; `l2/none` stands for this criterion with this compensation alone. `auto` is `auto/refit`.
        compensations: For the criteria that name none, but `auto`.
        keep_ratios: Shares of the channels to keep.
        scopes: Of `global`, `per_layer` and `equal`. `auto` finds the widths of the layers itself: it is there once,
            as global, whatever the scopes.

    Raises:
        InputError: A value is unknown, out of range, without effect, or nothing is asked for.
    """
    for name, values in (("criteria", criteria), ("keep_ratios", keep_ratios), ("scopes", scopes)):
        if not values:
            raise InputError(f"{name} must hold at least one value, got none")
    for ratio in keep_ratios:
        check_ratios(ratio, 0.0, 1)
    _check_known("scope", scopes, get_args(Scope))
    methods: list[tuple[str, str, Sequence[str]]] = []
    for entry in criteria:
        criterion, slash, own = entry.partition("/")
        needs_of([criterion])
        if criterion == "auto":
            if slash and own != "refit":
                raise InputError(
                    f"criterion auto goes with compensation refit alone, got {entry}; write auto, or choose another "
                    "criterion"
                )
            methods.append((criterion, "refit", ("global",)))
            continue
        if not slash and not compensations:
            raise InputError(f"compensations must hold at least one value for criterion {criterion}, got none")
        methods += [(criterion, choice, scopes) for choice in ([own] if slash else compensations)]
    _check_known("compensation", [choice for _, choice, _ in methods], get_args(Compensation))
    return tuple(
        dict.fromkeys(
            Setting(criterion, compensation, scope, ratio)  # type: ignore[arg-type]
            for criterion, compensation, allowed in methods
            for scope in allowed
            for ratio in keep_ratios
        )
    )


def _check_known(what: str, values: Sequence[str], allowed: Sequence[str]) -> None:
    for value in values:
        if value not in allowed:
            raise InputError(f"{what} must be one of {', '.join(allowed)}, got {value!r}")


def sweep_needs(settings: Collection[Setting]) -> frozenset[Need]:
    """Give what must be collected from calibration images for some settings."""
    compensations = {setting.compensation for setting in settings}
    needs = set(needs_of(setting.criterion for setting in settings))
    if compensations & {"mean", "refit"}:
        needs.add("statistics")
    if "refit" in compensations:
        needs.add("covariance")
    return frozenset(needs)


def sweep(
    model: nn.Module,
    sites: Sequence[Site],
    evidence: Evidence,
    settings: Sequence[Setting],
    measure: Callable[[nn.Module], Measured],
    *,
    latency: Callable[[nn.Module], tuple[float, float]] | None = None,
    round_to: int = 1,
    min_keep_ratio: float = 0.02,
    dense: Measured | None = None,
    known: Collection[SweepRow] = (),
    planners: Mapping[str, Callable[[Setting], Planned]] | None = None,
    after_refit: Callable[[nn.Module], object] | None = None,
    on_row: Callable[[SweepReport], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> SweepReport:
    """Prune a copy of the dense model by each setting in turn, and measure it.

    One copy exists at a time, beside those of a planner, and scores are computed once for a criterion.

    Args:
        model: The dense model; left as it was.
        sites: From `find_sites`.
        evidence: Must hold what `sweep_needs` says of the settings that are not known.
        settings: From `settings_of`.
        measure: Gives accuracy and size of a model.
        latency: Gives the milliseconds of the dense model and of a pruned one, measured in turns.
        round_to: As for `make_plan`.
        min_keep_ratio: As for `make_plan`.
        dense: The dense model's figures, where they are known.
        known: Rows of an earlier sweep with the same evidence and numbers, which are not measured again.
        planners: Criterion -> what makes its plans, for criteria that decide more than scores can say: `auto`.
        after_refit: What else is done to a pruned model whose compensation is the refit, in place.
        on_row: Called with all that is known after the dense model and after each row.
        about: For the report.

    Returns:
        The dense model, and a row for each setting and for whatever else was known.

    Raises:
        InputError: The evidence lacks something, or a number is out of range.
    """
    for setting in settings:
        check_ratios(setting.keep_ratio, min_keep_ratio, round_to)
    if dense is None:
        dense = measure(model)
    rows = {row.setting: row for row in known}
    asked = dict.fromkeys([*settings, *rows])

    def report() -> SweepReport:
        assert dense is not None
        return SweepReport(dense, tuple(rows[setting] for setting in asked if setting in rows), about or {})

    missing = [setting for setting in settings if setting not in rows]
    planner = _Planner(model, sites, evidence, round_to, min_keep_ratio, planners or {})
    for number, setting in enumerate(missing):
        if on_row is not None and number == 0:
            on_row(report())
        planned = planner.plan(setting)
        plan = planned.plan
        pruned = _pruned(model, planned, setting.compensation, evidence.ridge)
        if after_refit is not None and setting.compensation == "refit":
            after_refit(pruned)
        times = (None, None) if latency is None else latency(pruned)
        measured = measure(pruned)
        rows[setting] = SweepRow(setting, plan.kept, plan.total, replace(measured, latency_ms=times[1]), times[0])
        _log.info(
            "%d of %d: %s, kept %.3f: top-1 %.2f %%", number + 1, len(missing), setting.method,
            plan.kept / plan.total if plan.total else 1.0, measured.top1,
        )  # fmt: skip
        del pruned
        if on_row is not None:
            on_row(report())
    return report()


class _Planner:
    """Makes the plans; the scores of a criterion once."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        evidence: Evidence,
        round_to: int,
        min_keep_ratio: float,
        planners: Mapping[str, Callable[[Setting], Planned]],
    ) -> None:
        self._model, self._sites, self._evidence, self._planners = model, sites, evidence, planners
        self._round_to, self._min_keep_ratio = round_to, min_keep_ratio
        self._scores: dict[str, dict[str, Tensor]] = {}

    def plan(self, setting: Setting) -> Planned:
        criterion, statistics = setting.criterion, self._evidence.statistics
        if criterion in self._planners:
            return self._planners[criterion](setting)
        if criterion not in self._scores:
            self._scores[criterion] = criterion_scores(criterion, self._model, self._sites, self._evidence)
        plan = make_plan(
            self._sites, self._scores[criterion], keep_ratio=setting.keep_ratio, scope=setting.scope,
            round_to=self._round_to, min_keep_ratio=self._min_keep_ratio,
        )  # fmt: skip
        if statistics is None:
            return _FromScores(plan, None, None)
        return _FromScores(plan, statistics.means, statistics.covariances)


def _pruned(model: nn.Module, planned: Planned, compensation: Compensation, ridge: float) -> nn.Module:
    if compensation != "none" and planned.means is None:
        raise InputError(f"compensation {compensation} needs statistics, got none; collect them")
    if compensation == "refit" and planned.covariances is None:
        raise InputError("compensation refit needs covariances, got none; collect statistics with covariance=True")
    pruned = copy.deepcopy(model)
    prune_(
        pruned,
        planned.plan,
        None if compensation == "none" else planned.means,
        planned.covariances if compensation == "refit" else None,
        ridge=ridge,
    )
    return pruned
