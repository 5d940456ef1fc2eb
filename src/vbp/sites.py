"""Find the sites of a model: the hidden layers that can lose channels."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vbp.errors import InputError
from vbp.tracing import Flow, Trace, trace_flows

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """A hidden layer `h = act(producer(x)); y = consumer(h)`, by dotted module names.

    Source: VBP paper (arXiv 2507.12988), section 3.
    """

    producers: tuple[str, ...]
    consumer: str
    hidden: int

    @property
    def name(self) -> str:
        """Give the key of this site in statistics, plans and reports: the layer whose outputs are pruned."""
        return self.producers[0]


def output_channels(layer: nn.Module) -> int:
    """Give the number of output channels of a `Linear` or `Conv2d`."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    raise TypeError(f"layer must be Linear or Conv2d, got {type(layer).__name__}")


def input_channels(layer: nn.Module) -> int:
    """Give the number of input channels of a `Linear` or `Conv2d`."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels
    raise TypeError(f"layer must be Linear or Conv2d, got {type(layer).__name__}")


def find_sites(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> tuple[Site, ...]:
    """Find all pairs of linear or 1x1-convolution layers around an activation, in the order in which they run.

    The pairs are found by following one forward pass, so names and nesting of the modules do not matter. A pair
    is left out, with a log line saying why, where its hidden channels are used anywhere else.

    Args:
        model: Any image classifier.
        example_inputs: An input of the model, "1 channels height width", on the model's device.

    Raises:
        InputError: The model has no such pair.
    """
    trace = trace_flows(model, example_inputs)
    sites = []
    for flow in trace.flows:
        if not (flow.consumers and flow.activated):
            continue
        if reason := _why_unfit(flow, trace):
            _log.info("%s -> %s is not a site: %s", flow.producer, flow.consumers[0], reason)
            continue
        hidden = output_channels(model.get_submodule(flow.producer))
        sites.append(Site((flow.producer,), flow.consumers[0], hidden))
    if not sites:
        raise InputError(
            f"no prunable site in {type(model).__name__}: looked for a Linear or 1x1 Conv2d layer whose output "
            "passes through an activation (GELU, ReLU, SiLU, ...) and then into exactly one other such layer, as "
            "in the MLP of a ViT, DeiT, Swin or ConvNeXt block; give a model that has such layers"
        )
    return tuple(sites)


def _why_unfit(flow: Flow, trace: Trace) -> str:
    if flow.leaks:
        return f"its hidden channels are also used by {', '.join(sorted(set(flow.leaks)))}"
    if len(flow.consumers) > 1:
        return f"its hidden channels are read by {', '.join(flow.consumers)}"
    repeated = [name for name in (flow.producer, flow.consumers[0]) if trace.calls[name] > 1]
    if repeated:
        return f"{', '.join(repeated)} runs more than once in a forward pass"
    return ""
