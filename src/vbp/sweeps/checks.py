"""Check what a sweep is asked for before any work, and list its points."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import get_args

from vbp.errors import InputError
from vbp.pruning.criteria import needs_of
from vbp.pruning.make_plan import check_ratios
from vbp.recipes.checks import AFTER_REFIT, OF_COVARIANCE, check_config, check_unused
from vbp.runtime.choices import Compensation, Scope
from vbp.statistics.evidence import Need
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.report import Setting


def settings_of(
    criteria: Sequence[str],
    compensations: Sequence[str],
    keep_ratios: Sequence[float],
    scopes: Sequence[str] = ("global",),
) -> tuple[Setting, ...]:
    """Return every combination once, ratios innermost.

    `l2/none` stands for this criterion with this compensation alone. `auto` is `auto/refit`, and finds the widths of
    the layers itself: it is there once, as global, whatever the scopes.
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
    """Return what must be collected from calibration images for some settings."""
    compensations = {setting.compensation for setting in settings}
    needs = set(needs_of(setting.criterion for setting in settings))
    if compensations & {"mean", "refit"}:
        needs.add("statistics")
    if "refit" in compensations:
        needs.add("covariance")
    return frozenset(needs)


def check_sweep(config: SweepConfig) -> None:
    """Check the values that need no file, before any work."""
    needs = sweep_needs(config.settings)
    for ratio in config.keep_ratios:
        check_ratios(ratio, config.min_keep_ratio, 1 if config.round_to == "auto" else config.round_to)
    check_config(config.run_config())
    if "covariance" not in needs:
        check_unused(config, OF_COVARIANCE, "without refit or elimination", "ask for one of them")
    if not any(setting.compensation == "refit" for setting in config.settings):
        check_unused(config, AFTER_REFIT, "without the refit", "ask for it")
    if config.stats_path is not None and not needs & {"statistics", "covariance"}:
        raise InputError(
            f"stats_path changes nothing, for nothing that was asked for reads statistics, got {config.stats_path}; "
            "leave --stats_path out"
        )
