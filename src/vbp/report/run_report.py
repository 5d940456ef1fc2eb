"""What a run did: plain data, written to and read from its folder, and a table."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vbp.cost.timing import LatencyComparison
from vbp.deploy.artifact_files import ARTIFACT
from vbp.errors import InputError, one_line, printable
from vbp.method.ridge import Reconstruction
from vbp.pruning.convergence import Stage
from vbp.pruning.plan import Candidate
from vbp.runtime.decode import from_json, read_json, to_json
from vbp.runtime.files import is_regular
from vbp.runtime.tables import format_count, standard_error, text_table, with_error
from vbp.statistics.objective import KL

SUMMARY, METRICS, PLAN, STATISTICS = "summary.json", "metrics.jsonl", "plan.json", "statistics.safetensors"
BEST, FINAL, FIGURES = "vbp_best.pth", "vbp_final.pth", "figures"

# How tables call the pruned model, by its compensation.
_PRUNED: Final = {"none": "pruned, no compensation", "mean": "pruned, mean shift", "refit": "pruned, refit"}

_MODELS: Final = ("base", "uncompensated", "pruned", "tuned", "best", "final")


@dataclass(frozen=True)
class Measured:
    """One model of a run: accuracies in percent, or agreement as in `Retrieval`, on `images`; MACs of an image."""

    top1: float | None
    top5: float | None
    macs: int
    params: int
    epoch: int | None = None
    images: int | None = None
    cosine: float | None = None
    neighbours: float | None = None
    same: float | None = None

    @property
    def score(self) -> float:
        """Return the percent by which models of a run are compared: top-1, or neighbours shared with the dense."""
        if (score := self.neighbours if self.top1 is None else self.top1) is None:
            raise InputError(f"a model must have an accuracy or an agreement with the dense one, got {self}")
        return score

    @property
    def quality(self) -> tuple[tuple[str, str], ...]:
        """Return what tables show of a model, heading and value: accuracies, or its agreement with the dense one."""
        if self.top1 is not None:
            return ("top-1 %", self.top1_text), ("top-5 %", self.top5_text)
        cells = (("cosine", self.cosine, 4), ("neighbours %", self.neighbours, 2), ("same class %", self.same, 2))
        return tuple((name, f"{value:.{digits}f}") for name, value, digits in cells if value is not None)

    @property
    def top1_error(self) -> float | None:
        """Return the standard error of the top-1 accuracy in points, where the images tell it."""
        return None if self.top1 is None else standard_error(self.top1, self.images)

    @property
    def top5_error(self) -> float | None:
        """Return the standard error of the top-5 accuracy in points, where the images tell it."""
        return None if self.top5 is None else standard_error(self.top5, self.images)

    @property
    def top1_text(self) -> str:
        """Return the top-1 accuracy as tables show it, with its standard error."""
        return "-" if self.top1 is None else with_error(self.top1, self.images)

    @property
    def top5_text(self) -> str:
        """Return the top-5 accuracy as tables show it, with its standard error."""
        return "-" if self.top5 is None else with_error(self.top5, self.images)

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
        best: The checkpoint with the highest validation accuracy; the pruned model, tuned where it was, counts as
            epoch 0.
        final: The last checkpoint.
        keep_ratio: Share of the MLP channels that was kept in fact.
        sites: Site name -> [kept, total] channels.
        images: Number of calibration and validation images.
        device: Kind of device.
        processes: Number of processes of the job.
        versions: Package -> version.
        config: The settings, from which the run can be repeated.
        seconds: Wall-clock seconds of each stage.
        files: Name -> path of each file left behind.
        latency: The dense against the pruned model, with the device of the attempt that measured it.
        uncompensated: Right after pruning without compensation, if asked for.
        convergence: The data of `Convergence`; None for statistics from a file.
        budget: What was asked for, and whether the plan meets it: the data of `BudgetResult`.
        candidates: Plans that the criterion auto tried: name, divergence in nats, widths.
        reconstruction: Site name -> variances `mean_shift`, `refit` and `energy` of its consumer's output, measured
            on the calibration images; without refit none.
        producers: What the refit of the producers did: the data of `ProducerRefit`, and a `sentence`; None without.
        stream: The same of the refit of the residual stream, `StreamRefit`.
        head: The same of the refit of the last layer, `HeadRefit`.
        batchnorm: The same of the running statistics of BatchNorms, `BatchNormRefit`.
        kernels: The same of the refit of layers with larger kernels, `KernelRefit`.
        attention: Share of the channels, or directions, of heads that was kept; None where attention is no part.
        date: When the report was made: date, time and time zone.
        command: The command that made it; empty in a notebook.
        hardware: Processor and GPU.
        changed: Settings that differ from the defaults of `vbp run`; None where that is not known.
        imagenet: Whether the classes are those of ImageNet-1k, as in the published results.
        tuned: After tuning without labels, before any fine-tuning; epoch 0 where no epoch was better than none, None
            where it was not asked for.
        tuning: What tuning without labels did: the data of `TuningReport`; None without.
        objective: What was preserved: `kind`, `measure`, `sentence`.

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
    device: str
    processes: int
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    latency: LatencyComparison | None = None
    uncompensated: Measured | None = None
    convergence: Mapping[str, Any] | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)
    candidates: Sequence[Mapping[str, Any]] = ()
    reconstruction: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    producers: Mapping[str, Any] | None = None
    stream: Mapping[str, Any] | None = None
    head: Mapping[str, Any] | None = None
    batchnorm: Mapping[str, Any] | None = None
    kernels: Mapping[str, Any] | None = None
    attention: float | None = None
    date: str = ""
    command: str = ""
    hardware: str = ""
    changed: Sequence[str] | None = None
    imagenet: bool = False
    tuned: Measured | None = None
    tuning: Mapping[str, Any] | None = None
    objective: Mapping[str, str] = field(default_factory=dict)

    @property
    def classifies(self) -> bool:
        """Return whether accuracies were measured, not the agreement with the dense model."""
        return self.base.top1 is not None

    @property
    def measure(self) -> str:
        """Return in words by what plans were compared."""
        return self.objective.get("measure", KL)

    @property
    def models(self) -> dict[str, Measured]:
        """Return the measured models by name: `uncompensated` and `tuned` only where they were measured."""
        return {name: getattr(self, name) for name in _MODELS if getattr(self, name) is not None}

    @property
    def steps(self) -> dict[str, str]:
        """Return how tables call each model, by name, in the order in which they were made."""
        compensation = self.config["compensation"]
        steps = {"base": "dense"}
        if self.uncompensated is not None and compensation != "none":
            steps["uncompensated"] = _PRUNED["none"]
        steps["pruned"] = _PRUNED.get(compensation, f"pruned, {compensation}")
        if self.tuned is not None:
            steps["tuned"] = f"tuned without labels (epoch {self.tuned.epoch})"
        if self.final.epoch:
            # Where tuning improved it at no epoch, the pruned model above is the best.
            if self.best.epoch:
                steps["best"] = f"fine-tuned, best (epoch {self.best.epoch})"
            steps["final"] = f"fine-tuned, final (epoch {self.final.epoch})"
        return steps

    @property
    def file_rows(self) -> dict[str, str]:
        """Return which model each file with weights holds: its name -> the name in `models` and `steps`."""
        start = "pruned" if self.tuned is None else "tuned"
        best, final = "best" if self.best.epoch else start, "final" if self.final.epoch else start
        return {ARTIFACT: best, BEST: best, FINAL: final}

    @property
    def file_text(self) -> str:
        """Return in words which row of the table each file with weights is."""
        best, final = (self.steps[self.file_rows[file]] for file in (BEST, FINAL))
        if best == final:
            return f"{ARTIFACT}/, {BEST} and {FINAL} hold the row {best!r}"
        untuned = "" if self.best.epoch else "no epoch was better than none: "
        return f"{untuned}{ARTIFACT}/ and {BEST} hold the row {best!r}, {FINAL} {final!r}"

    @property
    def budget_text(self) -> str:
        """Return whether the plan meets what was asked for; empty where nothing but a ratio was, and it is met."""
        asked = self.budget and (self.budget["budget"]["quantity"] != "keep_ratio" or not self.budget["met"])
        return self.budget["sentence"] if asked else ""

    @property
    def macs_text(self) -> str:
        """Return the speed-up that the MACs promise, as tables show it: 1.25x by MACs."""
        return f"{self.base.macs / self.pruned.macs:.2f}x by MACs" if self.pruned.macs else ""

    @property
    def refits(self) -> tuple[str, ...]:
        """Return what each refit after surgery did, in words."""
        return tuple(refit["sentence"] for refit in self._refits if refit)

    @property
    def _refits(self) -> tuple[Mapping[str, Any] | None, ...]:
        return self.batchnorm, self.kernels, self.producers, self.stream, self.head, self.tuning

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON data of `summary.json`; of a model, what was not measured is left out.

        `file_rows` says for each file with weights which of the models it holds.
        """
        plain: dict[str, Any] = to_json(self) | {"file_rows": self.file_rows}
        plain |= {
            name: {key: value for key, value in to_json(model).items() if value is not None}
            for name, model in self.models.items()
        }
        optional = [name for name in ("uncompensated", "tuned", "tuning") if getattr(self, name) is None]
        return {name: value for name, value in plain.items() if name not in optional}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> RunReport:
        """Read what `to_dict` returned.

        Raises:
            InputError: It is no report of a run, or damaged.
        """
        if isinstance(value, Mapping):  # the rows of the files follow from the rest
            value = {name: _whole(name, item) for name, item in value.items() if name != "file_rows"}
        report = from_json(RunReport, value, "the report of a run", "run it again", use_defaults=True)
        if any(not 0 <= kept <= total or total == 0 for kept, total in report.sites.values()):
            raise InputError(
                f"sites must keep some of their channels, got {reprlib.repr(dict(report.sites))}; run it again"
            )
        parts = [part for part in (report.budget or None, *report._refits) if part is not None]
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
        if not is_regular(path):
            raise InputError(
                f"a run must be a folder with {SUMMARY}, got {folder}; give the save_dir of a run that has ended"
            )
        try:
            return RunReport.from_dict(read_json(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no readable summary of a run ({one_line(error)}); run it again") from error

    def table(self) -> str:
        """Return the steps of the run as a table for the terminal."""
        shown = [name for name, _ in self.pruned.quality]
        rows = [("", *shown, "MACs", "params", "latency")]
        for name, label in self.steps.items():
            model, latency = self.models[name], ""
            if self.latency is not None and name in ("base", "pruned"):
                times = self.latency.dense_ms if name == "base" else self.latency.pruned_ms
                latency = f"{times.median:.2f} ms"
            sizes = (format_count(model.macs), format_count(model.params))
            rows.append((label, *(text for _, text in model.quality), *sizes, latency))
        heads = "" if self.attention is None else f" and {self.attention:.1%} of the heads' channels"
        facts = [f"kept {self.keep_ratio:.1%} of the hidden channels{heads}"]
        facts.append(f"{self.images['val']} validation images")
        lines = [text_table(rows, widths=(0, *(8 for _ in shown), 9, 9, 10)), "; ".join(facts)]
        if self.latency is not None:
            facts = [f"speed-up {self.latency.speedup_text}, median and quartiles, at {self.latency.conditions}"]
            lines.append("; ".join(filter(None, [*facts, self.macs_text])))
        tuned = "" if self.tuning is None else self.tuning["sentence"]
        return "\n".join(filter(None, [*lines, self.budget_text, tuned, self.file_text]))


def _whole(name: str, item: Any) -> Any:
    """Return what a summary says of a model with the accuracies that it leaves out where none was measured."""
    unlabelled = name in _MODELS and isinstance(item, Mapping) and "neighbours" in item
    return {"top1": None, "top5": None, **item} if unlabelled else item


def setting_text(value: Any) -> str:
    """Return the value of a setting as tables show it."""
    return printable(
        " ".join(map(str, value)) if isinstance(value, list | tuple) else "-" if value is None else str(value)
    )


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
