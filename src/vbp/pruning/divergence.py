"""How far a pruned model's answers are from the dense one's, and which site's error is to blame; without labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.pruning.plan import PruningPlan, SitePlan
from vbp.runtime.forward import evaluation_mode, frozen, logits_of
from vbp.runtime.memory import out_of_memory
from vbp.runtime.precision import Precision, in_float32
from vbp.runtime.processes import Processes
from vbp.runtime.session import bar
from vbp.sites.layers import channel_dim
from vbp.statistics.evidence import _sensed
from vbp.statistics.images import calibration_share

_OFF, _ALONE = Precision(), Processes()

if TYPE_CHECKING:
    from vbp.recipes.setup import Job


# A share is measured on some hundred images, and near zero for a site that has lost little.
_CLIP = 4.0


# How many rounds the price of 1 counts for in their mean: the first then goes three quarters of the way.
_PRIOR = 1 / 3


class HeldBack:
    """Images, and what the dense model says of them: this process's share, kept in memory."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        *,
        precision: Precision = _OFF,
        processes: Processes = _ALONE,
    ) -> None:
        """Run the dense model once.

        Args:
            model: The dense model, on its device.
            batches: Images; none is allowed where another process has some.
            precision: Of all forward passes.
            processes: Whose images count together; all of them make this object, and call its methods.

        Raises:
            InputError: No process has an image.
        """
        self._model, self._precision, self._processes = model, precision, processes
        self._device = next(model.parameters()).device
        self._batches = [batch.detach() for batch in batches]
        with evaluation_mode(model), torch.no_grad():
            self._answers = [self._log_probabilities(model, batch) for batch in self._batches]
        count = torch.tensor([sum(len(batch) for batch in batches)], dtype=torch.float64, device=self._device)
        self.images = int(processes.all_reduce_sum_(count))
        if self.images == 0:
            raise InputError("a choice by divergence needs at least one image, got none on any process")

    def example(self) -> Tensor:
        """Return one image, the same to all processes, where the model is."""
        mine = next((batch[:1].cpu() for batch in self._batches if len(batch)), None)
        return next(one for one in self._processes.all_gather(mine) if one is not None).to(self._device)

    def divergence(self, pruned: nn.Module) -> float:
        """Return the mean of KL(dense || pruned) over the images of all processes, in nats."""
        total = torch.zeros(1, dtype=torch.float64, device=self._device)
        with evaluation_mode(pruned), torch.no_grad():
            for batch, answer in zip(self._batches, self._answers, strict=True):
                total += self._loss(pruned, batch, answer).double()
        return float(self._processes.all_reduce_sum_(total)) / self.images

    def shares(self, pruned: nn.Module, plan: PruningPlan) -> dict[str, float]:
        """Return what each MLP site adds to the divergence, its interaction with the others included.

        Each consumer's error is put into the dense model with an amplitude a. The share is half of dKL/da at a = 1:
        where the divergence is quadratic in the errors, the shares of all sites add up to it. Errors of sites that
        are no MLP are left out.

        Args:
            pruned: The dense model, pruned by the plan.
            plan: The plan.
        """
        entries = [entry for entry in plan.sites if entry.site.kind == "mlp"]
        amplitudes = torch.ones(len(entries), device=self._device, requires_grad=True)
        total = torch.zeros(len(entries), dtype=torch.float64, device=self._device)
        with (
            evaluation_mode(self._model),
            evaluation_mode(pruned),
            frozen(self._model),
            frozen(pruned),
            _errors_added(self._model, pruned, entries, amplitudes),
            torch.enable_grad(),
        ):
            for batch, answer in zip(self._batches, self._answers, strict=True):
                loss = self._loss(self._model, batch, answer)
                (gradient,) = torch.autograd.grad(loss, amplitudes)
                total += gradient.double()
        found = (self._processes.all_reduce_sum_(total) / (2 * self.images)).tolist()
        return {entry.site.name: share for entry, share in zip(entries, found, strict=True)}

    def _loss(self, model: nn.Module, batch: Tensor, answer: Tensor) -> Tensor:
        return F.kl_div(self._log_probabilities(model, batch), answer, log_target=True, reduction="sum")

    def _log_probabilities(self, model: nn.Module, batch: Tensor) -> Float[Tensor, "images classes"]:
        with self._precision.autocast():
            logits = logits_of(model(batch.to(self._device, non_blocking=True)))
        return in_float32(logits).log_softmax(-1)


@contextmanager
def _errors_added(
    dense: nn.Module, pruned: nn.Module, entries: Sequence[SitePlan], amplitudes: Float[Tensor, "sites"]
) -> Iterator[None]:
    """Let the dense model's consumers answer as the pruned model's would, as far as the amplitudes say."""

    def hook_of(small: nn.Module, keep: Tensor, amplitude: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            kept = args[0].index_select(args[0].ndim + channel_dim(module), keep)
            error: Tensor = small(kept) - output
            return output + amplitude.to(output.dtype) * error

        return hook

    handles = []
    try:
        for entry, amplitude in zip(entries, amplitudes, strict=True):
            keep = torch.tensor(entry.keep, device=amplitudes.device)
            small = pruned.get_submodule(entry.site.consumer)
            hook = hook_of(small, keep, amplitude)
            handles.append(dense.get_submodule(entry.site.consumer).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def prices(costs: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """Return what a predicted nat of each site really costs, against the median site; within a factor of 4 of it.

    Args:
        costs: Site name -> divergence that was predicted for what the site lost.
        shares: From `HeldBack.shares`.
    """
    ratios = {name: max(shares[name], 0.0) / cost for name, cost in costs.items() if cost > 0}
    middle = sorted(ratios.values())[len(ratios) // 2] if ratios else 0.0
    if not middle > 0:
        return dict.fromkeys(costs, 1.0)
    return {name: min(max(ratios.get(name, middle) / middle, 1 / _CLIP), _CLIP) for name in costs}


def mean_prices(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the geometric mean of the prices that several rounds asked for, as if a part of a round had asked for 1.

    Args:
        rounds: From `prices`, each measured on another plan; at least one.
    """
    return {
        name: math.exp(sum(math.log(asked[name]) for asked in rounds) / (len(rounds) + _PRIOR)) for name in rounds[0]
    }


# Calibration images by which `auto` compares its plans.
HELD_BACK_IMAGES: Final = 256


def held_back(job: Job, dense: nn.Module, images: int = HELD_BACK_IMAGES) -> HeldBack:
    """Read images by which pruned models are compared, and let the dense model answer; all processes call it.

    They are the first of the calibration images in the order of `balanced_order`, dealt out to the processes.

    Args:
        job: Whose images these are.
        dense: The dense model.
        images: How many of all processes.

    Raises:
        InputError: None of them can be read.
    """
    loader = calibration_share(job, range(images))
    with out_of_memory("calibration"):
        # In pieces, since the search goes backward through them.
        size = _sensed(job)
        batches = [
            piece for pixels, _ in ([] if loader is None else bar(job, loader, "held-back images"))
            for piece in pixels.split(size)
        ]  # fmt: skip
        return HeldBack(dense, batches, precision=job.precision, processes=job.processes)
