"""Read what a run says of itself in `summary.json`, for reports and comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbp.errors import InputError
from vbp.report import PRUNED_LABELS

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
        """Give the models in the order in which they came about, each once."""
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
        """Give by how much the pruned model was faster than the dense one, where both were timed."""
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
    """Give a finite number, or raise TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no finite number")
    return float(value)


def count(value: Any) -> int:
    """Give a number of things, or raise TypeError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value
