"""The result of pruning a model in one call: the pruned copy, how it was made, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vbp.cost.budget import BudgetResult
from vbp.cost.macs import PlanCost
from vbp.data.preprocessing import Preprocessing
from vbp.deploy.artifact import save_pruned
from vbp.models.classifier import ModelSource
from vbp.pruning.plan import Candidate, PruningPlan
from vbp.refit.refits import RefitReport
from vbp.runtime.decode import to_json
from vbp.runtime.tables import format_count, text_table
from vbp.training.evaluate import Accuracy
from vbp.training.retrieval import Retrieval
from vbp.training.tuning_report import TuningReport


@dataclass(frozen=True)
class PruneResult:
    """A pruned model, and how it was made.

    Attributes:
        model: The pruned copy, in evaluation mode, on the device of the model that it was made from.
        plan: The channels that it keeps.
        cost: MACs of one image and parameters, before and after.
        budget: What was asked for, and what was reached.
        images: Calibration images that were read.
        dense_accuracy: Of the model that was handed in; None without labelled images to measure it on.
        accuracy: Likewise of `model`, the pruned one.
        retrieval: How alike both models see the images of `val`, in the place of accuracies, where the model is no
            classifier.
        objective: What was preserved, in words.
        candidates: The plans that the criterion auto compared.
        refits: What the refits after surgery did.
        seconds: Spent in each step.
        settings: How it was pruned, by name.
        source: How the dense model is built; None where that is not known.
        preprocessing: How images are prepared, if known.
        class_names: What each logit stands for, if known.
        untuned_accuracy: Of the pruned model before tuning without labels; None where it was not tuned, or not
            measured.
        tuning: What tuning without labels did; None without.

    Example:
        >>> vbp.prune(model, [images], keep_ratio=0.5).cost.params
        (32455, 24135)
    """

    model: nn.Module
    plan: PruningPlan
    cost: PlanCost
    budget: BudgetResult
    images: int
    dense_accuracy: Accuracy | None = None
    accuracy: Accuracy | None = None
    retrieval: Retrieval | None = None
    objective: str = ""
    candidates: tuple[Candidate, ...] = ()
    refits: RefitReport = field(default_factory=RefitReport)
    seconds: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: ModelSource | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    untuned_accuracy: Accuracy | None = None
    tuning: TuningReport | None = None

    def figures(self) -> dict[str, Any]:
        """Return the numbers as plain JSON data."""
        (macs, pruned_macs), (params, pruned_params) = self.cost.macs, self.cost.params
        figures: dict[str, Any] = {
            "macs": pruned_macs, "params": pruned_params, "keep_ratio": self.plan.kept / max(self.plan.total, 1),
            "calibration_images": self.images, "dense": {"macs": macs, "params": params},
        }  # fmt: skip
        if self.tuning is not None:
            figures["tuning"] = self.tuning.to_dict()
        if self.accuracy is not None and self.dense_accuracy is not None:
            for place, accuracy in ((figures, self.accuracy), (figures["dense"], self.dense_accuracy)):
                place |= {"top1": accuracy.top1, "top5": accuracy.top5, "images": accuracy.images}
        if self.retrieval is not None:
            figures |= {name: value for name, value in to_json(self.retrieval).items() if value is not None}
        return figures

    def table(self) -> str:
        """Return the dense and the pruned model, before and after tuning, and whether a target was met."""
        rows = [["", *(("top-1 %",) if self.accuracy else ()), "MACs", "parameters"]]
        models = [("dense", self.dense_accuracy, 0), ("pruned", self.accuracy, 1)]
        if self.tuning is not None:
            models[1:] = [("pruned", self.untuned_accuracy, 1), ("tuned", self.accuracy, 1)]
        for name, accuracy, place in models:
            top1 = () if accuracy is None else (f"{accuracy.top1:.2f}",)
            rows.append([name, *top1, *(format_count(both[place]) for both in (self.cost.macs, self.cost.params))])
        told = [self.budget.sentence()] if self.budget.is_told else []
        told += [] if self.tuning is None else [self.tuning.sentence()]
        if (seen := self.retrieval) is not None:
            told.append(
                f"features of {seen.images} images: cosine {seen.cosine:.4f} with the dense model's, "
                f"{seen.neighbours:.2f} % of the nearest neighbours in common"
            )
        return "\n".join([text_table(rows), *told])

    def save(self, path: Path | str) -> None:
        """Write the pruned model as a folder, or one file that ends in `.pth`, which `vbp.load_pruned` reads.

        Where it is not known how the dense model is built, `load_pruned` needs a fresh one: `model=`.

        Raises:
            InputError: The folder holds something else.
            OutputError: It could not be written.
        """
        save_pruned(
            self.model,
            path,
            plans=self.plan,
            source=self.source,
            preprocessing=self.preprocessing,
            class_names=self.class_names,
            metrics=self.figures(),
            settings=self.settings,
        )
