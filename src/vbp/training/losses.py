"""The loss of training: cross-entropy blended with distillation from a teacher, or distillation alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vbp.errors import InputError


def check_below_one(name: str, share: float, usual: float) -> None:
    """Check a share that may be 0, but not 1."""
    if not 0 <= share < 1:
        raise InputError(f"{name} must be in [0, 1), got {share}; {usual} is usual")


def check_weights(names: str, first: float, second: float, usual: str) -> None:
    """Check two weights of which one may be 0."""
    if not (0 <= first < math.inf and 0 <= second < math.inf and first + second > 0):
        raise InputError(f"{names} must be at least 0, finite and not both 0, got {first} and {second}; {usual}")


@dataclass(frozen=True)
class DistillationLoss:
    """`alpha * CE(student, labels) + beta * T^2 * KL(teacher/T || student/T)`.

    Attributes:
        alpha: Weight of the cross-entropy with the labels.
        beta: Weight of the divergence from the teacher; `T^2` keeps its gradient's size at any temperature.
        temperature: T, softens both distributions.
        label_smoothing: Share of each label that is spread over all classes.

    Source: VBP paper, section 4.1; Hinton, Vinyals, Dean (2015).

    Example:
        >>> loss = vbp.DistillationLoss(temperature=4.0)(pruned(images), model(images), labels)
    """

    alpha: float = 0.7
    beta: float = 0.3
    temperature: float = 2.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 < self.temperature < math.inf:
            raise InputError(f"kd_T must be above 0 and finite, got {self.temperature}; the paper uses 2.0")
        check_weights("kd_alpha and kd_beta", self.alpha, self.beta, "the paper uses 0.7 and 0.3")
        check_below_one("label_smoothing", self.label_smoothing, usual=0.1)

    def __call__(
        self,
        student: Float[Tensor, "batch classes"],
        teacher: Float[Tensor, "batch classes"],
        labels: Int[Tensor, "batch"] | Float[Tensor, "batch classes"] | None,
    ) -> Float[Tensor, ""]:
        """Return the loss, averaged over the batch; labels as for `cross_entropy`, None where `alpha` is 0."""
        divergence = F.kl_div(
            F.log_softmax(student / self.temperature, dim=1),
            F.log_softmax(teacher / self.temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        distilled = self.beta * self.temperature**2 * divergence
        if self.alpha == 0:  # nothing of the labels counts
            return distilled
        if labels is None:
            raise InputError(
                f"kd_alpha must be 0 for batches without labels, got {self.alpha}; give labels, or "
                "DistillationLoss(0, 1)"
            )
        return self.alpha * self.cross_entropy(student, labels) + distilled

    def cross_entropy(
        self, student: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"] | Float[Tensor, "batch classes"]
    ) -> Float[Tensor, ""]:
        """Return the cross-entropy alone, averaged over the batch.

        Args:
            student: Logits.
            labels: Class numbers, which are smoothed here; or each class's share, taken as it is: whoever mixes
                images smooths their labels.
        """
        if labels.is_floating_point():
            return F.cross_entropy(student, labels.to(student.dtype))
        return F.cross_entropy(student, labels, label_smoothing=self.label_smoothing)
