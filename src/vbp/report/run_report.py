"""What a run did: plain data, written to and read from its folder, and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from vbp.cost.macs import format_count
from vbp.errors import InputError
from vbp.pruning.plan import PruningPlan
from vbp.statistics.statistics import Statistics

# How tables call the pruned model, by its compensation.
PRUNED_LABELS: Final[Mapping[str, str]] = {
    "none": "pruned, no compensation",
    "mean": "pruned, mean shift",
    "refit": "pruned, refit",
}


@dataclass(frozen=True)
class Measured:
    """One model of a run.

    Attributes:
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent.
        macs: Multiply-accumulates of one image.
        params: Number of parameters.
        latency_ms: Median time of one batch in milliseconds, where it was measured.
        epoch: Epochs of fine-tuning behind it, where that applies.
        images: Validation images behind the accuracy.
    """

    top1: float
    top5: float
    macs: int
    params: int
    latency_ms: float | None = None
    epoch: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class RunReport:
    """Everything that a run measured.

    Attributes:
        base: The dense model.
        pruned: Right after pruning, with the compensation that was asked for.
        best: The checkpoint with the highest validation accuracy; the pruned model counts as epoch 0.
        final: The last checkpoint.
        uncompensated: Right after pruning without compensation, if asked for.
        keep_ratio: Share of the MLP channels that was kept in fact.
        sites: Site name -> [kept, total] channels.
        seconds: Wall-clock seconds of each stage.
        images: Number of calibration and validation images.
        convergence: How the plan settled as the calibration images grew; None for statistics from a file.
        latency_batch: Images in the batch whose latency was measured.
        device: Kind of device.
        processes: Number of processes of the job.
        files: Name -> path of each file left behind.
        budget: What was asked for, and whether the plan meets it: the data of `BudgetResult`.
        candidates: Plans that the criterion auto tried: name, divergence in nats, widths.
        reconstruction: Site name -> variances `mean_shift`, `refit` and `energy` of its consumer's output, measured
            on the calibration images; without refit none.
        producers: What the refit of the producers did: sites, images, KL of the answers before and after; None
            without.
        stream: What the refit of the residual stream did: sites, images, KL of the answers before and after; None
            without.
        head: What the refit of the last layer did: layer, images, KL of the answers before and after; None without.

    Example:
        >>> vbp.run(config).sites
        {'blocks.0.mlp.fc1': (64, 128), 'blocks.1.mlp.fc1': (64, 128)}
    """

    base: Measured
    pruned: Measured
    best: Measured
    final: Measured
    uncompensated: Measured | None
    keep_ratio: float
    sites: Mapping[str, tuple[int, int]]
    seconds: Mapping[str, float]
    images: Mapping[str, int]
    convergence: Mapping[str, Any] | None
    latency_batch: int
    device: str
    processes: int
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    files: Mapping[str, str]
    budget: Mapping[str, Any] = field(default_factory=dict)
    candidates: Sequence[Mapping[str, Any]] = ()
    reconstruction: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    producers: Mapping[str, Any] | None = None
    stream: Mapping[str, Any] | None = None
    head: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON data of `summary.json`."""
        models = {name: _measured(getattr(self, name)) for name in ("base", "pruned", "best", "final")}
        if self.uncompensated is not None:
            models["uncompensated"] = _measured(self.uncompensated)
        return {
            **models,
            "keep_ratio": self.keep_ratio,
            "sites": {name: list(widths) for name, widths in self.sites.items()},
            "seconds": dict(self.seconds),
            "images": dict(self.images),
            "convergence": None if self.convergence is None else dict(self.convergence),
            "budget": dict(self.budget),
            "candidates": [dict(one) for one in self.candidates],
            "reconstruction": {name: dict(errors) for name, errors in self.reconstruction.items()},
            "producers": None if self.producers is None else dict(self.producers),
            "stream": None if self.stream is None else dict(self.stream),
            "head": None if self.head is None else dict(self.head),
            "latency_batch": self.latency_batch,
            "device": self.device,
            "processes": self.processes,
            "versions": dict(self.versions),
            "config": dict(self.config),
            "files": dict(self.files),
        }

    def table(self) -> str:
        """Return the steps of the run as a table for the terminal."""
        compensation = self.config["compensation"]
        rows = [("dense", self.base)]
        if self.uncompensated is not None and compensation != "none":
            rows.append((PRUNED_LABELS["none"], self.uncompensated))
        rows.append((PRUNED_LABELS[compensation], self.pruned))
        if self.final.epoch:
            # Where tuning helped at no epoch, the pruned model above is the best.
            if self.best.epoch:
                rows.append((f"fine-tuned, best (epoch {self.best.epoch})", self.best))
            rows.append((f"fine-tuned, final (epoch {self.final.epoch})", self.final))
        width = max(len(label) for label, _ in rows)
        heading = f"{'':<{width}}  {'top-1 %':>8}  {'top-5 %':>8}  {'MACs':>9}  {'params':>9}  {'latency':>10}"
        lines = [heading, *(_row(label, model, width) for label, model in rows)]
        ratio = f"kept {self.keep_ratio:.1%} of the hidden channels"
        speed = ""
        if self.base.latency_ms and self.pruned.latency_ms:
            speed = (
                f"; {self.base.latency_ms / self.pruned.latency_ms:.2f}x as fast at batch {self.latency_batch} "
                f"on {self.device} ({self.base.macs / self.pruned.macs:.2f}x by MACs)"
            )
        lines.append(f"{ratio}{speed}; {self.images['val']} validation images")
        if self.budget and (self.budget["budget"]["quantity"] != "keep_ratio" or not self.budget["met"]):
            lines.append(self.budget["sentence"])
        return "\n".join(lines)


