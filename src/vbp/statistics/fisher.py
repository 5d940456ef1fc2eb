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
from vbp.method.fisher import FP16_SCALE, SiteSensitivity, fisher_direction
from vbp.method.sampling import RandomProbes
from vbp.runtime.forward import hooked
from vbp.runtime.precision import in_float32
from vbp.sites.layers import channel_dim, rows
from vbp.sites.site import Site


class FisherCollector:
    """Collect `SiteSensitivity` of several sites, batch by batch: forward pass under its hooks, then `see`."""

    def __init__(
        self, sites: Sequence[Site], probes: RandomProbes, pivots: Mapping[str, Tensor] | None = None
    ) -> None:
        self._sites = [site for site in sites if site.consumer]
        self._probes, self._pivots = probes, pivots or {}
        self._images = 0
        self._seen: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._sums: dict[str, SiteSensitivity] = {}

    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hold on to what each consumer reads and returns while the body runs a forward pass, for `see`.

        Raises:
            InputError: A consumer reads more than single positions; nothing is hooked then.
        """
        consumers = [(site, model.get_submodule(site.consumer)) for site in self._sites]
        for site, consumer in consumers:
            check_single_positions(site, consumer)
        return hooked([(consumer, partial(self._record, site.name)) for site, consumer in consumers])

    def _record(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._seen[name] = args[0].detach(), output, channel_dim(module)

    def see(self, logits: Float[Tensor, "images classes"]) -> None:
        """Take in the batch whose logits these are; nothing waits for the device.

        Raises:
            InputError: A consumer did not run, or its output cannot be divided by image.
        """
        if missing := [site.name for site in self._sites if site.name not in self._seen]:
            raise InputError(f"site {missing[0]} was never run during calibration; it has no sensitivity")
        images = logits.shape[0]
        outputs = max(output.shape[dim] for _, output, dim in self._seen.values())
        hidden = max(h.shape[dim] for h, _, dim in self._seen.values())
        noise, left, right = (
            draw.to(logits.device, non_blocking=True)
            for draw in self._probes.of(self._images, images, logits.shape[1], outputs, hidden)
        )
        scale = FP16_SCALE if logits.dtype == torch.float16 else 1.0
        cotangent = fisher_direction(logits.detach(), noise) * scale
        gradients = torch.autograd.grad(
            logits, [output for _, output, _ in self._seen.values()], cotangent.to(logits.dtype)
        )
        for (name, (h, _, dim)), gradient in zip(self._seen.items(), gradients, strict=True):
            _check_positions(name, h, dim, images)
            read, slopes = (in_float32(rows(values, dim, images)) for values in (h, gradient))
            self._add_(name, read, slopes / scale, left, right)
        self._images += images
        self._seen.clear()

    def _add_(self, name: str, read: Tensor, slopes: Tensor, left: Tensor, right: Tensor) -> None:
        out, hidden = slopes.shape[-1], read.shape[-1]
        if name not in self._sums:
            pivot = self._pivots[name].to(read.device) if name in self._pivots else read.mean((0, 1))
            inputs, outputs = (read.new_zeros(size, size, dtype=torch.float64) for size in (hidden + 1, out))
            self._sums[name] = SiteSensitivity(0, pivot.double(), inputs, outputs)
        sums = self._sums[name]
        with torch.autocast(read.device.type, enabled=False):
            centred = F.pad(read - sums.pivot.to(read.dtype), (0, 1), value=1.0)
            sketch = ((slopes @ left[:, :out].to(read.dtype)).transpose(1, 2) @ centred).flatten(0, 1)
            sums.inputs.add_(sketch.T @ sketch, alpha=1 / left.shape[-1])
            sketch = ((centred[..., :-1] @ right[:, :hidden].to(read.dtype)).transpose(1, 2) @ slopes).flatten(0, 1)
            sums.outputs.add_(sketch.T @ sketch, alpha=1 / right.shape[-1])
        self._sums[name] = SiteSensitivity(sums.images + len(read), sums.pivot, sums.inputs, sums.outputs)

    def finish(self) -> dict[str, SiteSensitivity]:
        """Return the sums by site name, on the CPU, symmetric to the last bit.

        Raises:
            InputError: A gradient was not finite.
        """
        sensitivities = {}
        for name, running in self._sums.items():
            sums = running.to("cpu")
            if not bool(sums.inputs.isfinite().all() and sums.outputs.isfinite().all()):
                raise InputError(
                    f"gradients at site {name} must be finite, got NaN or infinity during calibration; check the "
                    "weights and the preprocessing, or run in float32"
                )
            inputs, outputs = ((matrix + matrix.T) / 2 for matrix in (sums.inputs, sums.outputs))
            sensitivities[name] = SiteSensitivity(sums.images, sums.pivot, inputs, outputs)
        return sensitivities


def check_single_positions(site: Site, consumer: nn.Module) -> None:
    """Raise InputError if a consumer's kernel reads several positions or groups of channels."""
    if isinstance(consumer, nn.Conv2d) and (
        consumer.kernel_size != (1, 1) or consumer.stride != (1, 1) or consumer.groups != 1
    ):
        raise InputError(
            f"sensitivity needs consumers that read single positions (Linear, 1x1 convolution), got {site.consumer} "
            f"of site {site.name} with kernel {consumer.kernel_size}, stride {consumer.stride} and "
            f"{consumer.groups} groups; rank these channels by variance instead"
        )


def _check_positions(name: str, values: Tensor, dim: int, images: int) -> None:
    if values.numel() // values.shape[dim] % images:
        raise InputError(
            f"what reaches site {name} must hold as many positions for each image, got shape {tuple(values.shape)} "
            f"for {images} images; rank these channels by variance instead"
        )
