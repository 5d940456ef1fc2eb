"""Inputs and outputs of the dense model's MLPs, at the positions that matter to its predictions.

A position matters by the norm of the gradient of the predictions there. A token that alone decides the prediction,
as a class token does, counts for as much as a hundred others, without anyone naming it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.fisher import FP16_SCALE
from vbp.method.gauss_newton import MLPSample
from vbp.method.sampling import RandomProbes, priority_sample
from vbp.runtime.forward import call_values, evaluation_mode, frozen, hooked
from vbp.runtime.memory import out_of_memory
from vbp.runtime.precision import in_float32
from vbp.runtime.processes import Processes
from vbp.runtime.session import ALONE, Session
from vbp.sites.layers import channel_dim, rows
from vbp.sites.mlp import check_mlps
from vbp.sites.site import Site
from vbp.statistics.batches import images_for
from vbp.statistics.images import ImageSource, in_pieces
from vbp.statistics.objective import Objective

_FIRST = RandomProbes()
_log = logging.getLogger(__name__)

# Positions of an image, whatever their number: 32 of DeiT-tiny's 197 serve as well as 50.
POSITIONS = 32

# Share of a position's size that is that of the image's mean position: the gradient comes from one random probe.
_EVEN = 0.25


class MLPSamples:
    """Samples of the dense model's MLPs, of the images of all processes, in the memory of the host.

    Made once, they serve any number of pruned models. Keyed by site name, the same on all processes.
    """

    def __init__(
        self,
        dense: nn.Module,
        sites: Sequence[Site],
        example: Tensor,
        batches: Iterable[Any],
        *,
        probes: RandomProbes = _FIRST,
        session: Session = ALONE,
        objective: Objective | None = None,
    ) -> None:
        """Run the dense model forward and backward over all images once; all processes of the session do.

        No batch is allowed where another process has some; `probes` are the random numbers of this process's images.
        By default the objective is what the model returns for one image says.

        Raises:
            InputError: There is no image, no site has a plain hidden layer, or values are not finite.
        """
        self.session, processes = session, session.processes
        self.mlps = check_mlps(dense, example, sites)
        self._probes = probes
        self._objective = objective or Objective.of(dense, [example])
        parts: dict[str, list[Positions]] = {mlp.site.name: [] for mlp in self.mlps}
        metrics: dict[str, Tensor] = {}
        images = 0
        with evaluation_mode(dense), frozen(dense):
            for pixels in images_for(dense, batches):
                for name, read, given, slopes in self._seen(dense, pixels, images):
                    flat = slopes.flatten(0, 1)
                    metrics[name] = metrics.get(name, 0) + (flat.T @ flat).double()
                    parts[name].append(sample_positions(read, given, _sizes(slopes), probes, images))
                images += len(pixels)
        self.images = sum(processes.all_gather(images))
        if not self.images:
            raise InputError("the refit of the producers needs at least one image, got none on any process")
        self.samples = {name: gather_sample(name, part, metrics.get(name), processes) for name, part in parts.items()}

    @classmethod
    def read(
        cls,
        dense: nn.Module,
        sites: Sequence[Site],
        example: Tensor,
        images: ImageSource,
        places: range,
        views: int,
        objective: Objective | None = None,
    ) -> MLPSamples:
        """Sample calibration images at some places, in so many views of each; all processes call it.

        Raises:
            InputError: No image can be read, or there is no MLP whose hidden layer can be refitted.
        """
        pixels = images.pixels(places, "hidden layers", views)
        with out_of_memory("calibration"):
            pieces = in_pieces(pixels, next(dense.parameters()).device)
            samples = cls(
                dense, sites, example, pieces, probes=pixels.probes, session=images.session, objective=objective
            )
        _log.info("hidden layers: samples of %d MLPs, %.0f MB on the host", len(samples.mlps), samples.nbytes / 1e6)
        return samples

    @property
    def nbytes(self) -> int:
        """Return what the samples take of the host's memory, in bytes."""
        return sum(
            part.nbytes
            for one in self.samples.values()
            for part in (one.inputs, one.outputs, one.weights, one.metric)
        )

    def _seen(self, dense: nn.Module, pixels: Tensor, start: int) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """Return what each hidden layer reads, what its consumer returns, and the gradients there.

        All are "images positions channels".
        """
        read: dict[str, Tensor] = {}
        given: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}

        def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read[name] = call_values(args, kwargs)[0].detach()

        def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            given[name] = output
            values[name] = output.detach().clone()  # some models add to it in place

        sites = [mlp.site for mlp in self.mlps]
        producers = [(dense.get_submodule(site.producers[0]), partial(before, site.name)) for site in sites]
        consumers = [(dense.get_submodule(site.consumer), partial(after, site.name)) for site in sites]
        with hooked(consumers, before=producers), torch.enable_grad(), self.session.precision.autocast():
            # A tensor of its own: the caller's images are not to learn.
            read_out = self._objective.read(dense(pixels.detach().requires_grad_()))
        noise, _, _ = self._probes.of(start, len(pixels), read_out.shape[1], 0, 0)
        half = any(each.dtype == torch.float16 for each in (read_out, *given.values()))
        scale = FP16_SCALE if half else 1.0
        cotangent = self._objective.direction(read_out.detach(), noise.to(read_out.device)) * scale
        cotangent = cotangent.to(read_out.dtype)
        # What runs without effect on the values has a gradient of 0.
        gradients = torch.autograd.grad(read_out, list(given.values()), cotangent, materialize_grads=True)
        slopes = dict(zip(given, gradients, strict=True))
        seen = []
        for mlp in self.mlps:
            name = mlp.site.name
            # A convolution of one position may be read by a linear layer.
            first, last = (
                channel_dim(dense.get_submodule(layer)) for layer in (mlp.site.producers[0], mlp.site.consumer)
            )
            inputs, outputs, slope = (
                in_float32(rows(one, dim, len(pixels)))
                for one, dim in (
                    (read[name], first), (values[name], last), (in_float32(slopes[name]) / scale, last),
                )
            )  # fmt: skip
            seen.append((name, inputs, outputs, slope))
        return seen


