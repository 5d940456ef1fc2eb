"""Costs of a model at other widths, without surgery: MACs and parameters computed, time by measured layers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from vbp.cost.macs import count_parameters, macs_by_module
from vbp.cost.timing import Clock
from vbp.pruning.plan import PruningPlan
from vbp.sites.layers import inner_channels, input_channels, output_channels
from vbp.sites.site import Site

# Measured on AVX-512: multiples of 8 cost nothing against larger ones, odd widths 9 to 21 % of an MLP
# (docs/export.md).
_CPU = 8

# Tensor cores work best on multiples of 128 bytes: 64 channels in half precision, 32 in TF32 (of float32).
# Source: NVIDIA, Matrix Multiplication Background User's Guide, "Requirements to use Tensor Cores".
_LINE_BYTES = 128

# A site that can choose among fewer widths than this is pruned too coarsely.
_CHOICES = 8


@dataclass(frozen=True)
class WidthCosts:
    """MACs and parameters of a model as functions of the widths of its sites.

    Rows and columns of a layer may belong to different sites: its cost goes with the product of what stays of both,
    so that costs are not always sums over sites. Exact but for products of an attention that are none of its own:
    MaxViT's relative positions (1e-5 of the model) are taken for such.

    `macs` and `params` are those of the dense model, for one image; `layers` those that make or read channels of
    sites. `single` maps the name of a site to the (MACs, parameters) that its channels alone decide about: norms,
    depthwise convolutions, bare parameters and products of an attention.
    """

    sites: tuple[Site, ...]
    macs: int
    params: int
    layers: Mapping[str, LayerCost]
    single: Mapping[str, tuple[float, float]]

    @staticmethod
    def of(model: nn.Module, sites: Sequence[Site], example: Tensor) -> WidthCosts:
        """Count a dense model, which stays as it was."""
        macs = macs_by_module(model, example)
        layers: dict[str, LayerCost] = {}
        single = {}
        for site in sites:
            for name in site.layers:
                layers[name] = _layer(model, name, macs)
            inside = [(name, model.get_submodule(name)) for name in site.inner]
            share = {name: site.hidden / inner_channels(inner) for name, inner in inside}
            products = _attention_products(model, site, macs) if site.kind != "mlp" else 0
            single[site.name] = (
                sum(macs.get(name, 0) * share[name] for name in site.inner) + products,
                sum(count_parameters(inner) * share[name] for name, inner in inside)
                + sum(model.get_parameter(name).numel() for name in site.parameters),
            )
        for site in sites:
            for name in site.producers:
                layers[name].rows.append(site.name)
            for reader in site.readers:
                layers[reader.layer].columns.append(site.name)
        return WidthCosts(tuple(sites), macs[""], count_parameters(model), layers, single)

    def of_site(self, site: Site) -> tuple[int, int]:
        """Return the MACs and parameters that would go with all channels of a site, and with no other's."""
        macs, params = self.single[site.name]
        for name in site.producers:
            layer = self.layers[name]
            macs += layer.macs * site.hidden / layer.outputs
            params += (layer.weights + layer.bias) * site.hidden / layer.outputs
        for reader in site.readers:
            layer = self.layers[reader.layer]
            macs += layer.macs * site.hidden / layer.inputs
            params += layer.weights * site.hidden / layer.inputs
        return round(macs), round(params)

    def macs_of(self, plan: PruningPlan) -> int:
        """Return the MACs of one image under a plan."""
        removed = _removed(plan)
        saved = sum(layer.macs * (1 - math.prod(layer.shares(removed))) for layer in self.layers.values())
        for site in self.sites:
            saved += self.single[site.name][0] * removed.get(site.name, 0) / site.hidden
        return round(self.macs - saved)

    def params_of(self, plan: PruningPlan, *, compensated: bool = False) -> int:
        """Return the parameters under a plan; `compensated` counts biases that consumers gain by compensation."""
        removed = _removed(plan)
        saved = 0.0
        for layer in self.layers.values():
            rows, columns = layer.shares(removed)
            saved += layer.weights * (1 - rows * columns) + layer.bias * (1 - rows)
            if compensated and not layer.bias and any(removed.get(name) for name in layer.columns):
                saved -= layer.outputs * rows
        for site in self.sites:
            saved += self.single[site.name][1] * removed.get(site.name, 0) / site.hidden
        return round(self.params - saved)


@dataclass(frozen=True)
class LayerCost:
    """A `Linear` or `Conv2d`: its dense cost, and the names of the sites whose channels its rows and columns are.

    A site that has several runs of rows in the layer stands in `rows` as often.
    """

    macs: int
    weights: int
    bias: int
    outputs: int
    inputs: int
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    def shares(self, removed: Mapping[str, int]) -> tuple[float, float]:
        """Return the share of the rows, and that of the columns, that stay."""
        return (
            1 - sum(removed.get(name, 0) for name in self.rows) / self.outputs,
            1 - sum(removed.get(name, 0) for name in self.columns) / self.inputs,
        )


