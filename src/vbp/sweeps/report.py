"""What a sweep measured as a whole: table, Pareto front, CSV and JSON."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from vbp.cost.timing import LatencyComparison
from vbp.report.run_report import Measured
from vbp.runtime.tables import format_count, text_table
from vbp.sweeps.rows import STAGES, OverSeeds, Point, Setting, SettingRows, SweepRow, plain

Cost = Literal["macs", "params", "latency"]

# Missing points that are named.
_LISTED: Final = 5


@dataclass(frozen=True)
class SweepReport:
    """Everything that a sweep measured; `about` is plain JSON data: images, device, versions.

    `missing` are points that were asked for and are not measured yet.
    """

    dense: Measured
    rows: tuple[SweepRow, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[Point, ...] = ()

    @property
    def settings(self) -> tuple[SettingRows, ...]:
        """Return the rows by setting, in their order."""
        by_setting: dict[Setting, list[SweepRow]] = {}
        for row in self.rows:
            by_setting.setdefault(row.setting, []).append(row)
        return tuple(SettingRows(setting, tuple(rows)) for setting, rows in by_setting.items())

    @property
    def seeds(self) -> int:
        """Return how many seeds there are."""
        return len({row.seed for row in self.rows})

    @property
    def is_tuned(self) -> bool:
        """Return whether models were fine-tuned."""
        return any(row.tuned is not None for row in self.rows)

    def share(self, row: SweepRow) -> dict[str, float | None]:
        """Return what is left of a dense model's `top1`, `macs`, `params` and `latency`, as shares of 1."""
        dense, pruned = self.dense, row.measured
        return {
            "top1": pruned.score / dense.score if dense.score else None,
            "macs": pruned.macs / dense.macs,
            "params": pruned.params / dense.params,
            "latency": None if row.latency is None else 1 / row.latency.speedup.median,
        }

    def front(self, cost: Cost) -> tuple[SettingRows, ...]:
        """Return the Pareto front, the cheapest first: no other model costs no more and is at least as accurate.

        The dense model counts as another one.
        """
        known = [(left, group) for group in self.settings if (left := self._cost(group, cost)) is not None]
        front, best = list[SettingRows](), -1.0
        for left, group in sorted(known, key=lambda place: (place[0], -place[1].final_top1.mean)):
            top1 = group.final_top1.mean
            if top1 > best and (left < 1 or top1 > self.dense.score):
                front.append(group)
                best = top1
        return tuple(front)

    def _cost(self, group: SettingRows, cost: Cost) -> float | None:
        shares = [self.share(row)[cost] for row in group.rows]
        known = [share for share in shares if share is not None]
        return statistics.fmean(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "about": dict(self.about),
            "dense": {name: value for name, value in asdict(self.dense).items() if name != "epoch"},
            "rows": [row.to_dict() for row in self.rows],
            "over_seeds": [self._mean_row(group) for group in self.settings] if self.seeds > 1 else [],
            "missing": [point.to_dict() for point in self.missing],
        }

    def _mean_row(self, group: SettingRows) -> dict[str, Any]:
        accuracies = {stage: group.top1(stage) for stage in STAGES}
        return {
            **asdict(group.setting),
            **{f"{stage}_top1": asdict(top1) for stage, top1 in accuracies.items() if top1 is not None},
        }

    def csv(self) -> str:
        """Return the rows as CSV, the dense model first; `*_share` is what is left of it, `*_error` its error."""
        columns = [
            "criterion", "compensation", "scope", "keep_ratio", "seed", "kept", "total", "top1", "top1_error", "top5",
            "top5_error", *_tuned(None), "macs", "params", "images", *_timing(None), "top1_share",
            "tuned_top1_share", "macs_share", "params_share", "latency_share",
        ]  # fmt: skip
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        shares = dict.fromkeys(("top1_share", "macs_share", "params_share"), 1.0)
        writer.writerow({"criterion": "dense", "keep_ratio": 1.0, **plain(self.dense), **shares})
        for row in self.rows:
            shared = {f"{name}_share": value for name, value in self.share(row).items()}
            if row.tuned is not None and self.dense.score:
                shared["tuned_top1_share"] = row.tuned.score / self.dense.score
            writer.writerow({**row.to_dict(), **_tuned(row.tuned), **_timing(row.latency), **shared})
        return text.getvalue()

    def table_rows(self) -> list[list[str]]:
        """Return the table as rows of text, its heading first, without columns in which nothing stands."""
        seeds, tuned = self.seeds > 1, self.is_tuned
        of_stage = ["top-1 %", *(["std"] if seeds else []), "of dense"]
        heading = [
            "method", "keep", *(["seeds"] if seeds else []), *of_stage, "top-5 %",
            *(["tuned top-1 %", *of_stage[1:]] if tuned else []), "MACs", "params", "speed-up (quartiles)",
        ]  # fmt: skip
        dense, gap = self.dense, [""] if seeds else []
        rows = [
            heading,
            [
                "dense", "", *gap, dense.top1_text, *gap, "", dense.top5_text,
                *(["", *gap, ""] if tuned else []), format_count(dense.macs), format_count(dense.params), "",
            ],
            *(self._cells(group) for group in self.settings),
        ]  # fmt: skip
        return rows if any(row.latency for row in self.rows) else [row[:-1] for row in rows]

    def _cells(self, group: SettingRows) -> list[str]:
        """Return one row of the table."""
        keep = f"{group.mean(lambda row: row.kept / row.total):.3f}" if group.rows[0].total else ""
        seeds = self.seeds > 1
        cells = [group.setting.method, keep, *([str(len(group.rows))] if seeds else [])]
        for stage in STAGES if self.is_tuned else STAGES[:1]:
            top1 = group.top1(stage)
            if top1 is None:
                cells += ["", *([""] if seeds else []), ""]
            else:
                share = f"{top1.mean / self.dense.score:.3f}" if self.dense.score else ""
                cells += [top1.text, *([top1.deviation_text] if seeds else []), share]
            if stage == "pruned":
                cells.append(OverSeeds.of(group.models("pruned"), "top5").text)
        speeds = [row.latency for row in group.rows if row.latency is not None]
        speed = speeds[0].speedup_text if len(speeds) == 1 else ""
        if len(speeds) > 1:
            speed = f"{statistics.fmean(one.speedup.median for one in speeds):.2f}x (mean)"
        counts = (group.mean(lambda row: row.measured.macs), group.mean(lambda row: row.measured.params))
        return [*cells, *(format_count(round(count)) for count in counts), speed]

    def table(self) -> str:
        """Return the rows as a table for the terminal, then one of all ratios side by side."""
        blocks = [text_table(self.table_rows())]
        if len({row.setting.keep_ratio for row in self.rows}) > 1:
            blocks.append("share of the dense top-1 left, by keep_ratio\n" + text_table(self._by_ratio()))
        return "\n\n".join([*blocks, *self.remarks()])

    def remarks(self) -> list[str]:
        """Return what a reader of the table must know, and what is missing, in words."""
        dense, lines = self.dense, []
        if timed := dict.fromkeys(row.latency.conditions for row in self.rows if row.latency is not None):
            lines.append(f"speed-up: median and quartiles over the dense model, at {'; '.join(timed)}")
        if dense.top1_error is not None:
            lines.append(
                f"{dense.images} validation images: the dense top-1 has a standard error of {dense.top1_error:.2f} "
                "points"
            )
        if self.seeds > 1:
            lines.append(
                f"means over up to {self.seeds} seeds of calibration and fine-tuning; ± is the standard error over "
                "the validation images, std the standard deviation over the seeds, in points"
            )
        if self.is_tuned:
            lines.append("tuned: after the best epoch of fine-tuning, where epoch 0 is the pruned model")
        if self.missing:
            asked = len(self.missing) + len(self.rows)
            names = ", ".join(point.name for point in self.missing[:_LISTED])
            more = len(self.missing) - _LISTED
            lines.append(
                f"missing: {len(self.missing)} of {asked} points ({names}{f' and {more} more' if more > 0 else ''}); "
                "the command of the sweep measures them, and --point K/N a share of them"
            )
        return lines

    def _by_ratio(self) -> list[list[str]]:
        ratios = sorted({row.setting.keep_ratio for row in self.rows}, reverse=True)
        methods: dict[str, dict[float, str]] = {}
        for group in self.settings:
            share = f"{group.final_top1.mean / self.dense.score:.3f}" if self.dense.score else ""
            methods.setdefault(group.setting.method, {})[group.setting.keep_ratio] = share
        rows = [[method, *(cells.get(ratio, "") for ratio in ratios)] for method, cells in methods.items()]
        return [["method", *(f"{ratio:g}" for ratio in ratios)], *rows]


def _tuned(model: Measured | None) -> dict[str, Any]:
    """Return the cells of a fine-tuned model, empty where there is none; the names are columns of the CSV."""
    names = ("tuned_top1", "tuned_top1_error", "tuned_top5", "tuned_epoch")
    if model is None:
        return dict.fromkeys(names)
    return dict(zip(names, (model.score, model.top1_error, model.top5, model.epoch), strict=True))


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
