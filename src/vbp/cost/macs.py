"""Count the MACs and parameters of a model, and what a plan saves before it is applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vbp.pruning.plan import PruningPlan
from vbp.pruning.surgery import cut_
from vbp.runtime.forward import copy_model, evaluation_mode, fitted
from vbp.runtime.tables import format_count, text_table


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model.

    Example:
        >>> vbp.count_parameters(model)
        32455
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-accumulates of one image: matrix products, convolutions, attention, normalisation.

    Follows fvcore's convention, in which the VBP paper's figures are given: a normalised element counts five
    (four without affine parameters); activations, softmax and additions count nothing. `nn.MultiheadAttention` and
    `nn.TransformerEncoder` are counted on their plain path, whatever fused kernel they would run by.

    Args:
        model: Counted in evaluation mode; left as it was.
        example: An input batch "batch channels height width" on the model's device.

    Example:
        >>> vbp.count_macs(model, example)
        566912
    """
    return macs_by_module(model, example)[""]


def macs_by_module(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Count like `count_macs`, for each module by its dotted name; the model itself has the name "".

    A module counts what runs inside its call, so one contains its children. Modules that cost nothing are left out.
    """
    counted: dict[Any, Callable[..., int]] = {
        torch.ops.aten.native_layer_norm: _layer_norm_flops,
        torch.ops.aten.native_group_norm: _group_norm_flops,
        # Before 2.15 torch's counter knows attention on GPUs alone.
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    # The counter follows every input back to its origin; a bare parameter that is passed to a module has none.
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with evaluation_mode(model), _plain_attention(), torch.no_grad(), counter:
        torch.func.functional_call(model, weights, (fitted(model, example),))
    root = type(model).__name__
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    by_module = {
        name.removeprefix(f"{root}."): round(number / 2 / example.shape[0])
        for name, number in flops.items()
        if name.startswith(f"{root}.")
    }
    return {"": round(counter.get_total_flops() / 2 / example.shape[0]), **by_module}


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep torch's own attention and encoder layers off their fused kernels, which the counter does not know."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _layer_norm_flops(
    shape: Sequence[int], normalized: Sequence[int], weight: Sequence[int] | None, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(shape) * (4 if weight is None else 5)


def _group_norm_flops(shape: Sequence[int], weight: Sequence[int] | None, *_: Any, **__: Any) -> int:
    return 2 * math.prod(shape) * (4 if weight is None else 5)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    (*stack, tokens, width), others, outputs = query, key[-2], value[-1]
    return 2 * math.prod(stack) * tokens * others * (width + outputs)


@dataclass(frozen=True)
class PlanCost:
    """MACs and parameters of a model before and after a plan.

    Example:
        >>> vbp.plan_cost(model, plan, example).params
        (32455, 24135)
    """

    macs: tuple[int, int]
    params: tuple[int, int]


def plan_cost(model: nn.Module, plan: PruningPlan, example: Tensor) -> PlanCost:
    """Return what a plan saves, before it is applied: measured on a copy of the (dense) model.

    Raises:
        InputError: The plan does not fit the model.

    Example:
        >>> vbp.plan_cost(model, plan, example).macs
        (566912, 427648)
    """
    pruned = copy_model(model)
    cut_(pruned, plan)
    return PlanCost(
        (count_macs(model, example), count_macs(pruned, example)), (count_parameters(model), count_parameters(pruned))
    )


def format_plan(plan: PruningPlan, cost: PlanCost) -> str:
    """Return a plan as a table: kept of total channels a site, and the MACs and parameters that it saves.

    Example:
        >>> print(vbp.format_plan(plan, vbp.plan_cost(model, plan, example)))
        plan (global, keep_ratio 0.5):
        ...
    """
    label = "all" if plan.attn_keep_ratio is None else "all MLPs"
    widths = {**plan.widths, label: (plan.kept, plan.total)}
    table = text_table((name, f"{kept} of {total}", f"{kept / total:.1%}") for name, (kept, total) in widths.items())
    rows = [f"  {line}" for line in table.splitlines()]
    if plan.kept != plan.requested:
        equal = "equal widths, " if plan.scope == "equal" else ""
        rows.append(
            f"  asked for {plan.requested}: {plan.kept - plan.requested:+d} through {equal}round_to {plan.round_to} "
            f"and min_keep_ratio {plan.min_keep_ratio}"
        )
    for label, (before, after) in (("MACs", cost.macs), ("parameters", cost.params)):
        rows.append(f"  {label} {format_count(before)} -> {format_count(after)} ({1 - after / before:.1%} saved)")
    attention = "" if plan.attn_keep_ratio is None else f", attn_keep_ratio {plan.attn_keep_ratio}"
    return f"plan ({plan.scope}, keep_ratio {plan.keep_ratio}{attention}):\n" + "\n".join(rows)
