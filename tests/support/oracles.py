"""What the dense model computes, for comparison."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vbp import (
    PruningPlan,
)
from vbp.method.covariance import ChannelCovariance
from vbp.runtime.forward import call_values, logits_of


def hidden_values(model: nn.Module, consumer: str, images: Tensor) -> Tensor:
    """Return what a consumer reads, "images positions hidden"."""
    seen: list[Tensor] = []
    layer = model.get_submodule(consumer)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    last = seen[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else seen[0]
    return last.reshape(len(images), -1, last.shape[-1])


def as_of_many(covariance: ChannelCovariance, samples: int = 10**12) -> ChannelCovariance:
    """Return moments with the same mean and covariance as if of so many samples: any ridge may then be as small."""
    return ChannelCovariance(samples, covariance.mean, covariance.covariance * (samples - 1))


def made_values(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """Return what a layer makes, as it makes it."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    return seen[0]


def clamped_logits(model: nn.Module, plan: PruningPlan, values: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Run the dense model with the removed channels held at fixed values."""
    handles = []
    for entry, reader in [(one, reader) for one in plan.sites for reader in one.site.readers]:
        layer = model.get_submodule(reader.layer)
        removed = list(entry.removed)
        columns, value = [reader.first + channel for channel in removed], values[reader.key][removed]

        def clamp(module, args, kwargs, columns=columns, value=value):  # type: ignore[no-untyped-def]
            hidden = call_values(args, kwargs)[0].clone()
            if isinstance(module, nn.Conv2d):
                hidden[:, columns] = value[:, None, None].to(hidden)
            else:
                hidden[..., columns] = value.to(hidden)
            return (hidden,), {}

        handles.append(layer.register_forward_pre_hook(clamp, with_kwargs=True))
    with torch.no_grad():
        output = model(images)
    for handle in handles:
        handle.remove()
    return output if isinstance(output, Tensor) else logits_of(output)
