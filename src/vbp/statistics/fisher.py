"""Collect sensitivities: one backward pass a batch, from the model's own predictions; weight gradients are sketched.

Neither the G_i of `vbp.method.fisher` nor their products are ever formed. For a matrix R of k columns of independent
standard normal numbers, G_i' R R' G_i / k has the mean G_i' G_i. R' G_i costs k (out + hidden) multiply-adds a token,
its product with itself k hidden^2 an image: next to nothing beside the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.fisher import FP16_SCALE, LogitSensitivity, SiteSensitivity
from vbp.method.sampling import RandomProbes
from vbp.runtime.forward import Hook, hooked
from vbp.runtime.precision import in_float32
from vbp.sites.layers import channel_dim, groups_of, reads, rows
from vbp.sites.site import Reader, Site, select
from vbp.statistics.objective import Objective


class FisherCollector:
    """Collect `SiteSensitivity` of several sites, batch by batch: forward pass under its hooks, then `see`."""

    def __init__(
        self,
        sites: Sequence[Site],
        probes: RandomProbes,
        pivots: Mapping[str, Tensor] | None = None,
        objective: Objective | None = None,
    ) -> None:
        self._readers = [(reader, site.hidden) for site in sites for reader in site.readers]
        self._pairs = [site for site in sites if site.kind == "query_key"]
        self._probes, self._pivots, self.objective = probes, pivots or {}, objective
        self._images = 0
        self._seen: dict[str, tuple[Tensor, Tensor, nn.Module]] = {}
        self._sums: dict[str, SiteSensitivity] = {}
        self._queries: dict[str, tuple[Tensor, int]] = {}
        self._logits: dict[str, LogitSensitivity] = {}

    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hold on to queries, and to what consumers read and return, during a forward pass in the body, for `see`."""
        hooks: list[tuple[nn.Module, Hook]] = [
            (model.get_submodule(reader.layer), partial(self._record, reader, hidden))
            for reader, hidden in self._readers
        ]
        makers = {site.name: model.get_submodule(site.producers[0]) for site in self._pairs}
        return hooked([*hooks, *((maker, partial(self._record_made, name)) for name, maker in makers.items())])

    def _record(self, reader: Reader, hidden: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._seen[reader.key] = args[0].detach().narrow(channel_dim(module), reader.first, hidden), output, module

    def _record_made(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._queries[name] = output, channel_dim(module)

    def see(self, values: Float[Tensor, "images values"]) -> None:
        """Take in the batch of which the objective reads these values; nothing waits for the device.

        Raises:
            InputError: A consumer did not run, or its output cannot be divided by image.
        """
        run = self._seen.keys() | self._queries.keys()
        names = [*(reader.key for reader, _ in self._readers), *(site.name for site in self._pairs)]
        if missing := [name for name in names if name not in run]:
            raise InputError(f"site {missing[0]} was never run during calibration; it has no sensitivity")
        assert self.objective is not None
        images = values.shape[0]
        outputs = max((output.shape[channel_dim(layer)] for _, output, layer in self._seen.values()), default=1)
        hidden = max((h.shape[channel_dim(layer)] for h, _, layer in self._seen.values()), default=1)
        noise, left, right = (
            draw.to(values.device, non_blocking=True)
            for draw in self._probes.of(self._images, images, values.shape[1], outputs, hidden)
        )
        outputs_seen = [output for _, output, _ in self._seen.values()]
        made = [output for output, _ in self._queries.values()]
        half = any(each.dtype == torch.float16 for each in (values, *outputs_seen, *made))
        scale = FP16_SCALE if half else 1.0
        cotangent = self.objective.direction(values.detach(), noise) * scale
        cotangent = cotangent.to(values.dtype)
        # What runs without effect on the values, as the pooling of an encoder whose tokens are classified, costs 0.
        gradients = torch.autograd.grad(values, [*outputs_seen, *made], cotangent, materialize_grads=True)
        for site, gradient in zip(self._pairs, gradients[len(outputs_seen) :], strict=True):
            self._add_pairs_(site, gradient, images, scale)
        seen = zip(self._seen.items(), gradients[: len(outputs_seen)], strict=True)
        for (name, (h, output, layer)), gradient in seen:
            dim = channel_dim(layer)
            _check_positions(name, h, dim, images)
            slopes = in_float32(rows(gradient, dim, images)) / scale
            if name not in self._sums:
                self._sums[name] = self._empty(name, in_float32(rows(h, dim, images)), slopes.shape[-1])
            for read in reads(layer, h, output):
                self._add_(name, in_float32(rows(read, dim, images)), slopes, left, right, groups_of(layer))
            sums = self._sums[name]
            self._sums[name] = SiteSensitivity(sums.images + images, sums.pivot, sums.inputs, sums.outputs)
        self._images += images
        self._seen.clear()
        self._queries.clear()

    def _add_pairs_(self, site: Site, gradient: Tensor, images: int, scale: float) -> None:
        output, dim = self._queries[site.name]
        _check_positions(site.name, output, dim, images)
        places = site.places[0][1]
        queries, slopes = (
            in_float32(rows(select(values.detach(), dim, places), dim, images)).reshape(
                images, -1, site.heads, site.hidden // site.heads
            )
            for values in (output, gradient)
        )
        with torch.autocast(output.device.type, enabled=False):
            products = torch.einsum("ithk,ithq->ihkq", slopes / scale, queries).double()
        query, key = (torch.einsum(how, products, products) for how in ("ihka,ihkb->hab", "ihaq,ihbq->hab"))
        seen, before = LogitSensitivity(images, query, key), self._logits.get(site.name)
        self._logits[site.name] = seen if before is None else before.merge(seen)

    def _empty(self, name: str, read: Tensor, out: int) -> SiteSensitivity:
        pivot = self._pivots[name].to(read.device) if name in self._pivots else read.mean((0, 1))
        inputs, outputs = (read.new_zeros(size, size, dtype=torch.float64) for size in (read.shape[-1] + 1, out))
        return SiteSensitivity(0, pivot.double(), inputs, outputs)

    def _add_(self, name: str, read: Tensor, slopes: Tensor, left: Tensor, right: Tensor, groups: int) -> None:
        """Add what a consumer reads, at one offset of its kernel; in the place of padding it reads 0.

        An output has a weight for the channels of its own group alone.
        """
        sums = self._sums[name]
        with torch.autocast(read.device.type, enabled=False):
            centred = read - sums.pivot.to(read.dtype)
            parts = (tensor.chunk(groups, -1) for tensor in (centred, slopes))
            for group, (values, slope) in enumerate(zip(*parts, strict=True)):
                out, hidden = slope.shape[-1], values.shape[-1]
                outputs, inputs = slice(group * out, (group + 1) * out), slice(group * hidden, (group + 1) * hidden)
                with_bias = F.pad(values, (0, 1), value=1.0)
                sketch = ((slope @ left[:, outputs].to(read.dtype)).transpose(1, 2) @ with_bias).flatten(0, 1)
                places = [*range(inputs.start, inputs.stop), read.shape[-1]]
                _add_block_(sums.inputs, places, sketch, 1 / left.shape[-1])
                sketch = ((values @ right[:, inputs].to(read.dtype)).transpose(1, 2) @ slope).flatten(0, 1)
                _add_block_(sums.outputs, range(outputs.start, outputs.stop), sketch, 1 / right.shape[-1])

    def finish_pairs(self) -> dict[str, LogitSensitivity]:
        """Return the sums of queries and keys by site name, on the CPU, symmetric to the last bit.

        Raises:
            InputError: A gradient was not finite.
        """
        sensitivities = {}
        for name, sums in self._logits.items():
            query, key = ((matrix + matrix.mT).cpu() / 2 for matrix in (sums.query, sums.key))
            _check_finite(name, query, key)
            sensitivities[name] = LogitSensitivity(sums.images, query, key)
        return sensitivities

    def finish(self) -> dict[str, SiteSensitivity]:
        """Return the sums by site name, on the CPU, symmetric to the last bit.

        Raises:
            InputError: A gradient was not finite.
        """
        sensitivities = {}
        for name, running in self._sums.items():
            sums = running.to("cpu")
            _check_finite(name, sums.inputs, sums.outputs)
            inputs, outputs = ((matrix + matrix.T) / 2 for matrix in (sums.inputs, sums.outputs))
            sensitivities[name] = SiteSensitivity(sums.images, sums.pivot, inputs, outputs)
        return sensitivities


def _add_block_(sums: Tensor, places: Sequence[int], sketch: Tensor, factor: float) -> None:
    """Add the square of a sketch to the rows and columns of a matrix at some places."""
    square = sketch.T @ sketch
    if len(places) == len(sums):
        sums.add_(square, alpha=factor)
        return
    index = torch.tensor(list(places), device=sums.device)
    sums[index[:, None], index] += factor * square


def _check_finite(name: str, *sums: Tensor) -> None:
    if not all(bool(matrix.isfinite().all()) for matrix in sums):
        raise InputError(
            f"gradients at site {name} must be finite, got NaN or infinity during calibration; check the weights and "
            "the preprocessing, or run in float32"
        )


def _check_positions(name: str, values: Tensor, dim: int, images: int) -> None:
    if values.numel() // values.shape[dim] % images:
        raise InputError(
            f"what reaches site {name} must hold as many positions for each image, got shape {tuple(values.shape)} "
            f"for {images} images; rank these channels by variance instead"
        )
