"""Running statistics of what one layer reads, or of some of the channels that it makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vbp.covariance import CovarianceSum
from vbp.moments import ChannelMoments, channel_moments
from vbp.sampling import TokenSampler
from vbp.tracing import channel_dim


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
