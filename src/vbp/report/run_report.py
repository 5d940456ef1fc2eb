"""What a run did: plain data, written to and read from its folder, and a table."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vbp.deploy.artifact_files import ARTIFACT
from vbp.errors import InputError
from vbp.method.ridge import Reconstruction
from vbp.pruning.convergence import Stage
from vbp.pruning.plan import Candidate, PruningPlan
from vbp.runtime.decode import from_json, parse_json, read_json, to_json
from vbp.runtime.tables import format_count, text_table
from vbp.statistics.statistics import Statistics

SUMMARY, METRICS, PLAN, STATISTICS = "summary.json", "metrics.jsonl", "plan.json", "statistics.safetensors"
BEST, FINAL = "vbp_best.pth", "vbp_final.pth"

# How tables call the pruned model, by its compensation.
_PRUNED: Final = {"none": "pruned, no compensation", "mean": "pruned, mean shift", "refit": "pruned, refit"}

_CURVES: Final = ("top1", "top5", "train_loss", "train_top1", "lr", "seconds")


def with_error(percent: float, images: int | None) -> str:
    """Return a percentage with its standard error over images: 72.02 ± 1.24.

    Without the number of images, and at 0 and 100 %, where a count does not tell it, the percentage alone.
    """
    if not images or not 0 < percent < 100:
        return f"{percent:.2f}"
    return f"{percent:.2f} ± {(percent * (100 - percent) / images) ** 0.5:.2f}"


@dataclass(frozen=True)
class Measured:
    """One model of a run: accuracies in percent on `images` validation images, MACs of one image, epochs of tuning.

    `latency_ms` is the median time of one batch, where it was measured.
    """

    top1: float
    top5: float
    macs: int
    params: int
    latency_ms: float | None = None
    epoch: int | None = None
    images: int | None = None

    @property
    def top1_text(self) -> str:
        """Return the top-1 accuracy as tables show it, with its standard error."""
        return with_error(self.top1, self.images)

    @property
    def top5_text(self) -> str:
        """Return the top-5 accuracy as tables show it, with its standard error."""
        return with_error(self.top5, self.images)

    def __post_init__(self) -> None:
        """Raise an `InputError` if a count is negative."""
        if min(self.macs, self.params, self.epoch or 0, self.images or 0) < 0:
            raise InputError(f"MACs, parameters, epoch and images must be counts, got {self}; measure again")


@dataclass(frozen=True)
class RunReport:
    """Everything that a run measured; a checkpoint holds it too, as far as it is known then.

    Attributes:
        base: The dense model.
        pruned: Right after pruning, with the compensation that was asked for.
        best: The checkpoint with the highest validation accuracy; the pruned model counts as epoch 0.
        final: The last checkpoint.
        keep_ratio: Share of the MLP channels that was kept in fact.
        sites: Site name -> [kept, total] channels.
        images: Number of calibration and validation images.
        latency_batch: Images in the batch whose latency was measured.
        device: Kind of device.
        processes: Number of processes of the job.
        versions: Package -> version.
        config: The settings, from which the run can be repeated.
        seconds: Wall-clock seconds of each stage.
        files: Name -> path of each file left behind.
        uncompensated: Right after pruning without compensation, if asked for.
        convergence: The data of `Convergence`; None for statistics from a file.
        budget: What was asked for, and whether the plan meets it: the data of `BudgetResult`.
        candidates: Plans that the criterion auto tried: name, divergence in nats, widths.
        reconstruction: Site name -> variances `mean_shift`, `refit` and `energy` of its consumer's output, measured
            on the calibration images; without refit none.
        producers: What the refit of the producers did: the data of `ProducerRefit`, and a `sentence`; None without.
        stream: The same of the refit of the residual stream, `StreamRefit`.
        head: The same of the refit of the last layer, `HeadRefit`.

    Example:
        >>> vbp.run(config).sites
        {'blocks.0.mlp.fc1': (64, 128), 'blocks.1.mlp.fc1': (64, 128)}
    """

    base: Measured
    pruned: Measured
    best: Measured
    final: Measured
    keep_ratio: float
    sites: Mapping[str, tuple[int, int]]
    images: Mapping[str, int]
    latency_batch: int
    device: str
    processes: int
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    uncompensated: Measured | None = None
    convergence: Mapping[str, Any] | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)
    candidates: Sequence[Mapping[str, Any]] = ()
    reconstruction: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    producers: Mapping[str, Any] | None = None
    stream: Mapping[str, Any] | None = None
    head: Mapping[str, Any] | None = None

    @property
    def models(self) -> dict[str, Measured]:
        """Return the measured models by name: `uncompensated` only where it was measured."""
        names = ("base", "uncompensated", "pruned", "best", "final")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def steps(self) -> dict[str, str]:
        """Return how tables call each model, by name, in the order in which they were made."""
        compensation = self.config["compensation"]
        steps = {"base": "dense"}
        if self.uncompensated is not None and compensation != "none":
            steps["uncompensated"] = _PRUNED["none"]
        steps["pruned"] = _PRUNED.get(compensation, f"pruned, {compensation}")
        if self.final.epoch:
            # Where tuning improved it at no epoch, the pruned model above is the best.
            if self.best.epoch:
                steps["best"] = f"fine-tuned, best (epoch {self.best.epoch})"
            steps["final"] = f"fine-tuned, final (epoch {self.final.epoch})"
        return steps

    @property
    def speedup(self) -> float | None:
        """Return by how much the pruned model was faster than the dense one, where both were timed."""
        base, pruned = self.base.latency_ms, self.pruned.latency_ms
        return base / pruned if base and pruned else None

    @property
    def untuned_best(self) -> str:
        """Return which row each file is, where fine-tuning improved the model at no epoch; else nothing."""
        if not self.final.epoch or self.best.epoch:
            return ""
        pruned, final = self.steps["pruned"], self.steps["final"]
        return f"no epoch was better than none: {ARTIFACT}/ and {BEST} hold the row {pruned!r}, {FINAL} {final!r}"

    @property
    def refits(self) -> tuple[str, ...]:
        """Return what each refit after surgery did, in words."""
        return tuple(refit["sentence"] for refit in (self.producers, self.stream, self.head) if refit)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON data of `summary.json`; of a model, what was not measured is left out."""
        plain: dict[str, Any] = to_json(self)
        plain |= {
            name: {key: value for key, value in to_json(model).items() if value is not None}
            for name, model in self.models.items()
        }
        return plain if self.uncompensated else {k: v for k, v in plain.items() if k != "uncompensated"}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> RunReport:
        """Read what `to_dict` returned.

        Raises:
            InputError: It is no report of a run, or damaged.
        """
        report = from_json(RunReport, value, "the report of a run", "run it again", use_defaults=True)
        if any(not 0 <= kept <= total or total == 0 for kept, total in report.sites.values()):
            raise InputError(f"sites must keep some of their channels, got {dict(report.sites)}; run it again")
        parts = [
            part for part in (report.budget or None, report.producers, report.stream, report.head) if part is not None
        ]
        details = {
            "compensation": report.config.get("compensation"),
            "convergence": report.convergence,
            "candidates": report.candidates,
            "reconstruction": [{"site": site, **errors} for site, errors in report.reconstruction.items()],
            "sentences": [part.get("sentence") for part in parts],
        }
        from_json(_Details, details, "the report of a run", "run it again")
        return report

    @staticmethod
    def read(folder: Path) -> RunReport:
        """Read the summary of a finished run.

        Raises:
            InputError: The folder holds none, or it is damaged.
        """
        path = folder / SUMMARY
        if not path.is_file():
            raise InputError(
                f"a run must be a folder with {SUMMARY}, got {folder}; give the save_dir of a run that has ended"
            )
        try:
            return RunReport.from_dict(read_json(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no readable summary of a run ({error}); run it again") from error

    def table(self) -> str:
        """Return the steps of the run as a table for the terminal."""
        rows = [("", "top-1 %", "top-5 %", "MACs", "params", "latency")]
        for name, label in self.steps.items():
            model = self.models[name]
            latency = "" if model.latency_ms is None else f"{model.latency_ms:.2f} ms"
            sizes = (format_count(model.macs), format_count(model.params))
            rows.append((label, model.top1_text, model.top5_text, *sizes, latency))
        facts = [f"kept {self.keep_ratio:.1%} of the hidden channels"]
        if self.speedup is not None:
            facts.append(
                f"{self.speedup:.2f}x as fast at batch {self.latency_batch} "
                f"on {self.device} ({self.base.macs / self.pruned.macs:.2f}x by MACs)"
            )
        facts.append(f"{self.images['val']} validation images")
        lines = [text_table(rows, widths=(0, 8, 8, 9, 9, 10)), "; ".join(facts)]
        if self.budget and (self.budget["budget"]["quantity"] != "keep_ratio" or not self.budget["met"]):
            lines.append(self.budget["sentence"])
        if self.untuned_best:
            lines.append(self.untuned_best)
        return "\n".join(lines)


def setting_text(value: Any) -> str:
    """Return the value of a setting as tables show it."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else "-" if value is None else str(value)


@dataclass(frozen=True)
class _Convergence:
    stages: tuple[Stage, ...]
    converged: int | None


@dataclass(frozen=True)
class _Details:
    """The types of the plain data inside a report."""

    compensation: str
    convergence: _Convergence | None
    candidates: tuple[Candidate, ...]
    reconstruction: tuple[Reconstruction, ...]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class FinishedRun:
    """The report of a run and, where its folder still has them, the curves, the plan and the statistics."""

    report: RunReport
    epochs: tuple[Mapping[str, Any], ...]
    plan: PruningPlan | None
    statistics: Statistics | None


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        InputError: It is no run, a file of it is damaged, or its files come from different runs.
    """
    report = RunReport.read(folder)
    plan = PruningPlan.load(folder / PLAN) if (folder / PLAN).is_file() else None
    statistics = Statistics.load(folder / STATISTICS) if (folder / STATISTICS).is_file() else None
    if plan is not None:
        if plan.widths != report.sites:
            raise InputError(
                f"{folder / PLAN} and {SUMMARY} must come from one run, got other channels; run it again"
            )
        if statistics is not None:
            statistics.check_holds([entry.site for entry in plan.sites], folder / STATISTICS)
    return FinishedRun(report, _read_epochs(folder / METRICS), plan, statistics)


def _read_epochs(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    try:
        rows = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        # A loss may be NaN where training went wrong; that is worth a report too.
        return tuple(
            {name: float(row[name]) for name in _CURVES if name in row} | {"epoch": operator.index(row["epoch"])}
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no readable table of epochs ({error!r}); run it again") from error
