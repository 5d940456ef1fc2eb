"""How far a pruned model's output is from the dense one's, and which site is to blame; without labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.pruning.plan import PruningPlan
from vbp.pruning.site_errors import erring_units, errors_added
from vbp.runtime.forward import evaluation_mode, frozen
from vbp.runtime.memory import out_of_memory
from vbp.runtime.session import ALONE, Session
from vbp.statistics.batches import ImagesFor
from vbp.statistics.images import ImageSource, in_pieces
from vbp.statistics.objective import SCALE_IMAGES, Objective

_log = logging.getLogger(__name__)

# A share is measured on some hundred images, and near zero for a site that has lost little.
_CLIP = 4.0

# How many rounds the price of 1 counts for in their mean: the first then goes three quarters of the way.
_PRIOR = 1 / 3


class DenseReference:
    """Images, and what the dense model returns for them: this process's share.

    Pruned models are compared with it (`divergence`) and refitted to it (`refit_head_`, `refit_stream_`).

    Attributes:
        model: The dense model.
        batches: The images; they are read anew each time unless they lie in memory.
        views: So many that follow each other are views of one image.
        session: Whose images count together.
        images: Images of all processes, views included.
        objective: What is compared: predictions, features, or similarities with texts.
        targets: Of each batch the dense model's values, "images values", on the model's device; of logits the
            logarithms of the probabilities.

    Example:
        >>> vbp.DenseReference(model, [images]).divergence(model)
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        views: int = 1,
        session: Session = ALONE,
        objective: Objective | None = None,
    ) -> None:
        """Run the dense model once.

        Args:
            model: The dense model, on its device.
            batches: Calibration images, without labels, which can be gone through again; none is allowed where
                another process has some. Batch b of all is that of process b mod world.
            views: So many that follow each other are views of one image: left out together where fits are compared.
            session: All of its processes make this object, and use it alike.
            objective: What is compared; by default the model's output for the first images says.

        Raises:
            InputError: No process has an image, or `views` is no positive number.
        """
        if views < 1:
            raise InputError(f"views must be at least 1, got {views}; 1 if no two images are views of one")
        self.model, self.batches = model, ImagesFor(model, batches)
        self.views, self.session = views, session
        self._device = next(model.parameters()).device
        self.objective = objective or Objective.of(model, self._first_images())
        with evaluation_mode(model), torch.no_grad():
            self.targets = [self.objective.target(self._read(model, batch)) for batch in self.batches]
        self.images = sum(session.processes.all_gather(sum(map(len, self.targets))))
        if self.images == 0:
            raise InputError("a choice by divergence needs at least one image, got none on any process")

    @classmethod
    def held_out(
        cls, model: nn.Module, images: ImageSource, places: range, objective: Objective | None = None
    ) -> DenseReference:
        """Keep some calibration images in memory, by which pruned models are compared; all processes call it.

        Raises:
            InputError: None of them can be read.
        """
        with out_of_memory("calibration"):
            # In pieces, since the search goes backward through them.
            pixels = in_pieces(images.pixels(places, "held-out images"), next(model.parameters()).device)
            return cls(model, list(pixels), session=images.session, objective=objective)

    def _first_images(self) -> list[Tensor]:
        """Return some images, the same on all processes, on the CPU."""
        mine: list[Tensor] = []
        for batch in self.batches:
            mine.append(batch.cpu())
            if sum(map(len, mine)) >= SCALE_IMAGES:
                break
        gathered = [batch for share in self.session.processes.all_gather(mine) for batch in share]
        if not gathered:
            raise InputError("a choice by divergence needs at least one image, got none on any process")
        return gathered

    def example(self) -> Tensor:
        """Return one image, the same to all processes, where the model is."""
        mine = next((batch[:1].cpu() for batch in self.batches if len(batch)), None)
        return next(one for one in self.session.processes.all_gather(mine) if one is not None).to(self._device)

    def divergence(self, pruned: nn.Module) -> float:
        """Return the mean error of the objective over the images of all processes: of logits KL(dense || pruned)."""
        total = torch.zeros(1, dtype=torch.float64, device=self._device)
        with evaluation_mode(pruned), torch.no_grad():
            for batch, expected in zip(self.batches, self.targets, strict=True):
                total += self._loss(pruned, batch, expected).double()
        return float(self.session.processes.all_reduce_sum_(total)) / self.images

    def site_contributions(self, pruned: nn.Module, plan: PruningPlan) -> dict[str, float]:
        """Return what each MLP site and each attention adds to the divergence, the interaction with others included.

        The error of each is put into the dense model with an amplitude a. The share is half of dD/da at a = 1:
        where the divergence is quadratic in the errors, the shares of all add up to it. An attention that is whole
        is left out, and so is one whose module is never called, of which the log has a line.

        Args:
            pruned: The dense model, pruned by the plan.
            plan: The plan.
        """
        units = erring_units(plan)
        amplitudes = torch.ones(len(units), device=self._device, requires_grad=True)
        total = torch.zeros(len(units), dtype=torch.float64, device=self._device)
        with (
            evaluation_mode(self.model),
            evaluation_mode(pruned),
            frozen(self.model),
            frozen(pruned),
            errors_added(self.model, pruned, plan, amplitudes) as reached,
            torch.enable_grad(),
        ):
            for batch, expected in zip(self.batches, self.targets, strict=True):
                loss = self._loss(self.model, batch, expected)
                if loss.requires_grad:
                    (gradient,) = torch.autograd.grad(loss, amplitudes, materialize_grads=True)
                    total += gradient.double()
        shares = (self.session.processes.all_reduce_sum_(total) / (2 * self.images)).tolist()
        named = {unit[0].site.name: share for unit, share in zip(units, shares, strict=True)}
        whole = [unit[0].site.name for unit in units if unit[0].site.kind != "mlp" or not unit[0].keep]
        # A process without images has called nothing.
        missed = [name for name in whole if not any(self.session.processes.all_gather(name in reached))]
        if missed:
            _log.info(
                "what %s add to the divergence is not known, for their modules are never called: their costs stay as "
                "they are", ", ".join(missed),
            )  # fmt: skip
        return {name: share for name, share in named.items() if name not in missed}

    def _loss(self, model: nn.Module, batch: Tensor, expected: Tensor) -> Tensor:
        return self.objective.loss(self._read(model, batch), expected)

    def _read(self, model: nn.Module, batch: Tensor) -> Float[Tensor, "images values"]:
        with self.session.precision.autocast():
            return self.objective.read(model(batch))