def _measured(model: Measured) -> dict[str, Any]:
    return {name: value for name, value in asdict(model).items() if value is not None}


def _row(label: str, model: Measured, width: int) -> str:
    latency = "" if model.latency_ms is None else f"{model.latency_ms:.2f} ms"
    return (
        f"{label:<{width}}  {model.top1:>8.2f}  {model.top5:>8.2f}  {format_count(model.macs):>9}  "
        f"{format_count(model.params):>9}  {latency:>10}"
    )


SUMMARY = "summary.json"


@dataclass(frozen=True)
class Step:
    """One measured model of a run.

    Attributes:
        name: Its key in the summary: `base`, `uncompensated`, `pruned`, `best` or `final`.
        label: How tables call it; no two steps of a run have the same.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent.
        macs: Multiply-accumulates of one image.
        params: Number of parameters.
        latency_ms: Median time of one batch in milliseconds, where it was measured.
        epoch: Epochs of fine-tuning behind it, where that applies.
    """

    name: str
    label: str
    top1: float
    top5: float
    macs: int
    params: int
    latency_ms: float | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class RunSummary:
    """What `summary.json` says; what an older run did not write is empty or None.

    Attributes:
        folder: Where it was read.
        models: Key -> model: `base`, `pruned`, `best`, `final`, and `uncompensated` where it was measured.
        keep_ratio: Share of the MLP channels that was kept in fact.
        sites: Site name -> (kept, total) channels.
        reconstruction: Site name -> variances `mean_shift`, `refit` and `energy` of its consumer's output.
        budget: What was asked for and what came of it, in words.
        candidates: Plans that the criterion auto tried: name, and divergence of the answers in nats.
    """

    folder: Path
    models: Mapping[str, Step]
    keep_ratio: float
    sites: Mapping[str, tuple[int, int]]
    seconds: Mapping[str, float]
    images: Mapping[str, int]
    convergence: Mapping[str, Any] | None
    reconstruction: Mapping[str, Mapping[str, float]] | None
    latency_batch: int | None
    device: str | None
    processes: int
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    budget: str | None = None
    candidates: tuple[tuple[str, float], ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """Return the models in the order in which they came about, each once."""
        base, pruned, best, final = (self.models[name] for name in ("base", "pruned", "best", "final"))
        steps = [base]
        if "uncompensated" in self.models and self.config["compensation"] != "none":
            steps.append(self.models["uncompensated"])
        steps.append(pruned)
        if final.epoch:
            # Where tuning helped at no epoch, the pruned model above is the best.
            if best.epoch:
                steps.append(best)
            steps.append(final)
        return tuple(steps)

    @property
    def speedup(self) -> float | None:
        """Return by how much the pruned model was faster than the dense one, where both were timed."""
        base, pruned = self.models["base"].latency_ms, self.models["pruned"].latency_ms
        return base / pruned if base and pruned else None


def read_summary(folder: Path) -> RunSummary:
    """Read the summary of a finished run alone.

    Raises:
        InputError: The folder holds none, or it is damaged.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise InputError(
            f"a run must be a folder with {SUMMARY}, got {folder}; give the save_dir of a run that has ended"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return _summary(folder, value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no readable summary of a run ({error!r}); run it again") from error


def _summary(folder: Path, value: Mapping[str, Any]) -> RunSummary:
    config = dict(value["config"])
    names = ["base", "pruned", "best", "final"] + (["uncompensated"] if value.get("uncompensated") else [])
    reconstruction = value.get("reconstruction")
    return RunSummary(
        folder,
        {name: _step(name, value[name], config["compensation"]) for name in names},
        finite(value["keep_ratio"]),
        {name: (count(kept), count(total)) for name, (kept, total) in value["sites"].items()},
        {name: finite(item) for name, item in value.get("seconds", {}).items()},
        {name: count(item) for name, item in value.get("images", {}).items() if item is not None},
        None if value.get("convergence") is None else _convergence(value["convergence"]),
        {site: _errors(found) for site, found in reconstruction.items()} if reconstruction else None,
        None if value.get("latency_batch") is None else count(value["latency_batch"]),
        value.get("device"),
        count(value.get("processes", 1)),
        {name: str(item) for name, item in value.get("versions", {}).items()},
        config,
        str(value["budget"]["sentence"]) if value.get("budget") else None,
        tuple((str(one["name"]), finite(one["divergence"])) for one in value.get("candidates", ())),
    )


def _step(name: str, value: Mapping[str, Any], compensation: str) -> Step:
    latency, epoch = value.get("latency_ms"), value.get("epoch")
    labels = {
        "base": "dense",
        "uncompensated": PRUNED_LABELS["none"],
        "pruned": PRUNED_LABELS.get(compensation, f"pruned, {compensation}"),
        "best": f"fine-tuned, best (epoch {epoch})",
        "final": f"fine-tuned, final (epoch {epoch})",
    }
    return Step(
        name,
        labels[name],
        finite(value["top1"]),
        finite(value["top5"]),
        count(value["macs"]),
        count(value["params"]),
        None if latency is None else finite(latency),
        None if epoch is None else count(epoch),
    )


def _convergence(value: Mapping[str, Any]) -> dict[str, Any]:
    stages = [
        {
            "images": count(stage["images"]),
            "changed": None if stage["changed"] is None else finite(stage["changed"]),
        }
        for stage in value["stages"]
    ]
    return {"stages": stages, "settled": value.get("settled")}


def _errors(value: Mapping[str, Any]) -> dict[str, float]:
    names = ("mean_shift", "energy") + (("refit",) if "refit" in value else ())
    return {name: finite(value[name]) for name in names}


def finite(value: Any) -> float:
    """Return a finite number, or raise TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no finite number")
    return float(value)


def count(value: Any) -> int:
    """Return a number of things, or raise TypeError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value


METRICS, PLAN, STATISTICS = "metrics.jsonl", "plan.json", "statistics.safetensors"


_CURVES = ("top1", "top5", "train_loss", "train_top1", "lr", "seconds")


@dataclass(frozen=True)
class RunFolder:
    """A run whole: the summary and, where the folder still has them, curves, plan and statistics."""

    summary: RunSummary
    epochs: tuple[Mapping[str, Any], ...]
    plan: PruningPlan | None
    statistics: Statistics | None


def read_run(folder: Path) -> RunFolder:
    """Read a finished run.

    Raises:
        InputError: It is no run, a file of it is damaged, or its files come from different runs.
    """
    summary = read_summary(folder)
    plan = PruningPlan.load(folder / PLAN) if (folder / PLAN).is_file() else None
    statistics = Statistics.load(folder / STATISTICS) if (folder / STATISTICS).is_file() else None
    if plan is not None:
        if plan.widths != summary.sites:
            raise InputError(
                f"{folder / PLAN} and {SUMMARY} must come from one run, got other channels; run it again"
            )
        if statistics is not None:
            statistics.check_holds([entry.site for entry in plan.sites], folder / STATISTICS)
    return RunFolder(summary, _read_epochs(folder / METRICS), plan, statistics)


def _read_epochs(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        # A loss may be NaN where training went wrong; that is worth a report too.
        return tuple(
            {name: float(row[name]) for name in _CURVES if name in row} | {"epoch": count(row["epoch"])}
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no readable table of epochs ({error!r}); run it again") from error
