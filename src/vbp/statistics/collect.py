"""Collect the statistics of every site in one pass over the calibration images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vbp.errors import InputError
from vbp.method.covariance import ChannelCovariance, CovarianceSum
from vbp.method.moments import ChannelMoments, channel_moments
from vbp.method.sampling import Draws, TokenSample, TokenSampler
from vbp.runtime.fingerprints import model_fingerprint
from vbp.runtime.forward import evaluation_mode, frozen, logits_of
from vbp.sites.layers import channel_dim
from vbp.sites.site import Site
from vbp.statistics.fisher import SensitivitySums
from vbp.statistics.statistics import Statistics, observed_names


class Observer:
    """Moments of all values that it is shown, and the covariance of a sample of them if it is given a sampler."""

    def __init__(self, sampler: TokenSampler | None = None) -> None:
        self.moments: ChannelMoments | None = None
        self.covariance = None if sampler is None else CovarianceSum()
        self._sampler = sampler
        self.paused = False

    def see(self, values: Tensor) -> None:
        """Take in values, channels last; nothing while it is paused."""
        if self.paused:
            return
        rows = values.detach().reshape(-1, values.shape[-1])
        seen = self.moments
        batch = channel_moments(rows, None if seen is None else seen.mean)
        self.moments = batch if seen is None else seen.merge(batch)
        if self._sampler is not None and self.covariance is not None:
            self.covariance.add_(self._sampler.draw(rows))

    def watch_input(self, layer: nn.Module) -> RemovableHandle:
        """See what a layer reads from now on."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.see(args[0].movedim(channel_dim(module), -1))

        return layer.register_forward_pre_hook(hook)

    def watch_output(self, layer: nn.Module, first: int, channels: int) -> RemovableHandle:
        """See some of the channels that a layer makes from now on."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.see(output.movedim(channel_dim(module), -1)[..., first : first + channels])

        return layer.register_forward_hook(hook)


@contextmanager
def _observing(
    model: nn.Module, sites: Sequence[Site], sampler: TokenSampler | None, sums: SensitivitySums | None
) -> Iterator[dict[str, Observer]]:
    observers = {name: Observer(sampler) for site in sites for name in observed_names(site)}
    handles = []
    for site in sites:
        if site.kind == "query_key":
            for name, (layer, first) in zip(observed_names(site), site.rows, strict=True):
                handles.append(observers[name].watch_output(model.get_submodule(layer), first, site.hidden))
        else:
            handles.append(observers[site.name].watch_input(model.get_submodule(site.consumer)))
    try:
        if sums is not None:
            handles += sums.watch(model)
        # Gradients are wanted of the layers' outputs alone, also where the caller has frozen the model.
        with evaluation_mode(model), frozen(model), torch.set_grad_enabled(sums is not None):
            yield observers
    finally:
        for handle in handles:
            handle.remove()


def _show(model: nn.Module, pixels: Tensor, sums: SensitivitySums | None, observers: Collection[Observer]) -> None:
    if sums is None:
        model(pixels)
        return
    logits = logits_of(model(pixels.requires_grad_()))
    # Gradient checkpointing runs layers again in the backward pass: nothing must be seen twice.
    for observer in observers:
        observer.paused = True
    sums.see(logits)
    for observer in observers:
        observer.paused = False


def collect_statistics(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    data: str = "",
    covariance: bool = False,
    tokens: TokenSample | None = None,
    sensitivity: Draws | None = None,
    pivots: Mapping[str, Tensor] | None = None,
) -> Statistics:
    """Observe what reaches each site's consumer over all batches, in evaluation mode.

    Args:
        model: The dense model; left as it was.
        sites: From `find_sites`.
        batches: Image tensors "batch channels height width", or tuples that begin with one (labels are not read).
        device: Where the images go; by default where the model is.
        data: Fingerprint of the images, kept so that a saved file is not used for other data.
        covariance: Also collect the covariance of the channels of each site, for the refit. It takes
            `covariance_bytes` on the device, and with all tokens about as much time as the model itself.
        tokens: The tokens that count for the covariance; by default all. Means and variances are of all tokens.
        sensitivity: Also collect the sensitivity of each MLP site, with these random numbers; by default not. It
            takes a backward pass, with the activations of a batch in memory, and `sensitivity_bytes` on the device.
        pivots: Site name -> what the channels of the sensitivity are counted from, near their means; by default the
            mean of the first batch. Passes that are merged give what one would only if they have the same.

    Raises:
        InputError: No image came, a site saw a value that is not finite, or it has no sensitivity.

    Example:
        >>> statistics = vbp.collect_statistics(model, sites, [images])
    """
    target = torch.device(device) if device is not None else next(model.parameters()).device
    sample = TokenSample() if tokens is None else tokens
    sampler = TokenSampler(sample) if covariance else None
    sums = None if sensitivity is None else SensitivitySums(sites, sensitivity, pivots)
    images = 0
    with _observing(model, sites, sampler, sums) as observers:
        for batch in batches:
            pixels = batch if isinstance(batch, Tensor) else batch[0]
            if sampler is not None:
                sampler.begin(pixels.shape[0])
            _show(model, pixels.detach().to(target, non_blocking=True), sums, observers.values())
            images += pixels.shape[0]
    if images == 0:
        raise InputError("calibration needs at least one image, got none; check the training images")
    moments = {name: _finite(name, observer.moments) for name, observer in observers.items()}
    covariances = {}
    for name, observer in observers.items():
        if observer.covariance is not None:
            covariances[name] = _finite_covariance(name, observer.covariance)
    fraction = sample.fraction if covariance else 1.0
    found = {} if sums is None else sums.take()
    return Statistics(moments, images, model_fingerprint(model), data, covariances, fraction, found)


def _finite(name: str, moments: ChannelMoments | None) -> ChannelMoments:
    if moments is None:
        raise InputError(f"site {name} was never run during calibration; it cannot be pruned from statistics")
    found = moments.to("cpu")
    _check_finite(name, found.mean.isfinite() & found.m2.isfinite())
    return found


def _finite_covariance(name: str, running: CovarianceSum) -> ChannelCovariance:
    taken = running.take()
    assert taken is not None
    found = taken.to("cpu")
    # Products of large values overflow before the values themselves do.
    _check_finite(name, found.m2.isfinite().all(0))
    return found


def _check_finite(name: str, channels: Tensor) -> None:
    if bad := int((~channels).sum()):
        raise InputError(
            f"activations at site {name} must be finite, got NaN or infinity in {bad} channels during "
            "calibration; check the weights and the preprocessing, or run in float32"
        )
