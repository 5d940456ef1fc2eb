"""`VarianceImportance`: score channels by the variance of the value that reaches their consumers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch_pruning as tp
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.moments import ChannelMoments, RunningMoments
from vbp.runtime.forward import evaluation_mode, hooked
from vbp.sites.layers import input_channels, output_channels
from vbp.statistics.batches import images_for
from vbp.statistics.collect import Observer
from vbp.torch_pruning.compensate import ChannelMeans, by_layer, without
from vbp.torch_pruning.graph import (
    Coupling,
    Edge,
    build_graph,
    canonical_roots,
    check_indices,
    logged_warnings,
    read_group,
)

_log = logging.getLogger(__name__)


def finish(running: RunningMoments, name: str) -> ChannelMoments:
    """Return the moments seen at a layer, on the CPU.

    Raises:
        InputError: The layer never ran, or a value is not finite.
    """
    if running.moments is None:
        raise InputError(
            f"{name} was traced but never ran during calibration; the statistics of its input are missing"
        )
    moments = running.moments.to("cpu")
    bad = int((~(moments.mean.isfinite() & moments.m2.isfinite())).sum())
    if bad or moments.count < 2:
        raise InputError(
            f"activations at {name} must be finite and at least 2 samples, got {bad} channels with "
            f"NaN or infinity and {moments.count} samples; check weights and preprocessing, or give more images"
        )
    return moments


_REMEDY = (
    "call collect_statistics on this model as it is now (VBPPruner carries them through its own steps), or set "
    "variance and means to those of another process, by layer or by dotted name"
)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
Target = tuple[nn.Module, Callable[[Tensor], Tensor]]


class VarianceImportance(tp.importance.Importance):  # type: ignore[misc]
    """Score channels by the variance of their activation, for any Torch-Pruning pruner.

    The activation is read where it is consumed: at the input of the `Linear` or convolution layers whose input
    channels go with the group, after whatever stands between (activation, norm, dropout, pooling, reshape).

    Attributes:
        variance: Layer whose output channels are pruned -> variance of each; several consumers: their mean. Scores
            come from it alone. It and `means` may be set, by layer or dotted name, to what another process collected.
        means: Layer whose output channels are pruned -> mean of each; `means.inputs` has them by consumer.

    Source: VBP paper, sections 3.1 and 3.2.
    """

    def __init__(
        self,
        norm_per_layer: bool = False,
        target_layers: Sequence[Target] | None = None,
        *,
        eps: float = 0.0,
        importance_mode: Literal["variance"] = "variance",
    ) -> None:
        """Make an importance without statistics.

        Args:
            norm_per_layer: Divide the scores of a group by their mean, so that groups of different scale compare.
            target_layers: Pairs (layer, function): take the statistics of `function(output of layer)` in place of
                those at the consumers of that layer's channels.
            eps: Added to the mean that `norm_per_layer` divides by.
            importance_mode: What scores are made of.

        Raises:
            InputError: The mode is another.
        """
        if importance_mode != "variance":
            raise InputError(f"importance_mode must be 'variance', got {importance_mode!r}; scores are variances")
        self.norm_per_layer, self.eps = norm_per_layer, eps
        self.target_layers = list(target_layers or ())
        self.variance: dict[nn.Module, Tensor] = {}
        self.means = ChannelMeans({})

    def collect_statistics(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        device: torch.device | str | None = None,
        *,
        ignored_layers: Sequence[nn.Module] = (),
        target_layers: Sequence[Target] | None = None,
        max_batches: int | None = None,
    ) -> None:
        """Observe the model over all batches, in evaluation mode and without gradients; replaces earlier statistics.

        Args:
            model: The model to be pruned; left as it was.
            loader: Images, with labels or without, as `pixels_of` takes them.
            device: Where the images go; by default where the model is.
            ignored_layers: Layers not to be pruned: what only they would need is not observed.
            target_layers: As for the class, which are then not used.
            max_batches: Read no more batches than these; all by default.

        Raises:
            InputError: There is no image or `max_batches` is below 1, the model cannot be traced, a layer never ran,
                or a value is not finite.
        """
        if max_batches is not None and max_batches < 1:
            raise InputError(f"max_batches must be at least 1, got {max_batches}; leave it out to read all batches")
        batches = images_for(model, itertools.islice(loader, max_batches), device)
        first = next(batches, None)
        if first is None:
            raise InputError("calibration needs at least one image, got none; check the loader")
        graph = build_graph(model, first[:1])
        ignored = [module for layer in ignored_layers for module in layer.modules()]
        with logged_warnings(model):
            groups = [group for group in graph.get_all_groups(ignored_layers=ignored) if _fits(group)]
            canonical = [canonical_roots(group) for group in groups]
        couplings = [read_group(group) for group in groups]
        names = {module: name for name, module in model.named_modules()}
        inputs = {edge.layer: Observer() for coupling in couplings for edge in coupling.consumers}
        targets = {layer: (Observer(), part) for layer, part in target_layers or self.target_layers}
        read = [(layer, seen.of_input) for layer, seen in inputs.items()]
        made = [(layer, seen.of_output(part)) for layer, (seen, part) in targets.items()]
        with hooked(made, before=read), evaluation_mode(model), torch.no_grad():
            for images in itertools.chain([first], batches):
                model(images)
        moments = {layer: finish(seen, names[layer]) for layer, seen in inputs.items()}
        own = {layer: finish(seen, names[layer]) for layer, (seen, _) in targets.items()}
        _check_targets(own, couplings, names)
        self._summarise(couplings, canonical, moments, own)

    def __call__(self, group: Any) -> Float[Tensor, "roots"] | None:
        """Score the root channels of a `tp.dependency.Group` by `variance`; `None` where no layer reads them.

        Raises:
            InputError: `variance` has no entry for the layers that write the group, or one of another width.
        """
        coupling, names = read_group(group), group._DG._module2name
        if not coupling.consumers:
            return None
        self.variance = by_layer(self.variance, group._DG.model)
        self.means = ChannelMeans.of(self.means, group._DG.model)
        scores, scored = self._scores(coupling, names)
        read = torch.zeros_like(scored)
        for edge in coupling.consumers:
            read[edge.roots] = True
            if not scored[edge.roots].all():
                raise InputError(
                    f"statistics at the input of {names[edge.layer]} must cover {input_channels(edge.layer)} "
                    f"channels, got none; {_REMEDY}"
                )
        whole = torch.equal(coupling.channels, torch.arange(len(group[0].idxs)))
        canonical = canonical_roots(group) if whole else coupling.channels
        scores, read = scores[canonical], read[canonical]
        if self.norm_per_layer:
            mean = scores[read].mean() + self.eps
            scores = scores / torch.where(mean > 0, mean, torch.ones_like(mean))
        return scores

    def _scores(self, coupling: Coupling, names: Mapping[nn.Module, str]) -> tuple[Float[Tensor, "roots"], Tensor]:
        """Return the variance by root, of the first producer that has one, and which roots have one."""
        edges = _written(coupling)
        size = 1 + max(int(edge.roots.max()) for edge in (*edges, *coupling.consumers) if len(edge.roots))
        scores, scored = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.bool)
        for edge in reversed(edges):
            values = self.variance.get(edge.layer)
            if values is None:
                continue
            width = _width(edge)
            if len(values) != width if isinstance(edge.layer, _LAYERS) else len(values) < width:
                raise InputError(
                    f"the variance of {names[edge.layer]} must cover {width} channels, got {len(values)}; {_REMEDY}"
                )
            scores[edge.roots] = values.detach().double().cpu()[edge.channels]
            scored[edge.roots] = True
        return scores, scored

    def state_by_name(self, model: nn.Module) -> dict[str, Any]:
        """Return the statistics as plain data keyed by dotted module names, for `torch.save` or another process."""
        names = {module: name for name, module in model.named_modules()}
        means = ChannelMeans.of(self.means, model)
        parts = {"variance": by_layer(self.variance, model), "means": means, "inputs": means.inputs}
        return {part: {names[layer]: value for layer, value in values.items()} for part, values in parts.items()}

    def load_by_name(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Take what `state_by_name` returned, for a model of the same structure and widths.

        Raises:
            InputError: The data is of another form, or names a layer that the model does not have.
        """
        try:
            variance, means, inputs = (by_layer(state[part], model) for part in ("variance", "means", "inputs"))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"statistics must be what state_by_name returned, got {error!r} at reading") from error
        self.variance, self.means = variance, ChannelMeans(means, inputs)

    def cut_(self, coupling: Coupling) -> None:
        """Drop the channels of a group that is about to be pruned, so that the statistics follow the model."""
        self.means.cut_(coupling)
        for edge in _written(coupling):
            if edge.layer in self.variance:
                self.variance[edge.layer] = without(self.variance[edge.layer], edge.channels)

    def _summarise(
        self,
        couplings: Sequence[Coupling],
        canonical: Sequence[Tensor],
        inputs: Mapping[nn.Module, ChannelMoments],
        own: Mapping[nn.Module, ChannelMoments],
    ) -> None:
        """Take the statistics of the layers that read channels, or `own` ones, for the layers that write them."""
        variances = {layer: moments.variance for layer, moments in inputs.items()}
        self.variance = {}
        self.means = ChannelMeans({}, {layer: moments.mean for layer, moments in inputs.items()})
        for coupling, roots in zip(couplings, canonical, strict=True):
            if not coupling.consumers:
                continue
            for entries, read, part in (
                (self.variance, variances, "variance"),
                (self.means, self.means.inputs, "mean"),
            ):
                by_root = _by_root(coupling, read)
                for made in (edge for edge in coupling.producers if edge.layer in own):
                    by_root[made.roots] = getattr(own[made.layer], part)[made.channels]
                    for edge in coupling.consumers:
                        there = torch.isin(edge.roots, made.roots)
                        read[edge.layer][edge.channels[there]] = by_root[edge.roots[there]]
                for edge in _written(coupling):
                    entries.setdefault(edge.layer, torch.zeros(_width(edge), dtype=torch.float64))
                    entries[edge.layer][edge.channels] = by_root[roots][edge.roots]


