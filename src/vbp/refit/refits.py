"""What is refitted after surgery, to which images without labels: BatchNorms, kernels, producers, stream, head."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, get_args

from torch import Tensor, nn

from vbp.errors import InputError
from vbp.pruning.divergence import ONE_IN, DenseReference, held_out_places
from vbp.pruning.plan import PruningPlan
from vbp.refit.batchnorm import BATCHNORM_IMAGES, BatchNormRefit, check_norms, refit_batchnorm_, running_norms
from vbp.refit.head import HeadRefit, check_images, last_linear, refit_head_
from vbp.refit.kernels import KernelRefit, check_kernels, kernel_readers, refit_kernels_
from vbp.refit.producers import ProducerRefit, refit_producers_
from vbp.refit.stream import DenseStream, StreamRefit, refit_to_stream_, residual_adds
from vbp.runtime.choices import BatchNormChoice, Toggle
from vbp.runtime.decode import to_json
from vbp.runtime.memory import out_of_memory
from vbp.sites.mlp import check_mlps
from vbp.sites.site import Site
from vbp.statistics.images import GivenImages, ImageSource
from vbp.statistics.mlp_samples import MLPSamples
from vbp.statistics.objective import Objective

_log = logging.getLogger(__name__)
Refit = Literal["batchnorm", "kernels", "producers", "stream", "head"]

# Calibration images to which each of them is refitted.
REFIT_IMAGES: Final = 1000

# What is said of a refit that is not possible.
_LEFT_OUT: Final[Mapping[Refit, str]] = {
    "batchnorm": "no BatchNorm is estimated anew",
    "kernels": "the larger kernels stay as they are",
    "producers": "the producers stay as they are",
    "stream": "the residual stream stays as it is",
    "head": "the last layer stays as it is",
}


@dataclass(frozen=True)
class RefitReport:
    """Hold what the refits did; None for one that is not wanted or not possible."""

    producers: ProducerRefit | None = None
    stream: StreamRefit | None = None
    head: HeadRefit | None = None
    batchnorm: BatchNormRefit | None = None
    kernels: KernelRefit | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return each as plain JSON data, with a sentence; the strength of a head that was left as it was is None."""
        plain: dict[str, Any] = dict.fromkeys(get_args(Refit))
        for name in plain:
            if (refit := getattr(self, name)) is not None:
                data = {key: None if value == math.inf else value for key, value in to_json(refit).items()}
                plain[name] = data | {"sentence": refit.sentence()}
        return plain