def _sizes(slopes: Float[Tensor, "images positions out"]) -> Float[Tensor, "images positions"]:
    sizes: Tensor = slopes.norm(dim=-1)
    sizes = (1 - _EVEN) * sizes + _EVEN * sizes.mean(1, keepdim=True)
    return sizes.clamp_min(torch.finfo(sizes.dtype).tiny)


@dataclass(frozen=True)
class Positions:
    """Positions of some images, on the CPU: what is read and returned there, "images positions channels"; weights."""

    numbers: tuple[int, ...]
    inputs: Tensor
    outputs: Tensor
    weights: Tensor

    @staticmethod
    def of(probes: RandomProbes, start: int, inputs: Tensor, outputs: Tensor, weights: Tensor) -> Positions:
        """Take those of images from place `start` on, among those of this process."""
        numbers = tuple(map(probes.number, range(start, start + len(inputs))))
        return Positions(numbers, inputs.cpu(), outputs.cpu(), weights.cpu())


def even_places(
    values: Float[Tensor, "images positions channels"], probes: RandomProbes, start: int
) -> tuple[Int[Tensor, "images sampled"], Float[Tensor, "images sampled"]]:
    """Draw positions of each image that all matter alike; return their places, and what each counts for."""
    sizes = torch.ones_like(values[..., 0])
    return priority_sample(sizes, probes.uniform(start, *sizes.shape).to(sizes), POSITIONS)


def sample_positions(
    read: Float[Tensor, "images positions in"],
    wanted: Float[Tensor, "images positions out"],
    sizes: Float[Tensor, "images positions"],
    probes: RandomProbes,
    start: int,
) -> Positions:
    """Sample positions of each image, where `sizes` says how much each matters.

    `wanted` is what the consumer should return there; `start` is the first image's place among those of this process.
    """
    uniform = probes.uniform(start, *sizes.shape).to(sizes)
    places, weights = priority_sample(sizes, uniform, POSITIONS)
    inputs, outputs = (one.take_along_dim(places[..., None], 1) for one in (read, wanted))
    return Positions.of(probes, start, inputs, outputs, weights)


def gather_sample(name: str, parts: Sequence[Positions], metric: Tensor | None, processes: Processes) -> MLPSample:
    """Put the batches of all processes together, in the order of the images' numbers.

    Raises:
        InputError: A value is not finite.
    """
    batches = [part for mine in processes.all_gather(list(parts)) for part in mine]
    order = torch.tensor([number for part in batches for number in part.numbers]).argsort(stable=True)
    inputs, outputs, weights = (
        torch.cat([getattr(part, what) for part in batches])[order].flatten(0, 1)
        for what in ("inputs", "outputs", "weights")
    )
    total = torch.stack([one.cpu() for one in processes.all_gather(metric) if one is not None]).sum(0)
    if not all(bool(one.isfinite().all()) for one in (inputs, outputs, weights, total)):
        raise InputError(
            f"what site {name} reads and returns, and the slopes there, must be finite, got NaN or infinity; check "
            "the weights and the preprocessing, prune less, or run in float32"
        )
    return MLPSample(inputs, outputs, weights, (total + total.T) / 2, len(order))
