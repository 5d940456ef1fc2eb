"""The residual stream of a teacher as a second target of training, beside its predictions; without labels.

    1/B sum_b 1/2 (mean_tj (z_btj - z'_btj)^2 / v_bj + mean_j (m_bj - m'_bj)^2 / w_bj)

over the modules b after which a branch was added to the stream: z are its values at position t and channel j in the
teacher, z' those of the student, m and m' their means over the positions, v the variance of z over images and
positions, and w that of m over images. A prediction is one row of numbers for an image; the stream says at each
position, and after each block, what went wrong. So few images, and few epochs, teach more.

Source: FitNets (Romero et al. 2015) for hints between layers; the stream needs no layer to translate between both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vbp.runtime.forward import evaluation_mode, hooked
from vbp.sites.branches import has_layer
from vbp.sites.layers import first_tensor
from vbp.sites.residual import find_residual_adds
from vbp.sites.site import Site
from vbp.statistics.images import ImageSource
from vbp.statistics.objective import SCALE_IMAGES, Objective


@dataclass(frozen=True)
class StreamTarget:
    """What of the stream is compared.

    Attributes:
        modules: Names, in teacher and student, of the modules whose outputs are compared.
        objective: Standardised squared errors of these outputs.

    Example:
        >>> stream = StreamTarget.find(dense, pruned, sites, example, GivenImages(batches))
        >>> stream.modules[:2]
        ('blocks.0', 'blocks.1')
    """

    modules: tuple[str, ...]
    objective: Objective

    @staticmethod
    def find(
        teacher: nn.Module,
        student: nn.Module,
        sites: Sequence[Site],
        example: Tensor,
        images: ImageSource,
    ) -> StreamTarget | None:
        """Return where both models have a stream of the same shape; None if they have none in common.

        All processes of the images' session call it, and get the same. Variances are those of the teacher, over the
        first 128 images.

        Args:
            teacher: On its device.
            student: On the same device.
            sites: Of the student, or of the model that it was before pruning.
            example: One prepared image, "1 channels height width".
            images: Calibration images.
        """
        every = dict.fromkeys(add.module for add in find_residual_adds(student, example, _left(student, sites)))
        names = [name for name in every if has_layer(teacher, name)]
        shapes = [{name: value.shape for name, value in _seen(each, names, example).items()} for each in
                  (teacher, student)]  # fmt: skip
        modules = tuple(name for name in names if name in shapes[0] and shapes[0][name] == shapes[1].get(name))
        if not modules:
            return None
        objective = Objective.of(Outputs(teacher, modules), images.first(SCALE_IMAGES), "features")
        # Sums in another order could differ by a bit: all take what the first process measured.
        return StreamTarget(modules, images.session.processes.all_gather(objective)[0])

    def watch(self, student: nn.Module, teacher: nn.Module) -> StreamWatch:
        """Return what compares the streams of two models in training."""
        return StreamWatch(self, student, teacher)


class StreamWatch:
    """The streams of both models in the forward passes of one step."""

    def __init__(self, target: StreamTarget, student: nn.Module, teacher: nn.Module) -> None:
        self._objective = target.objective
        self._student: dict[str, Tensor] = {}
        self._teacher: dict[str, Tensor] = {}
        pairs = ((student, self._student), (teacher, self._teacher))
        self._hooks = [_noting(model, name, seen) for model, seen in pairs for name in target.modules]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the streams of the forward passes within, and forget them afterwards."""
        try:
            with hooked(self._hooks):
                yield
        finally:
            self._student.clear()
            self._teacher.clear()

    def loss(self) -> Tensor:
        """Return the mean error over the images of the pass."""
        target = self._objective.target(self._objective.read(self._teacher)).detach()
        return self._objective.loss(self._objective.read(self._student), target) / len(target)


class Outputs(nn.Module):
    """A model that returns the outputs of some of its modules, by their names."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """Take a model as it is."""
        super().__init__()
        self.model, self._names = model, names

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return them, without gradients."""
        return _seen(self.model, self._names, pixels)


def _seen(model: nn.Module, names: Sequence[str], pixels: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with evaluation_mode(model), torch.no_grad(), hooked(_noting(model, name, seen) for name in names):
        model(pixels)
    return seen


def _noting(model: nn.Module, name: str, seen: dict[str, Tensor]) -> tuple[nn.Module, Any]:
    return model.get_submodule(name), partial(_note, name, seen)


def _note(name: str, seen: dict[str, Tensor], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if (values := first_tensor(output)) is not None:
        seen[name] = values


def _left(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Return the sites whose branch was not removed."""
    return [site for site in sites if site.kind != "mlp" or has_layer(model, site.consumer)]
