"""What a run found: plain data, a JSON summary and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from vbp.cost import format_count

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
        """Give the plain JSON data of `summary.json`."""
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
        """Give the steps of the run as a table for the terminal."""
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
