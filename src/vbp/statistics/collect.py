"""Collect the statistics of every site in one pass over the calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.covariance import ChannelCovariance, RunningCovariance
from vbp.method.moments import ChannelMoments, RunningMoments
from vbp.method.sampling import RandomProbes, TokenSample, TokenSampler
from vbp.runtime.fingerprints import model_fingerprint
from vbp.runtime.forward import Hook, call_values, evaluation_mode, frozen, hooked
from vbp.sites.layers import channel_dim
from vbp.sites.site import Site, select
from vbp.statistics.batches import images_for
from vbp.statistics.fisher import FisherCollector
from vbp.statistics.objective import Objective
from vbp.statistics.statistics import KEY, Statistics, observed_names

Moments = TypeVar("Moments", ChannelMoments, ChannelCovariance)


class Observer(RunningMoments):
    """Collect moments of all values that it is shown and, with a sampler, the covariance of a sample of them.

    With `keys` the covariance is about the mean of each image, or window: the softmax does not see that mean.
    """

    def __init__(self, sampler: TokenSampler | None = None, *, keys: bool = False) -> None:
        super().__init__()
        self.covariance = None if sampler is None else RunningCovariance()
        self._sampler, self._keys = sampler, keys

    def see(self, values: Tensor) -> None:
        """Take in values, channels last."""
        rows = values.detach().reshape(-1, values.shape[-1])
        self.add_(rows)
        if self._sampler is not None and self.covariance is not None:
            if self._keys:
                rows = about_mean_of_image(values.detach(), self._sampler.images).reshape(-1, values.shape[-1])
            self.covariance.add_(self._sampler.draw(rows))

    def of_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in what a layer reads: a hook before the layer."""
        self.see(call_values(args, kwargs)[0].movedim(channel_dim(layer), -1))

    def of_columns(self, first: int, channels: int) -> Hook:
        """Return a hook before a layer that takes in some of the channels that the layer reads."""
        return lambda layer, args, kwargs: self.see(
            rows_of(layer, range(first, first + channels))(call_values(args, kwargs)[0]).movedim(
                channel_dim(layer), -1
            )
        )

    def of_output(self, part: Callable[[Tensor], Tensor]) -> Hook:
        """Return a hook after a layer that takes in a part, or another function, of what the layer returns."""
        return lambda layer, args, output: self.see(part(output).movedim(channel_dim(layer), -1))


def about_mean_of_image(values: Float[Tensor, "groups *positions channels"], images: int) -> Tensor:
    """Return keys less their mean over the positions of an image, or of a window.

    Where the first dimension is none of images or their windows, all images together count as one.
    """
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    if values.ndim < 3 or not images or values.shape[0] % images:
        return values
    return values - values.mean(tuple(range(1, values.ndim - 1)), keepdim=True)


def rows_of(layer: nn.Module, places: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return the function that takes some of a layer's channels out of what the layer reads or returns."""
    return lambda values: select(values, channel_dim(layer), places)


def _observing(
    model: nn.Module, sites: Sequence[Site], observers: Mapping[str, Observer]
) -> AbstractContextManager[None]:
    """Show the observers, while the body runs, what consumers read, and which queries and keys are made."""
    read, made = [], []
    for site in sites:
        if site.kind == "query_key":
            for name, (layer, places) in zip(observed_names(site), site.places, strict=True):
                module = model.get_submodule(layer)
                made.append((module, observers[name].of_output(rows_of(module, places))))
        else:
            for reader in site.readers:
                watch = observers[reader.key].of_columns(reader.first, site.hidden)
                read.append((model.get_submodule(reader.layer), watch))
    return hooked(made, before=read)


def _show(
    model: nn.Module, pixels: Tensor, observing: AbstractContextManager[None], sums: FisherCollector | None
) -> None:
    """Run one batch; nothing of its graph is held afterwards."""
    # Hooked in the forward pass alone: gradient checkpointing runs layers again in the backward pass.
    with observing, nullcontext() if sums is None else sums.watching(model):
        output = model(pixels)
    if sums is not None and sums.objective is not None:
        sums.see(sums.objective.read(output))


def collect_statistics(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    data: str = "",
    covariance: bool = False,
    tokens: TokenSample | None = None,
    sensitivity: RandomProbes | None = None,
    pivots: Mapping[str, Tensor] | None = None,
    objective: Objective | None = None,
) -> Statistics:
    """Observe what reaches the layers that read each site over all batches, in evaluation mode.

    Args:
        model: The dense model; left as it was.
        sites: From `find_sites`.
        batches: Images, with labels or without, as `pixels_of` takes them.
        device: Where the images go; by default where the model is.
        data: Fingerprint of the images, kept so that a saved file is not used for other data.
        covariance: Also collect the covariance of the channels of each site, for the refit; of keys that about the
            mean of their image. It takes `covariance_bytes` on the device, and with all tokens about as much time as
            the model itself.
        tokens: The tokens that count for the covariance; by default all. Means and variances are of all tokens.
        sensitivity: Also collect the sensitivity of each site that a layer reads, with these random numbers; by
            default not. It takes a backward pass, with the activations of a batch in memory, and `sensitivity_bytes`
            on the device.
        pivots: Site name -> what the channels of the sensitivity are counted from, near their means; by default the
            mean of the first batch. Merged passes equal a single one only if they have the same.
        objective: What the sensitivity is of; by default what the model returns for the first batch says.

    Raises:
        InputError: No image came, a site saw a value that is not finite, or it has no sensitivity.

    Example:
        >>> statistics = vbp.collect_statistics(model, sites, [images])
    """
    sample = TokenSample() if tokens is None else tokens
    sampler = TokenSampler(sample) if covariance else None
    sums = None if sensitivity is None else FisherCollector(sites, sensitivity, pivots, objective)
    observers = {name: Observer(sampler, keys=name.endswith(KEY)) for site in sites for name in observed_names(site)}
    images = 0
    # Gradients are wanted of the layers' outputs alone, also where the caller has frozen the model.
    with evaluation_mode(model), frozen(model), torch.set_grad_enabled(sums is not None):
        for pixels in images_for(model, batches, device):
            if sampler is not None:
                sampler.begin(pixels.shape[0])
            images += pixels.shape[0]
            if sums is not None and sums.objective is None:
                sums.objective = Objective.of(model, [pixels])
            _show(model, pixels.requires_grad_(sums is not None), _observing(model, sites, observers), sums)
    if images == 0:
        raise InputError("calibration needs at least one image, got none; check the training images")
    moments = {name: _finite(name, observer.moments) for name, observer in observers.items()}
    # Products of large values overflow before the values themselves do.
    covariances = {
        name: _finite(name, observer.covariance.finish())
        for name, observer in observers.items()
        if observer.covariance is not None
    }
    fraction = sample.fraction if covariance else 1.0
    sensitivities = {} if sums is None else sums.finish()
    logits = {} if sums is None else sums.finish_pairs()
    return Statistics(moments, images, model_fingerprint(model), data, covariances, fraction, sensitivities, logits)


def _finite(name: str, moments: Moments | None) -> Moments:
    """Return the moments on the CPU."""
    if moments is None:
        raise InputError(f"site {name} was never run during calibration; it cannot be pruned from statistics")
    moments = moments.to("cpu")
    finite = moments.mean.isfinite() & moments.m2.isfinite().reshape(len(moments.mean), -1).all(1)
    if bad := int((~finite).sum()):
        raise InputError(
            f"activations at site {name} must be finite, got NaN or infinity in {bad} channels during "
            "calibration; check the weights and the preprocessing, or run in float32"
        )
    return moments