class Refits:
    """Refit pruned models to one dense model. What does not depend on the pruned model is computed once.

    The first images, see `held_out_places`, judge the refits of kernels and stream and the BatchNorms; kernels,
    producers and stream are refitted to the 1,000 that follow, BatchNorms to the first of these, the last layer to
    the first 1,000.
    """

    def __init__(
        self,
        dense: nn.Module,
        sites: Sequence[Site],
        example: Tensor,
        images: ImageSource,
        *,
        producers: Toggle = "auto",
        stream: Toggle = "auto",
        head: Toggle = "auto",
        batchnorm: BatchNormChoice = "keep",
        kernels: Toggle = "auto",
        views: int = 1,
        keep_apart: bool = False,
        objective: Objective | None = None,
    ) -> None:
        """Find what can be refitted, and log what cannot, and why; `on` must be possible.

        All processes of the images' session make this object, and call it alike. With `keep_apart` the last layer
        is not fitted to the images that judge either: they are to judge what follows.

        Raises:
            InputError: What is `on` has no such kernel, MLP, stream or last layer, or too few images.
        """
        self._dense, self._sites, self._example, self._images, self._views = dense, sites, example, images, views
        self._given_objective = objective
        toggles: dict[Refit, Toggle] = {"producers": producers, "stream": stream, "head": head}
        # Most models have no BatchNorm and no larger kernel, and nobody asked for them by name.
        left = batchnorm == "keep" or (batchnorm == "auto" and not running_norms(dense))
        toggles["batchnorm"] = "off" if left else "auto" if batchnorm == "auto" else "on"
        toggles["kernels"] = "off" if kernels == "auto" and not kernel_readers(dense, sites) else kernels
        self._batchnorm, self._kernels, self._keep_apart = batchnorm, kernels, keep_apart
        self.wanted = frozenset(name for name, toggle in toggles.items() if self._possible(name, toggle))
        if self.wanted - {"batchnorm"}:
            _log.info("the refits after surgery read %d view%s of each image", views, "" if views == 1 else "s")

    def refit_(
        self, pruned: nn.Module, only: Collection[Refit] = get_args(Refit), *, plan: PruningPlan | None = None
    ) -> RefitReport:
        """Refit a pruned model in place, on the dense model's device, as far as is wanted, possible and in `only`.

        BatchNorms and kernels need the plan. BatchNorms come first; once more if other layers have changed, which
        changes what they read. The last layer comes last.

        Raises:
            InputError: Kernels are `on` and there is no plan, no image can be read, or a value is not finite.
        """
        if plan is None and "kernels" in self.wanted & {*only}:
            if self._kernels == "on":
                raise InputError("the refit of larger kernels needs the plan, got none; pass it, or leave them out")
            _log.info("%s: their refit needs the plan", _LEFT_OUT["kernels"])
        kernels, producers, stream, head, wanted = None, None, None, None, self.wanted & {*only}
        with out_of_memory("calibration"):
            batchnorm = self._estimate_(pruned, plan) if "batchnorm" in wanted else None
            if "kernels" in wanted and plan is not None:
                pixels = self._images.pixels(self._fitted, "larger kernels", self._views)
                kernels = refit_kernels_(pruned, plan, pixels, self._judge, probes=pixels.probes)
                _log.info("%s", kernels.sentence())
            if "producers" in wanted:
                producers = refit_producers_(pruned, self._samples)
                _log.info("%s", producers.sentence())
            if "stream" in wanted:
                stream = refit_to_stream_(pruned, self._stream, self._judge)
                _log.info("%s", stream.sentence())
            changed = producers is not None or (stream and stream.sites) or (kernels and kernels.layers)
            if changed and batchnorm is not None:
                batchnorm = self._estimate_(pruned, plan)
            if "head" in wanted:
                head = refit_head_(pruned, self._reference)
                _log.info("%s", head.sentence())
        return RefitReport(producers, stream, head, batchnorm, kernels)

    def _estimate_(self, pruned: nn.Module, plan: PruningPlan | None) -> BatchNormRefit:
        assert plan is not None
        places = range(self._fitted.start, self._fitted.start + BATCHNORM_IMAGES)
        pixels = self._images.pixels(places, "BatchNorms")
        done = refit_batchnorm_(pruned, plan, pixels, self._judge, self._batchnorm)
        _log.info("%s", done.sentence())
        return done

    @cached_property
    def _objective(self) -> Objective:
        return self._given_objective or Objective.choose(self._dense, self._example, self._images)

    @cached_property
    def _judge(self) -> DenseReference:
        return DenseReference.held_out(self._dense, self._images, range(self._fitted.start), self._objective)

    @cached_property
    def _samples(self) -> MLPSamples:
        # The images that judge the stream must be new to the producers too.
        known = self._dense, self._sites, self._example, self._images, self._fitted, self._views
        return MLPSamples.read(*known, self._objective)

    @cached_property
    def _stream(self) -> DenseStream:
        pixels = self._images.pixels(self._fitted, "residual stream", self._views)
        known = self._dense, self._sites, self._judge.example(), pixels
        return DenseStream(*known, probes=pixels.probes, session=self._images.session)

    @cached_property
    def _reference(self) -> DenseReference:
        places = self._fitted if self._keep_apart else range(REFIT_IMAGES)
        pixels = self._images.pixels(places, "last layer", self._views)
        return DenseReference(
            self._dense, pixels, views=self._views, session=self._images.session, objective=self._objective
        )

    @property
    def _fitted(self) -> range:
        judging = len(held_out_places(len(self._images)))
        return range(judging, judging + REFIT_IMAGES)

    def _possible(self, name: Refit, toggle: Toggle) -> bool:
        if toggle == "off":
            return False
        try:
            self._check(name)
        except InputError as error:
            if toggle == "on":
                raise
            _log.info("%s: %s", _LEFT_OUT[name], error)
            return False
        return True

    def _check(self, name: Refit) -> None:
        images = len(self._images)
        if name == "batchnorm":
            check_norms(self._dense)
            _check_enough("BatchNorms", images)
            return
        if name == "head":
            check_images(images)
            last_linear(self._dense, self._example, self._objective)
            return
        if name == "kernels":
            _check_enough("larger kernels", images)
            check_kernels(self._dense, self._sites)
            return
        what, find = ("producers", check_mlps) if name == "producers" else ("residual stream", residual_adds)
        _check_enough(what, images)
        find(self._dense, self._example, self._sites)


def _check_enough(what: str, images: int) -> None:
    if images < ONE_IN:
        raise InputError(f"the refit of the {what} needs at least {ONE_IN} images, got {images}; give more")


def refit_(
    pruned: nn.Module,
    dense: nn.Module,
    sites: Sequence[Site],
    batches: ImageSource | Iterable[Any],
    *,
    producers: bool = True,
    stream: bool = True,
    head: bool = True,
) -> RefitReport:
    """Refit a pruned model to the dense one, in place, without labels, as `vbp run` does after surgery.

    Without the plan, BatchNorms keep their running statistics, and layers with larger kernels stay as they are.

    What the model does not have (MLPs with a plain activation, a residual stream, a last linear layer), or has too
    few images for, is left as it is: the log says why, and the report has None in its place.

    Args:
        pruned: The model, after `prune_` with the refit of its sites.
        dense: The model before, on the same device; left as it was.
        sites: Those that were pruned, from `find_sites` on the dense model.
        batches: Calibration images, prepared as for evaluation, some hundred or more, as `pixels_of` takes
            them. A list or a loader, for they are gone through several times.
        producers: Refit the layers before the hidden channels.
        stream: Bring the residual stream back to the dense model's.
        head: Refit the last linear layer.

    Raises:
        InputError: `batches` is an iterator or empty, or a value is not finite.

    Example:
        >>> vbp.refit_(pruned, model, sites, [images]).stream.images
        6
    """
    images = batches if isinstance(batches, ImageSource) else GivenImages(batches)
    device = next(dense.parameters()).device
    example = next((pixels.to(device) for pixels in images.pixels(range(1), "first image")), None)
    if example is None:
        raise InputError("batches must hold calibration images, got none; give some hundred")
    refits = Refits(
        dense, sites, example, images,
        producers="auto" if producers else "off", stream="auto" if stream else "off", head="auto" if head else "off",
    )  # fmt: skip
    return refits.refit_(pruned)
