"""What a sweep measured: plain data, a table, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vbp.cost.timing import LatencyComparison
from vbp.report.run_report import Measured
from vbp.runtime.choices import Compensation, Scope
from vbp.runtime.decode import from_json, to_json
from vbp.runtime.tables import format_count, text_table


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
class SweepRow:
    """One pruned model, which keeps `kept` of `total` MLP channels; `latency` beside the dense one, if asked for."""

    setting: Setting
    kept: int
    total: int
    measured: Measured
    latency: LatencyComparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        measured = {name: value for name, value in asdict(self.measured).items() if name != "epoch"}
        return {
            **asdict(self.setting), "kept": self.kept, "total": self.total, **measured, **_errors(self.measured),
            "latency": to_json(self.latency),
        }  # fmt: skip

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> SweepRow:
        """Return the row of which this is the plain JSON data."""
        parts = {
            name: {part.name: value[part.name] for part in fields(kind) if part.name in value}
            for name, kind in (("setting", Setting), ("measured", Measured))
        }
        plain = {name: value[name] for name in ("kept", "total", "latency")} | parts
        return from_json(SweepRow, plain, "the row of a sweep", use_defaults=True)


@dataclass(frozen=True)
class SweepReport:
    """Everything that a sweep measured; `about` is plain JSON data: images, device, versions."""

    dense: Measured
    rows: tuple[SweepRow, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def share(self, row: SweepRow) -> dict[str, float | None]:
        """Return what is left of a dense model's `top1`, `macs`, `params` and `latency`, as shares of 1."""
        dense, pruned = self.dense, row.measured
        return {
            "top1": pruned.score / dense.score if dense.score else None,
            "macs": pruned.macs / dense.macs,
            "params": pruned.params / dense.params,
            "latency": None if row.latency is None else 1 / row.latency.speedup.median,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        dense = {name: value for name, value in asdict(self.dense).items() if name != "epoch"}
        return {"about": dict(self.about), "dense": dense, "rows": [row.to_dict() for row in self.rows]}

    def csv(self) -> str:
        """Return the rows as CSV, the dense model first; `*_share` is what is left of it, `*_error` its error."""
        columns = [
            "criterion", "compensation", "scope", "keep_ratio", "kept", "total", "top1", "top1_error", "top5",
            "top5_error", "macs", "params", "images", *_timing(None), "top1_share", "macs_share", "params_share",
            "latency_share",
        ]  # fmt: skip
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        shares = dict.fromkeys(("top1_share", "macs_share", "params_share"), 1.0)
        writer.writerow(
            {"criterion": "dense", "keep_ratio": 1.0, **asdict(self.dense), **_errors(self.dense), **shares}
        )
        for row in self.rows:
            shared = {f"{name}_share": value for name, value in self.share(row).items()}
            writer.writerow({**row.to_dict(), **_timing(row.latency), **shared})
        return text.getvalue()

    def table(self) -> str:
        """Return the rows as a table for the terminal, then one of all ratios side by side."""
        dense = self.dense
        rows = [
            ("method", "keep", "top-1 %", "of dense", "top-5 %", "MACs", "params", "speed-up (quartiles)"),
            ("dense", "", *_figures(dense, ""), ""),
            *map(self._cells, self.rows),
        ]
        timed = dict.fromkeys(row.latency.conditions for row in self.rows if row.latency is not None)
        blocks = [text_table(rows if timed else [row[:-1] for row in rows])]
        if len({row.setting.keep_ratio for row in self.rows}) > 1:
            blocks.append("share of the dense top-1 left, by keep_ratio\n" + text_table(self._by_ratio()))
        if timed:
            blocks.append(f"speed-up: median and quartiles over the dense model, at {'; '.join(timed)}")
        if dense.top1_error is not None:
            blocks.append(
                f"{dense.images} validation images: the dense top-1 has a standard error of {dense.top1_error:.2f} "
                "points"
            )
        return "\n\n".join(blocks)

    def _cells(self, row: SweepRow) -> tuple[str, ...]:
        keep = f"{row.kept / row.total:.3f}" if row.total else ""
        speed = "" if row.latency is None else row.latency.speedup_text
        return (row.setting.method, keep, *_figures(row.measured, _text(self.share(row)["top1"])), speed)

    def _by_ratio(self) -> list[list[str]]:
        ratios = sorted({row.setting.keep_ratio for row in self.rows}, reverse=True)
        methods: dict[str, dict[float, str]] = {}
        for row in self.rows:
            methods.setdefault(row.setting.method, {})[row.setting.keep_ratio] = _text(self.share(row)["top1"])
        rows = [[method, *(cells.get(ratio, "") for ratio in ratios)] for method, cells in methods.items()]
        return [["method", *(f"{ratio:g}" for ratio in ratios)], *rows]


def _figures(model: Measured, share: str) -> tuple[str, ...]:
    return model.top1_text, share, model.top5_text, format_count(model.macs), format_count(model.params)


def _errors(model: Measured) -> dict[str, float | None]:
    return {"top1_error": model.top1_error, "top5_error": model.top5_error}


def _timing(timed: LatencyComparison | None) -> dict[str, Any]:
    """Return the cells of a comparison of latencies, empty where there was none; the names are columns of the CSV."""
    names = (
        "latency_ms", "dense_latency_ms", "speedup", "speedup_low", "speedup_high", "batch", "device", "precision",
        "clock",
    )  # fmt: skip
    if timed is None:
        return dict.fromkeys(names)
    speedup = timed.speedup
    values = (
        timed.pruned_ms.median, timed.dense_ms.median, speedup.median, speedup.low, speedup.high, timed.batch,
        timed.device, timed.precision, timed.clock,
    )  # fmt: skip
    return dict(zip(names, values, strict=True))


def _text(share: float | None) -> str:
    return "" if share is None else f"{share:.3f}"
