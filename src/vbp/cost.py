"""What a model costs: MACs, parameters, latency; and what a plan saves before it is applied."""

from __future__ import annotations

import math
import statistics as stats
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vbp.modes import evaluation_mode
from vbp.plan import PruningPlan
from vbp.sites import Site, input_channels, output_channels
from vbp.tracing import channel_dim


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-accumulates of one image: matrix products, convolutions, attention, normalisation.

    Follows fvcore's convention, in which the VBP paper's figures are given: a normalised element counts five
    (four without affine parameters); activations, softmax and additions count nothing.

    Args:
        model: Counted in evaluation mode; left as it was.
        example: An input batch "batch channels height width" on the model's device.
    """
    norms: dict[Any, Callable[..., int]] = {
        torch.ops.aten.native_layer_norm: _layer_norm_flops,
        torch.ops.aten.native_group_norm: _group_norm_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=norms)
    with evaluation_mode(model), torch.no_grad(), counter:
        model(example)
    return round(counter.get_total_flops() / 2 / example.shape[0])


def _layer_norm_flops(
    shape: Sequence[int], normalized: Sequence[int], weight: Sequence[int] | None, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(shape) * (4 if weight is None else 5)


def _group_norm_flops(shape: Sequence[int], weight: Sequence[int] | None, *_: Any, **__: Any) -> int:
    return 2 * math.prod(shape) * (4 if weight is None else 5)


@dataclass(frozen=True)
class ChannelCost:
    """What one hidden channel of a site costs: MACs an image, and parameters."""

    macs: int
    params: int


def channel_costs(model: nn.Module, sites: Sequence[Site], example: Tensor) -> dict[str, ChannelCost]:
    """Measure, by one forward pass, what a hidden channel of each site costs.

    Args:
        model: The dense model; run in evaluation mode and left as it was.
        sites: From `find_sites`.
        example: An input batch on the model's device.
    """
    positions: dict[str, int] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            hidden = args[0].shape[channel_dim(module)]
            positions[name] = args[0].numel() // hidden // example.shape[0]

        return hook

    handles = [model.get_submodule(site.consumer).register_forward_pre_hook(observe(site.name)) for site in sites]
    try:
        with evaluation_mode(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return {site.name: _channel_cost(model, site, positions[site.name]) for site in sites}


def _channel_cost(model: nn.Module, site: Site, positions: int) -> ChannelCost:
    weights, params = output_channels(model.get_submodule(site.consumer)), 0
    for name in site.producers:
        producer = model.get_submodule(name)
        weights += input_channels(producer)
        params += int(producer.bias is not None)
    return ChannelCost(positions * weights, weights + params)


@dataclass(frozen=True)
class PlanCost:
    """MACs and parameters of a model before and after a plan."""

    macs: tuple[int, int]
    params: tuple[int, int]


def plan_cost(model: nn.Module, plan: PruningPlan, example: Tensor) -> PlanCost:
    """Say what a plan saves, before it is applied to the (dense) model."""
    costs = channel_costs(model, [entry.site for entry in plan.sites], example)
    gone = {entry.site.name: entry.site.hidden - len(entry.keep) for entry in plan.sites}
    macs, params = count_macs(model, example), count_parameters(model)
    return PlanCost(
        (macs, macs - sum(costs[name].macs * number for name, number in gone.items())),
        (params, params - sum(costs[name].params * number for name, number in gone.items())),
    )


def format_plan(plan: PruningPlan, cost: PlanCost) -> str:
    """Give a plan as a table: kept of total channels a site, and the MACs and parameters that it saves."""
    width = max(len(name) for name in plan.widths)
    rows = [
        f"  {name:<{width}}  {kept:>6} of {total:<6} {kept / total:6.1%}"
        for name, (kept, total) in plan.widths.items()
    ]
    rows.append(f"  {'all':<{width}}  {plan.kept:>6} of {plan.total:<6} {plan.kept / plan.total:6.1%}")
    if plan.kept != plan.requested:
        rows.append(
            f"  asked for {plan.requested}: {plan.kept - plan.requested:+d} through round_to {plan.round_to} "
            f"and min_keep_ratio {plan.min_keep_ratio}"
        )
    for label, (before, after) in (("MACs", cost.macs), ("parameters", cost.params)):
        rows.append(f"  {label} {format_count(before)} -> {format_count(after)} ({1 - after / before:.1%} saved)")
    return f"plan ({plan.scope}, keep_ratio {plan.keep_ratio}):\n" + "\n".join(rows)


def format_count(number: int) -> str:
    """Give a number of MACs or parameters as people read it: 1.26 G, 5.72 M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def measure_latency_ms(
    models: Mapping[str, nn.Module], example: Tensor, *, rounds: int = 15, warmup: int = 2, budget_s: float = 20
) -> dict[str, float]:
    """Time one forward pass of each model, taking turns so that a drift of the machine meets all alike.

    Args:
        models: In evaluation mode, on the device of `example`.
        example: The batch.
        rounds: Timed passes of each model.
        warmup: Passes of each model before them.
        budget_s: Seconds after which no further round begins; three are timed in any case.

    Returns:
        Model name -> median milliseconds for the whole batch.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    begin = time.perf_counter()
    with torch.inference_mode():
        for turn in range(warmup + rounds):
            if turn >= warmup + 3 and time.perf_counter() - begin > budget_s:
                break
            for name, model in models.items():
                _synchronize(example.device)
                start = time.perf_counter()
                model(example)
                _synchronize(example.device)
                if turn >= warmup:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: stats.median(values) for name, values in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
