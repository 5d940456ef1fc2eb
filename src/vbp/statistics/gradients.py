"""Gradients of the loss on labelled images, for the criteria that rank by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.runtime.forward import copy_model, logits_of
from vbp.runtime.processes import Processes
from vbp.sites.site import Site, weight_slices
from vbp.statistics.batches import class_numbers, labelled_for
from vbp.statistics.objective import check_classifier

# Images that go forward and backward at a time: the sum does not depend on it, the memory does.
_IMAGES = 32


class GradientSum:
    """Add up the gradient of the cross-entropy with respect to the weights that go with the sites' channels.

    It works on a copy of the model, so that whoever observes the model meanwhile sees none of it.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], device: torch.device | str | None = None) -> None:
        """Begin with no images, on a copy of the dense model; they go to the device, by default the model's."""
        self._model = copy_model(model).eval().requires_grad_(False)
        self._device = torch.device(device) if device is not None else next(model.parameters()).device
        names = dict.fromkeys(part.parameter for site in sites for part in weight_slices(model, site))
        self._weights = {name: self._model.get_parameter(name).requires_grad_() for name in names}
        self._sums = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in self._weights.items()}
        self._images = 0

    def add_(self, pixels: Tensor, labels: Tensor) -> None:
        """Take in labelled images; in the model's own precision, for half precision loses small gradients.

        Raises:
            InputError: The model returns features, or a label is no class of it.
        """
        if not self._images:
            check_classifier(self._model, pixels[:1].to(self._device), "gradients by labels")
        with torch.enable_grad(), torch.autocast(self._device.type, enabled=False):
            for start in range(0, labels.shape[0], _IMAGES):
                images, given = (part[start : start + _IMAGES].to(self._device) for part in (pixels, labels))
                logits = logits_of(self._model(images))
                loss = F.cross_entropy(logits, class_numbers(given, *logits.shape), reduction="sum")
                # What runs without effect on the logits has a gradient of 0.
                gradients = torch.autograd.grad(loss, list(self._weights.values()), materialize_grads=True)
                for running, gradient in zip(self._sums.values(), gradients, strict=True):
                    running += gradient
        self._images += labels.shape[0]

    def tee(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pass batches on, and take in each: one reading of the images serves statistics and gradients."""
        for pixels, labels in labelled_for(self._model, batches, self._device):
            self.add_(pixels, labels)
            yield pixels, labels

    def mean(self, processes: Processes) -> dict[str, Tensor]:
        """Return the gradient of the mean loss over the images of all processes, which all call this.

        By a weight's dotted name, in float64, on the CPU.

        Raises:
            InputError: No image came, to any process, or a gradient is not finite.
        """
        images = int(processes.all_reduce_sum_(torch.tensor([self._images], device=self._device)))
        if images == 0:
            raise InputError("gradients need at least one labelled image, got none; check the training images")
        gradients = {name: (processes.all_reduce_sum_(value) / images).cpu() for name, value in self._sums.items()}
        for name, gradient in gradients.items():
            if bad := int((~gradient.isfinite()).sum()):
                raise InputError(
                    f"the gradient of {name} must be finite, got NaN or infinity in {bad} places; check the weights "
                    "and the preprocessing"
                )
        return gradients