@dataclass(frozen=True)
class TimingConditions:
    """Conditions under which times hold, and under no others; `threads` are those of a CPU, 0 on a GPU.

    `model` is a fingerprint of the names and shapes of the dense model's weights, and of its sites. Widths between
    the multiples of `round_to` take longer.
    """

    hardware: str
    threads: int
    precision: str
    batch: tuple[int, ...]
    torch: str
    model: str
    round_to: int
    clock: Clock


@dataclass(frozen=True)
class TimedUnit:
    """Names of sites that are timed together: one of an MLP, or the values, queries and keys of an attention.

    The first one's width stands for all; `curve` is the first site of the unit that was timed for all of this shape.
    """

    sites: tuple[str, ...]
    curve: str


@dataclass(frozen=True)
class LayerTimes:
    """Times of a dense model, and of its units at several widths: plain data that any process can use.

    The `curves` are (width, milliseconds of a batch) ascending in both, up to the dense width.
    """

    conditions: TimingConditions
    dense_ms: float
    units: tuple[TimedUnit, ...]
    curves: Mapping[str, tuple[tuple[int, float], ...]]

    def predicted_ms(self, plan: PruningPlan) -> float:
        """Return what a batch would take under a plan: the dense time less what each unit saves.

        Between two measured widths the time is interpolated; below the narrowest one it goes on in a straight line.
        """
        return self.dense_ms - sum(self._saved_ms(unit, _width(unit, plan.widths)) for unit in self.units)

    def saved_by_channel(self) -> dict[str, float]:
        """Return the milliseconds that a channel of each site saves on average, from its widest to narrowest time."""
        saved = {}
        for unit in self.units:
            (narrow, least), (wide, most) = self.curves[unit.curve][0], self.curves[unit.curve][-1]
            channel = (most - least) / max(1, wide - narrow)
            saved.update({name: channel / len(unit.sites) for name in unit.sites})
        return saved

    def share(self, plan: PruningPlan) -> float:
        """Return what a plan would take as a share of the dense time."""
        return self.predicted_ms(plan) / self.dense_ms

    def _saved_ms(self, unit: TimedUnit, width: float) -> float:
        points = self.curves[unit.curve]
        (x0, y0), (x1, y1) = points[0], points[min(1, len(points) - 1)]
        if width < x0 and x1 > x0:
            return points[-1][1] - max(0.0, y0 - (x0 - width) * (y1 - y0) / (x1 - x0))
        return points[-1][1] - float(np.interp(width, [x for x, _ in points], [y for _, y in points]))


def _width(unit: TimedUnit, widths: Mapping[str, tuple[int, int]]) -> float:
    """Return the width of a unit: that of its first site, if all sites kept their mean share."""
    shares = [kept / total for kept, total in (widths[name] for name in unit.sites)]
    return statistics.fmean(shares) * widths[unit.sites[0]][1]


def recommended_round_to(device: torch.device, dtype: torch.dtype = torch.float32, sites: Sequence[Site] = ()) -> int:
    """Return the `round_to` that suits a device: a power of two.

    8 on a CPU; on a GPU as many channels as fill a line of memory, 64 in bfloat16 or float16 and 32 in float32; less
    where the narrowest site (in attention: its head) would have fewer than 8 widths to choose from. `dtype` is the
    type that the pruned model will compute in: that of autocast, if there is one.
    """
    suited = _LINE_BYTES // max(2, dtype.itemsize) if device.type == "cuda" else _CPU
    narrowest = min((site.hidden // site.heads for site in sites), default=suited * _CHOICES)
    while suited > 1 and suited * _CHOICES > narrowest:
        suited //= 2
    return suited


def _attention_products(model: nn.Module, site: Site, macs: Mapping[str, int]) -> float:
    """Return the MACs of the half of an attention's products, q k or softmax v, that runs over a site's channels."""
    block = site.producers[0]
    while block := block.rpartition(".")[0]:
        inside = model.get_submodule(block).named_modules()
        leaves = [f"{block}.{name}" for name, module in inside if not [*module.children()]]
        products = macs.get(block, 0) - sum(macs.get(name, 0) for name in leaves)
        if products > 0:
            return products / 2
    return 0.0


def _layer(model: nn.Module, name: str, macs: Mapping[str, int]) -> LayerCost:
    layer = model.get_submodule(name)
    weights = model.get_parameter(f"{name}.weight").numel()
    bias = count_parameters(layer) - weights
    return LayerCost(macs.get(name, 0), weights, bias, output_channels(layer), input_channels(layer))


def _removed(plan: PruningPlan) -> dict[str, int]:
    return {entry.site.name: entry.site.hidden - len(entry.keep) for entry in plan.sites}
