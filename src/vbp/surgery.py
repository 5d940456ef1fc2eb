"""Apply a plan to a model: the consumer is compensated, then the channels are cut out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch_pruning as tp
from torch import Tensor, nn

from vbp.compensation import mean_shift
from vbp.errors import InputError
from vbp.plan import PruningPlan, SitePlan
from vbp.sites import input_channels, output_channels


def prune_(model: nn.Module, plan: PruningPlan, means: Mapping[str, Tensor] | None = None) -> None:
    """Cut the channels that a plan removes out of a model, in place.

    Args:
        model: A model that has the plan's sites at their full width.
        plan: From `make_plan`, or read back.
        means: Site name -> mean of each channel: what a removed channel contributed on average moves into the
            consumer's bias. Without them nothing is compensated.

    Raises:
        InputError: The plan does not fit the model, or means are missing; the model is then untouched.

    Source: VBP paper, sections 3.2 and 3.3.
    """
    for entry in plan.sites:
        _check_fits(model, entry, means)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for entry in plan.sites:
        if len(entry.keep) < entry.site.hidden:
            _prune_site_(model, entry, None if means is None else means[entry.site.name])
    for name in frozen:
        # Torch-Pruning makes new parameters, which would learn.
        model.get_parameter(name).requires_grad_(False)


def _check_fits(model: nn.Module, entry: SitePlan, means: Mapping[str, Tensor] | None) -> None:
    site = entry.site
    try:
        widths = [output_channels(model.get_submodule(name)) for name in site.producers]
        widths.append(input_channels(model.get_submodule(site.consumer)))
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"the plan's site {site.name} does not exist in {type(model).__name__} ({error}); "
            "give the model that the plan was made for"
        ) from error
    if any(width != site.hidden for width in widths):
        raise InputError(
            f"the plan's site {site.name} must have {site.hidden} channels, got widths {widths}; give the dense "
            "model that the plan was made for"
        )
    if means is not None and (site.name not in means or means[site.name].shape != (site.hidden,)):
        raise InputError(
            f"means of site {site.name} must be {site.hidden} numbers, got "
            f"{tuple(means[site.name].shape) if site.name in means else 'none'}; collect its statistics"
        )


def _prune_site_(model: nn.Module, entry: SitePlan, mean: Tensor | None) -> None:
    consumer = model.get_submodule(entry.site.consumer)
    removed = list(entry.removed)
    if mean is not None:
        assert isinstance(consumer.weight, Tensor)
        _add_to_bias_(consumer, mean_shift(consumer.weight, mean, torch.tensor(removed)))
    for name in entry.site.producers:
        producer = model.get_submodule(name)
        if isinstance(producer, nn.Conv2d):
            tp.prune_conv_out_channels(producer, removed)
        else:
            tp.prune_linear_out_channels(producer, removed)
    if isinstance(consumer, nn.Conv2d):
        tp.prune_conv_in_channels(consumer, removed)
    else:
        tp.prune_linear_in_channels(consumer, removed)


def _add_to_bias_(layer: nn.Module, shift: Tensor) -> None:
    """Add to a layer's bias; a layer without one gains it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    bias = layer.bias
    if bias is None:
        layer.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
        return
    assert isinstance(bias, nn.Parameter)
    with torch.no_grad():
        # One rounding to the bias's own precision, not two.
        bias.copy_((bias.double() + shift.to(bias.device)).to(bias.dtype))
