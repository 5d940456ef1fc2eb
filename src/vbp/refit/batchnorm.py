"""Re-estimate what the BatchNorms of a pruned model normalise by, where that brings its predictions closer.

A BatchNorm behind pruned channels was trained for the dense model's mean and variance, and normalises by them still.
Two ways to mend it, each from unlabelled images:

    recalibrate   mean and variance of what the norm reads in the pruned model, over the images
    match         m' = m + (mean in the pruned model - mean in the dense model),
                  (v' + eps) / (v + eps) = the same ratio of the two models' variances, on the same images

The first forgets what training has averaged over many more images. Neither is a gain for sure: a refit already gives
the least squared error, with less variance than the dense model has, and scaling that up adds to the error. So images
that neither the fits nor these estimates have seen can choose, by the divergence of the predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vbp.errors import InputError
from vbp.pruning.divergence import DenseReference
from vbp.pruning.plan import PruningPlan
from vbp.runtime.choices import BatchNormChoice
from vbp.runtime.forward import evaluation_mode, hooked
from vbp.runtime.session import Session
from vbp.sites.cutting import removed_from_inner
from vbp.sites.layers import inner_channels
from vbp.statistics.batches import ImagesFor
from vbp.statistics.objective import KL

# Images of the estimate: means and variances over many positions need no more.
BATCHNORM_IMAGES: Final = 256
_Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BatchNormRefit:
    """Tell what became of the BatchNorms' running statistics.

    `divergences` are errors of the objective on `judged` other images, by each choice that was tried; none if the
    choice was made by hand.
    """

    chosen: str
    images: int
    judged: int
    divergences: Mapping[str, float]
    measure: str = KL

    def sentence(self) -> str:
        """Return in words what became of the model."""
        what = {
            "keep": "the BatchNorms keep their running statistics",
            "recalibrate": f"the BatchNorms have the statistics of {self.images} images in the pruned model",
            "match": f"the BatchNorms are moved by the difference of both models on {self.images} images",
        }[self.chosen]
        if not self.divergences:
            return what
        tried = ", ".join(f"{name} {value:.4f}" for name, value in self.divergences.items())
        return f"{what}: {self.measure}, on {self.judged} others: {tried}"


def running_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorms with running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def check_norms(model: nn.Module) -> None:
    """Raise InputError if a model has no BatchNorm with running statistics."""
    if not running_norms(model):
        raise InputError(
            f"batchnorm needs BatchNorm layers with running statistics, got {type(model).__name__}, which has none; "
            "leave --batchnorm out"
        )


def refit_batchnorm_(
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    judge: DenseReference,
    choice: BatchNormChoice = "auto",
) -> BatchNormRefit:
    """Re-estimate the running statistics of a pruned model's BatchNorms in place, without labels.

    Same result on all processes of `judge`, which all call it.

    Args:
        pruned: The dense model of `judge`, pruned by the plan.
        plan: The plan.
        batches: Images of the estimate, which can be gone through again: this process's share.
        judge: The dense model, and the images by which `auto` chooses.
        choice: What to do; `auto` does what brings the predictions closest to the dense model's, perhaps nothing.

    Raises:
        InputError: The model has no such layer, or there is no image.
    """
    check_norms(pruned)
    norms, pixels = running_norms(pruned), ImagesFor(judge.model, batches)
    kept = {
        name: [channel for channel in range(inner_channels(judge.model.get_submodule(name))) if channel not in gone]
        for name, gone in removed_from_inner([(entry.site, entry.keep) for entry in plan.sites]).items()
    }
    before = _held(norms)
    if choice == "keep":
        return BatchNormRefit("keep", 0, 0, {})
    tried: dict[str, dict[str, _Moments]] = {"keep": before} if choice == "auto" else {}
    images, divergences = 0, {}
    try:
        for name in ("match", "recalibrate") if choice == "auto" else (choice,):
            dense = judge.model if name == "match" else None
            tried[name], images = _estimate(pruned, norms, dense, kept, pixels, judge.session)
            _set_(norms, before)
        if choice == "auto":
            for name, moments in tried.items():
                _set_(norms, moments)
                divergences[name] = judge.divergence(pruned)
        chosen = min(divergences, key=lambda name: divergences[name]) if divergences else choice
    except BaseException:
        _set_(norms, before)
        raise
    _set_(norms, tried[chosen])
    judged = judge.images if divergences else 0
    return BatchNormRefit(chosen, images, judged, divergences, judge.objective.measure)


def _estimate(
    pruned: nn.Module,
    norms: Mapping[str, _BatchNorm],
    dense: nn.Module | None,
    kept: Mapping[str, list[int]],
    batches: Iterable[Tensor],
    session: Session,
) -> tuple[dict[str, _Moments], int]:
    """Return new statistics of each norm, and the number of images; with a dense model those that match it.

    Each norm normalises a batch by what that batch asks for, so that those behind it see it mended.
    """
    own, sums, seen = _held(norms), dict[str, list[Tensor]](), dict[str, _Moments]()

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        seen[name] = _moments(args[0])

    def mend(name: str, module: _BatchNorm, args: tuple[Any, ...], kwargs: Any) -> None:
        mean, variance = _moments(args[0])
        if dense is not None and name in seen:
            channels = kept.get(name, slice(None))
            there, spread = (values[channels] for values in seen[name])
            mean = own[name][0] + mean - there
            variance = (own[name][1] + module.eps) * (variance + module.eps) / (spread + module.eps) - module.eps
        total = sums.setdefault(name, [torch.zeros_like(mean), torch.zeros_like(mean)])
        for value, part in zip(total, (mean, variance), strict=True):
            value += part * len(args[0])
        _set_({name: module}, {name: (mean, variance)})

    images = torch.zeros(1, dtype=torch.float64, device=next(pruned.parameters()).device)
    hooks: list[tuple[nn.Module, Callable[..., None]]] = [(norm, partial(mend, name)) for name, norm in norms.items()]
    others = [] if dense is None else [(dense.get_submodule(name), partial(watch, name)) for name in norms]
    with torch.no_grad(), evaluation_mode(pruned), hooked(before=hooks), hooked(before=others):
        for pixels in batches:
            with session.precision.autocast():
                if dense is not None:
                    with evaluation_mode(dense):
                        dense(pixels)
                pruned(pixels)
            images += len(pixels)
    total = float(session.processes.all_reduce_sum_(images))
    if not total:
        raise InputError("batchnorm needs at least one image, got none on any process")
    found, ran = {}, set[str]().union(*session.processes.all_gather(set(sums)))
    for name in norms:
        if name in ran:
            zeros = [torch.zeros_like(value) for value in own[name]]
            mean, variance = (session.processes.all_reduce_sum_(value) / total for value in sums.get(name, zeros))
            found[name] = mean, variance
    return {**own, **found}, int(total)


def _moments(values: Tensor) -> _Moments:
    dims = [dim for dim in range(values.ndim) if dim != 1]
    variance, mean = torch.var_mean(values.detach().float(), dims, correction=0)
    return mean.double(), variance.double()


def _held(norms: Mapping[str, _BatchNorm]) -> dict[str, _Moments]:
    held = {}
    for name, norm in norms.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        held[name] = norm.running_mean.double().clone(), norm.running_var.double().clone()
    return held


def _set_(norms: Mapping[str, _BatchNorm], moments: Mapping[str, _Moments]) -> None:
    for name, norm in norms.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(moments[name][0])
        norm.running_var.copy_(moments[name][1])
