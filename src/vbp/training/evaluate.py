"""Top-1 and top-5 accuracy, by counting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vbp.errors import InputError
from vbp.runtime.forward import evaluation_mode, logits_of
from vbp.runtime.precision import Precision
from vbp.runtime.processes import Processes
from vbp.statistics.batches import class_numbers, labelled_for

_OFF, _ALONE = Precision(), Processes()


@dataclass(frozen=True)
class Accuracy:
    """How many of `images` had the right class first, and among the first five.

    Example:
        >>> vbp.Accuracy(correct1=6, correct5=8, images=8).top1
        75.0
    """

    correct1: int
    correct5: int
    images: int

    @property
    def top1(self) -> float:
        """Return the top-1 accuracy in percent."""
        return 100 * self.correct1 / self.images

    @property
    def top5(self) -> float:
        """Return the top-5 accuracy in percent."""
        return 100 * self.correct5 / self.images


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    device: torch.device | str,
    *,
    precision: Precision = _OFF,
    processes: Processes = _ALONE,
) -> Accuracy:
    """Count the right predictions of a model in evaluation mode; with fewer than five classes top-5 takes them all.

    Args:
        model: A classifier.
        batches: Images and labels, as `pixels_of` and `class_numbers` take them: this process's share, which may be
            none.
        device: Where the model is.
        precision: Of the forward pass.
        processes: Whose counts are added up; all of them call this, and get the same.

    Raises:
        InputError: No image came, to any process; a label is no class of the model; or a prediction is no number.

    Example:
        >>> vbp.evaluate(model, [(images, labels)], "cpu").images
        8
    """
    hits = torch.zeros(3, dtype=torch.int64, device=device)
    images = 0
    with evaluation_mode(model), torch.inference_mode():
        for pixels, labels in labelled_for(model, batches, device):
            with precision.autocast():
                logits = logits_of(model(pixels))
            numbers = class_numbers(labels, *logits.shape).to(device, non_blocking=True)
            right = logits.topk(min(5, logits.shape[1]), dim=1).indices == numbers[:, None]
            undefined = (logits.isnan() | logits.isposinf()).any(1)
            hits += torch.stack((right[:, 0].sum(), right.sum(), undefined.sum()))
            images += len(pixels)
    counts = torch.cat((hits, hits.new_tensor([images])))
    first, among_five, unusable, total = processes.all_reduce_sum_(counts).tolist()
    if total == 0:
        raise InputError("evaluation needs at least one image, got none; check the validation images")
    if unusable:
        raise InputError(
            f"the predictions of {type(model).__name__} must be numbers, got NaN or infinity for {unusable} of "
            f"{total} images; check the weights and the preprocessing, or compute in float32"
        )
    return Accuracy(first, among_five, total)


@dataclass(frozen=True)
class Agreement:
    """How two models predict for the same images, by counts.

    Attributes:
        both: Images of which both predict the right class.
        first: Of which the first model alone does.
        second: Of which the second alone does.
        neither: Of which none does.
        same: Images of which both predict the same class, right or wrong.
        lost: For each class the right predictions of the first model less those of the second.
        images_by_class: Images of each class.
    """

    both: int
    first: int
    second: int
    neither: int
    same: int
    lost: tuple[int, ...]
    images_by_class: tuple[int, ...]

    @property
    def images(self) -> int:
        """Return the number of images."""
        return self.both + self.first + self.second + self.neither


def compare_predictions(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[Any],
    device: torch.device | str,
    *,
    precision: Precision = _OFF,
) -> tuple[Accuracy, Accuracy, Agreement]:
    """Return the accuracy of two models of the same classes, and where they agree, in one pass over the images.

    Raises:
        InputError: No image came, a label is no class, a prediction is NaN, or the models have other classes.
    """
    counts = torch.zeros(2, 2, dtype=torch.int64)
    top5, same = torch.zeros(2, dtype=torch.int64), 0
    lost: torch.Tensor | None = None
    with evaluation_mode(first), evaluation_mode(second), torch.inference_mode():
        for pixels, labels in labelled_for(first, batches, device):
            with precision.autocast():
                logits = [logits_of(model(pixels)).cpu() for model in (first, second)]
            if logits[0].shape != logits[1].shape:
                raise InputError(
                    f"both models must have the same classes, got {logits[0].shape[1]} and {logits[1].shape[1]}"
                )
            if any(bool(each.isnan().any()) for each in logits):
                raise InputError("predictions must be numbers, got NaN; check the weights and the preprocessing")
            numbers = class_numbers(labels.cpu(), *logits[0].shape)
            order = [each.topk(min(5, each.shape[1]), dim=1).indices for each in logits]
            right = [places[:, 0] == numbers for places in order]
            for row, one in enumerate((right[0], ~right[0])):
                for column, other in enumerate((right[1], ~right[1])):
                    counts[row, column] += (one & other).sum()
            top5 += torch.stack([(places == numbers[:, None]).any(1).sum() for places in order])
            same += int((order[0][:, 0] == order[1][:, 0]).sum())
            if lost is None:
                lost = torch.zeros(2, logits[0].shape[1], dtype=torch.int64)
            lost[0].index_add_(0, numbers, right[0].long() - right[1].long())
            lost[1].index_add_(0, numbers, torch.ones_like(numbers))
    if lost is None:
        raise InputError("evaluation needs at least one image, got none; check the validation images")
    (both, alone), (other, neither) = counts.tolist()
    agreement = Agreement(both, alone, other, neither, same, tuple(lost[0].tolist()), tuple(lost[1].tolist()))
    images = agreement.images
    return (
        Accuracy(both + alone, int(top5[0]), images),
        Accuracy(both + other, int(top5[1]), images),
        agreement,
    )
