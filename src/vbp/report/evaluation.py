"""What `vbp eval` and `vbp predict` show: accuracies, where two models agree, and the classes of single images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vbp.runtime.decode import to_json
from vbp.runtime.tables import text_table, with_error
from vbp.training.evaluate import Accuracy, Agreement

# Classes that are listed, of those that lost most.
_LISTED = 5


@dataclass(frozen=True)
class EvaluationReport:
    """The accuracy of a model and, where it was compared, that of its dense model and where the two agree."""

    model: str
    accuracy: Accuracy
    dense: Accuracy | None = None
    agreement: Agreement | None = None
    class_names: Sequence[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, accuracies in percent."""
        plain: dict[str, Any] = {"model": self.model, "images": self.accuracy.images, **_percent(self.accuracy)}
        if self.dense is not None:
            plain["dense"] = _percent(self.dense)
        if self.agreement is not None:
            plain["agreement"] = to_json(self.agreement)
        return plain

    def table(self) -> str:
        """Return accuracies with standard errors, the confusion of both models, and the classes that lost most."""
        rows = [("", "top-1 %", "top-5 %")]
        for name, accuracy in (("dense", self.dense), ("model" if self.dense is None else "pruned", self.accuracy)):
            if accuracy is not None:
                top1, top5 = (with_error(percent, accuracy.images) for percent in (accuracy.top1, accuracy.top5))
                rows.append((name, top1, top5))
        text = f"{text_table(rows)}\n{self.accuracy.images} images"
        return text if self.agreement is None else f"{text}\n\n{self._agreement(self.agreement)}"

    def _agreement(self, both: Agreement) -> str:
        confusion = text_table([
            ("images", "pruned right", "pruned wrong"),
            ("dense right", str(both.both), str(both.first)),
            ("dense wrong", str(both.second), str(both.neither)),
        ])  # fmt: skip
        lines = [confusion, f"the same class from both: {100 * both.same / both.images:.2f} %"]
        most = sorted(range(len(both.lost)), key=lambda number: -both.lost[number])[:_LISTED]
        names = self.class_names or [str(number) for number in range(len(both.lost))]
        rows = [
            (names[number], f"-{both.lost[number]}", f"of {both.images_by_class[number]}")
            for number in most
            if both.lost[number] > 0
        ]
        return "\n".join([*lines, *(["classes that lost most:", text_table(rows)] if rows else [])])


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image file, and their probabilities."""

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Predictions:
    """The predictions for several image files."""

    files: tuple[Prediction, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        plain: dict[str, Any] = to_json(self)
        return plain

    def table(self) -> str:
        """Return a line for each class of each file."""
        rows = [
            (prediction.file if place == 0 else "", name, f"{100 * probability:.1f} %")
            for prediction in self.files
            for place, (name, probability) in enumerate(
                zip(prediction.classes, prediction.probabilities, strict=True)
            )
        ]
        return text_table(rows, "ll")


def _percent(accuracy: Accuracy) -> dict[str, float]:
    return {"top1": accuracy.top1, "top5": accuracy.top5}
