"""The points of a sweep, what was measured of each, and means over seeds: plain data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from vbp.cost.timing import LatencyComparison
from vbp.report.run_report import Measured
from vbp.runtime.choices import Compensation, Scope
from vbp.runtime.decode import from_json, to_json
from vbp.runtime.tables import standard_error

Stage = Literal["pruned", "tuned"]
STAGES: Final[tuple[Stage, ...]] = ("pruned", "tuned")


@dataclass(frozen=True)
class Setting:
    """One way to prune; `criterion` is a name of `vbp.pruning.criteria.Criterion`."""

    criterion: str
    compensation: Compensation
    scope: Scope
    keep_ratio: float

    @property
    def method(self) -> str:
        """Return a short name of all but the ratio."""
        return f"{self.criterion}/{self.compensation}" + ("" if self.scope == "global" else f", {self.scope}")


@dataclass(frozen=True)
class Point:
    """One model of a sweep: a way to prune, with the seed of calibration and fine-tuning."""

    setting: Setting
    seed: int = 0

    @property
    def name(self) -> str:
        """Return the name of the point's folder."""
        setting = self.setting
        return "-".join((
            setting.criterion, setting.compensation, setting.scope, repr(float(setting.keep_ratio)),
            f"seed{self.seed}",
        ))  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self.setting), "seed": self.seed}


@dataclass(frozen=True)
class SweepRow:
    """One pruned model, which keeps `kept` of `total` MLP channels.

    `measured` is right after pruning, `tuned` after the best epoch of fine-tuning, `latency` beside the dense model;
    the last two only where they were asked for.
    """

    setting: Setting
    kept: int
    total: int
    measured: Measured
    latency: LatencyComparison | None = None
    seed: int = 0
    tuned: Measured | None = None

    @property
    def point(self) -> Point:
        """Return which model of the sweep it is."""
        return Point(self.setting, self.seed)

    @property
    def final(self) -> Measured:
        """Return the model that comes out: fine-tuned, where it was."""
        return self.tuned or self.measured

    @property
    def sentence(self) -> str:
        """Return in one line what was measured."""
        kept = self.kept / self.total if self.total else 1.0
        tuned = "" if self.tuned is None else f", fine-tuned {self.tuned.top1_text} %"
        return f"{self.setting.method}, seed {self.seed}, kept {kept:.3f}: top-1 {self.measured.top1_text} %{tuned}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            **self.point.to_dict(), "kept": self.kept, "total": self.total, **plain(self.measured),
            "latency": to_json(self.latency),
            "tuned": None if self.tuned is None else plain(self.tuned) | {"epoch": self.tuned.epoch},
        }  # fmt: skip

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> SweepRow:
        """Return the row of which this is the plain JSON data."""
        parts = {name: value[name] for name in ("kept", "total", "latency", "seed", "tuned") if name in value}
        parts |= {"setting": _part(Setting, value), "measured": _part(Measured, value)}
        if isinstance(parts.get("tuned"), Mapping):
            parts["tuned"] = _part(Measured, parts["tuned"])
        return from_json(SweepRow, parts, "the row of a sweep", use_defaults=True)


def point_from_dict(value: Mapping[str, Any]) -> Point:
    """Return the point of which `Point.to_dict` returned the plain JSON data."""
    parts = {"setting": _part(Setting, value), "seed": value["seed"]}
    return from_json(Point, parts, "a point of a sweep")


@dataclass(frozen=True)
class OverSeeds:
    """An accuracy in percent: its mean over the seeds, and what it varies by.

    `error` is the standard error over the validation images, `deviation` the standard deviation over the seeds; None
    where there is nothing to tell it from.
    """

    mean: float
    error: float | None
    deviation: float | None
    seeds: int

    @staticmethod
    def of(models: Sequence[Measured], name: Literal["top1", "top5"] = "top1") -> OverSeeds:
        """Return it for one accuracy of the models of several seeds, which were measured on the same images."""
        values = [getattr(model, name) for model in models]
        mean = statistics.fmean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return OverSeeds(mean, standard_error(mean, models[0].images), deviation, len(values))

    @property
    def text(self) -> str:
        """Return the mean as tables show it, with the standard error over images."""
        return f"{self.mean:.2f}" if self.error is None else f"{self.mean:.2f} ± {self.error:.2f}"

    @property
    def deviation_text(self) -> str:
        """Return the standard deviation over seeds as tables show it."""
        return "" if self.deviation is None else f"{self.deviation:.2f}"


@dataclass(frozen=True)
class SettingRows:
    """The rows of one setting, one for each seed that was measured."""

    setting: Setting
    rows: tuple[SweepRow, ...]

    def models(self, stage: Stage) -> list[Measured]:
        """Return the models of the seeds, right after pruning or after fine-tuning."""
        models = [row.measured if stage == "pruned" else row.tuned for row in self.rows]
        return [model for model in models if model is not None]

    @property
    def final_top1(self) -> OverSeeds:
        """Return the accuracy of the models that come out: fine-tuned, where they were."""
        return OverSeeds.of([row.final for row in self.rows])

    def top1(self, stage: Stage) -> OverSeeds | None:
        """Return the accuracy right after pruning or after fine-tuning; None where nothing was fine-tuned."""
        models = self.models(stage)
        return OverSeeds.of(models) if models else None

    def mean(self, value: Callable[[SweepRow], float]) -> float:
        """Return the mean of a number over the seeds."""
        return statistics.fmean(map(value, self.rows))


def _part(kind: type, value: Mapping[str, Any]) -> dict[str, Any]:
    return {part.name: value[part.name] for part in fields(kind) if part.name in value}


def plain(model: Measured) -> dict[str, Any]:
    """Return the figures of a model as plain JSON data, with its standard errors."""
    figures = {name: value for name, value in asdict(model).items() if name != "epoch"}
    return figures | {"top1_error": model.top1_error, "top5_error": model.top5_error}