def _fits(group: Any) -> bool:
    """Return whether the channel numbers of a group fit its layers; the pruner refuses those that do not."""
    try:
        check_indices(group)
    except InputError as error:
        _log.info("no statistics: %s", error)
        return False
    return True


def _check_targets(
    own: Mapping[nn.Module, ChannelMoments], couplings: Sequence[Coupling], names: Mapping[nn.Module, str]
) -> None:
    known = {edge.layer for coupling in couplings if coupling.consumers for edge in coupling.producers}
    for layer, moments in own.items():
        if layer not in known:
            raise InputError(
                f"target_layers must be layers whose output channels can be pruned, got {names[layer]!r}; "
                "name the Linear or convolution layer and give the activation as the function"
            )
        width, got = output_channels(layer), len(moments.mean)
        if got != width:
            raise InputError(
                f"target_layers: the function for {names[layer]} must keep its {width} channels, got {got}"
            )


def _written(coupling: Coupling) -> tuple[Edge, ...]:
    """Return the layers that write a group's channels, its root included (an LSTM is no producer)."""
    if any(edge.layer is coupling.root for edge in coupling.producers):
        return coupling.producers
    return (*coupling.producers, Edge(coupling.root, coupling.channels, coupling.channels))


def _width(edge: Edge) -> int:
    """Return the number of channels that a layer writes, or, of a layer of another kind, that are known of."""
    return output_channels(edge.layer) if isinstance(edge.layer, _LAYERS) else int(edge.channels.max()) + 1


def _by_root(coupling: Coupling, values: Mapping[nn.Module, Tensor]) -> Float[Tensor, "roots"]:
    """Return a statistic of the consumers' inputs, averaged over positions, then over consumers; 0 if none reads."""
    size = 1 + max([int(coupling.channels.max()), *(int(edge.roots.max()) for edge in coupling.consumers)])
    total, readers = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for edge in coupling.consumers:
        seen = values[edge.layer].cpu()[edge.channels]
        times = torch.zeros(size, dtype=torch.float64).index_add_(0, edge.roots, torch.ones_like(seen))
        total += torch.zeros_like(total).index_add_(0, edge.roots, seen) / times.clamp(min=1)
        readers += times > 0
    return total / readers.clamp(min=1)
