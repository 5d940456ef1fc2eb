"""What a configuration asks of a plan: its rules, its budget, and whether this model can meet it here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vbp.config import RunConfig
from vbp.cost import count_macs
from vbp.distributed import Processes
from vbp.errors import InputError
from vbp.layer_times import LayerTimes
from vbp.layer_timing import measure_layer_times
from vbp.precision import Precision
from vbp.rounding import recommended_round_to
from vbp.sites import Site
from vbp.targets import Target, neutral_plan

_log = logging.getLogger(__name__)

_CPU_LATENCY_MACS = 20_000_000_000


def plan_rules(
    config: RunConfig, sites: Sequence[Site], device: torch.device, precision: Precision
) -> dict[str, Any]:
    """Give what `make_plan` takes besides sites, scores, keep ratio and scope.

    Args:
        config: What is asked for.
        sites: From `find_sites`.
        device: Where the model runs, and will run.
        precision: Of its forward pass.
    """
    round_to = config.round_to
    if round_to == "auto":
        round_to = recommended_round_to(device, precision.dtype or torch.float32, sites)
        _log.info("round_to %d suits %s in %s", round_to, device.type, precision.dtype or torch.float32)
    return {
        "round_to": round_to,
        "min_keep_ratio": config.min_keep_ratio,
        "attn_keep_ratio": config.attn_keep_ratio,
    }


def find_target(
    config: RunConfig,
    processes: Processes,
    model: nn.Module,
    sites: Sequence[Site],
    example: Tensor,
    precision: Precision,
    rules: Mapping[str, Any],
    *,
    planned: bool = False,
) -> Target:
    """See whether the model can meet the budget; one of time is measured, by the main process for all.

    Where the plan is known already, of a run that goes on, nothing is timed: this device may be busier now, or idler.

    Raises:
        InputError: It cannot, or nothing would be removed.
    """
    budget, times = config.budget, None
    if budget.timed and not planned:
        times = processes.gather(
            _layer_times(config, model, sites, example, precision, rules["round_to"]) if processes.main else None
        )[0]
    target = Target.of(budget, model, sites, example, times, **rules)
    _check_removes(config, sites, target, rules)
    return target


def _layer_times(
    config: RunConfig, model: nn.Module, sites: Sequence[Site], example: Tensor, precision: Precision, round_to: int
) -> LayerTimes:
    batch = latency_batch(config, model, example)
    _log.info("timing the layers at several widths, batch %d", len(batch))
    times = measure_layer_times(model, sites, batch, precision=precision, round_to=round_to)
    _log.info("the dense model takes %.2f ms for a batch of %d", times.dense_ms, len(batch))
    return times


def latency_batch(config: RunConfig, model: nn.Module, example: Tensor) -> Tensor:
    """Give the batch to time: an evaluation batch on a GPU; on a CPU as many images as take about a second."""
    size = config.val_batch_size
    if config.latency_batch is not None:
        size = config.latency_batch
    elif example.device.type == "cpu":
        size = min(size, 32, max(1, _CPU_LATENCY_MACS // count_macs(model, example)))
    return example.repeat(size, 1, 1, 1)


def _check_removes(config: RunConfig, sites: Sequence[Site], target: Target, rules: Mapping[str, Any]) -> None:
    """Refuse settings under which nothing would go; how many channels go does not depend on their scores."""
    plan = neutral_plan(sites, keep_ratio=target.keep_ratio, **rules)
    asked = min(target.keep_ratio, config.attn_keep_ratio or 1.0)
    if asked < 1 and all(kept == total for kept, total in plan.widths.values()):
        raise InputError(
            f"keep_ratio {target.keep_ratio:g} with round_to {plan.round_to} and min_keep_ratio "
            f"{plan.min_keep_ratio} removes none of {plan.total} channels; lower keep_ratio or round_to"
        )