def cost_multipliers(costs: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """Return what a predicted nat of each site really costs, against the median site; within a factor of 4 of it.

    `costs` are the divergences predicted for what the sites lost, `shares` come from `site_contributions`.
    """
    ratios = {name: max(shares[name], 0.0) / cost for name, cost in costs.items() if cost > 0 and name in shares}
    middle = sorted(ratios.values())[len(ratios) // 2] if ratios else 0.0
    if not middle > 0:
        return dict.fromkeys(costs, 1.0)
    return {name: min(max(ratios.get(name, middle) / middle, 1 / _CLIP), _CLIP) for name in costs}


def mean_multipliers(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the geometric mean of the prices that several rounds asked for, and a part of a round for price 1."""
    return {
        name: math.exp(sum(math.log(asked[name]) for asked in rounds) / (len(rounds) + _PRIOR)) for name in rounds[0]
    }


# Calibration images by which `auto` compares its plans.
HELD_OUT_IMAGES: Final = 256

# One image in this many judges what is fitted to the others while there are few; one in `_ONE_IN_OF_MANY` once these
# are `_ENOUGH`. Each image that judges is missing where models are fitted: a thousand keep 875.
ONE_IN: Final = 4
_ONE_IN_OF_MANY: Final = 8
_ENOUGH: Final = 64


def held_out_places(images: int) -> range:
    """Return the places of the calibration images that judge what is fitted to those that follow.

    A quarter of up to 256 images, then 64 until these are an eighth, then an eighth, and 256 at most.
    """
    return range(min(HELD_OUT_IMAGES, max(images // _ONE_IN_OF_MANY, min(images // ONE_IN, _ENOUGH))))
