"""What a sweep measured: plain data, a table, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vbp.report.run_report import Measured
from vbp.runtime.choices import Compensation, Scope
from vbp.runtime.decode import from_json
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
    """One pruned model, which keeps `kept` of `total` MLP channels; latencies are measured in turns."""

    setting: Setting
    kept: int
    total: int
    measured: Measured
    dense_latency_ms: float | None = None

    @property
    def speedup(self) -> float | None:
        """Return the dense model's latency over this one's."""
        pruned = self.measured.latency_ms
        return None if pruned is None or self.dense_latency_ms is None else self.dense_latency_ms / pruned

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        measured = {name: value for name, value in asdict(self.measured).items() if name != "epoch"}
        return {
            **asdict(self.setting), "kept": self.kept, "total": self.total, **measured,
            "dense_latency_ms": self.dense_latency_ms,
        }  # fmt: skip

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> SweepRow:
        """Return the row of which this is the plain JSON data."""
        parts = {
            name: {part.name: value[part.name] for part in fields(kind) if part.name in value}
            for name, kind in (("setting", Setting), ("measured", Measured))
        }
        plain = {name: value[name] for name in ("kept", "total", "dense_latency_ms")} | parts
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
            "top1": pruned.top1 / dense.top1 if dense.top1 else None,
            "macs": pruned.macs / dense.macs,
            "params": pruned.params / dense.params,
            "latency": None if row.speedup is None else 1 / row.speedup,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        dense = {name: value for name, value in asdict(self.dense).items() if name not in ("epoch", "latency_ms")}
        return {"about": dict(self.about), "dense": dense, "rows": [row.to_dict() for row in self.rows]}

    def csv(self) -> str:
        """Return the rows as CSV, the dense model first; `*_share` is what is left of it."""
        columns = [
            "criterion", "compensation", "scope", "keep_ratio", "kept", "total", "top1", "top5", "macs", "params",
            "latency_ms", "dense_latency_ms", "images", "top1_share", "macs_share", "params_share", "latency_share",
        ]  # fmt: skip
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        shares = dict.fromkeys(("top1_share", "macs_share", "params_share"), 1.0)
        writer.writerow({"criterion": "dense", "keep_ratio": 1.0, **asdict(self.dense), **shares})
        for row in self.rows:
            shared = {f"{name}_share": value for name, value in self.share(row).items()}
            writer.writerow({**row.to_dict(), **shared})
        return text.getvalue()

    def table(self) -> str:
        """Return the rows as a table for the terminal, then one of all ratios side by side."""
        dense = self.dense
        rows = [
            ("method", "keep", "top-1 %", "of dense", "top-5 %", "MACs", "params", "speed-up"),
            ("dense", "", *_figures(dense, ""), ""),
            *map(self._cells, self.rows),
        ]
        timed = any(row.speedup for row in self.rows)
        blocks = [text_table(rows if timed else [row[:-1] for row in rows])]
        if len({row.setting.keep_ratio for row in self.rows}) > 1:
            blocks.append("share of the dense top-1 left, by keep_ratio\n" + text_table(self._by_ratio()))
        if dense.images and 0 < dense.top1 < 100:
            error = (dense.top1 * (100 - dense.top1) / dense.images) ** 0.5
            blocks.append(
                f"{dense.images} validation images: the dense top-1 has a standard error of {error:.2f} points"
            )
        return "\n\n".join(blocks)

    def _cells(self, row: SweepRow) -> tuple[str, ...]:
        keep = f"{row.kept / row.total:.3f}" if row.total else ""
        speed = "" if row.speedup is None else f"{row.speedup:.2f}x"
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


def _text(share: float | None) -> str:
    return "" if share is None else f"{share:.3f}"
