"""Check what a sweep is asked for before any work, and list its points."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import get_args

from vbp.errors import InputError
from vbp.pruning.criteria import needs_of
from vbp.pruning.make_plan import check_ratios
from vbp.recipes.checks import AFTER_REFIT, OF_COVARIANCE, check_config, check_unused
from vbp.runtime.choices import Compensation, Scope
from vbp.statistics.evidence import Need
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.rows import Point, Setting


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


@dataclass(frozen=True)
class Share:
    """The K-th of N shares of a sweep's points; share 0 does what all others need, and no point."""

    number: int
    of: int

    @staticmethod
    def parse(text: str) -> Share:
        """Read K/N.

        Raises:
            InputError: It is none, or K is above N.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if match is None or int(match[1]) > int(match[2]):
            raise InputError(f"point must be K/N with K from 0 to N, got {text!r}; write --point 3/24")
        return Share(int(match[1]), int(match[2]))

    def take(self, points: Sequence[Point]) -> tuple[Point, ...]:
        """Return the points of this share.

        Raises:
            InputError: There are fewer points than shares.
        """
        if self.of > len(points):
            raise InputError(
                f"point must ask for at most as many shares as there are points, got {self.number}/{self.of} for "
                f"{len(points)} points (settings times seeds); write --point K/{len(points)}"
            )
        return tuple(points[self.number - 1 :: self.of]) if self.number else ()


def share_of(config: SweepConfig) -> Share | None:
    """Return which share of the points is asked for; None for the whole sweep."""
    return None if config.point is None else Share.parse(config.point)


def check_sweep(config: SweepConfig) -> None:
    """Check the values that need no file, before any work."""
    settings = config.settings
    needs = sweep_needs(settings)
    for ratio in config.keep_ratios:
        check_ratios(ratio, config.min_keep_ratio, 1 if config.round_to == "auto" else config.round_to)
    check_config(config.run_config())
    if "covariance" not in needs:
        check_unused(config, OF_COVARIANCE, "without refit or elimination", "ask for one of them")
    if not any(setting.compensation == "refit" for setting in settings):
        check_unused(config, AFTER_REFIT, "without the refit", "ask for it")
    if config.stats_path is not None and not needs & {"statistics", "covariance"}:
        raise InputError(
            f"stats_path changes nothing, for nothing that was asked for reads statistics, got {config.stats_path}; "
            "leave --stats_path out"
        )
    _check_seeds(config, needs)
    share = share_of(config)
    if share is not None:
        share.take(config.points)
        if config.overwrite and share.number:
            raise InputError(
                f"overwrite would remove what other points measured, got it with point {config.point}; give it with "
                f"--point 0/{share.of}, before the others"
            )


def _check_seeds(config: SweepConfig, needs: frozenset[Need]) -> None:
    """Check that there is at least one seed, and that several make a difference."""
    if config.seeds < 1:
        raise InputError(f"seeds must be at least 1, got {config.seeds}; 3 tell how much results vary")
    chance = config.epochs_ft > 0 or any(setting.criterion == "random" for setting in config.settings)
    if config.seeds > 1 and not chance and (config.stats_path is not None or not needs):
        reads = "no images" if not needs else "the statistics of one file"
        raise InputError(
            f"seeds changes nothing where each seed reads {reads} and nothing is fine-tuned, got {config.seeds}; "
            "leave --seeds out, or give --epochs_ft"
        )
