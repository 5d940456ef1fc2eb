"""`VarianceImportance`: score channels by the variance of the value that reaches their consumers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.moments import ChannelMoments, RunningMoments
from vbp.runtime.forward import evaluation_mode, hooked
from vbp.sites.layers import input_channels, output_channels
from vbp.statistics.collect import Observer
from vbp.torch_pruning.compensate import ChannelMeans, moments_without, without
from vbp.torch_pruning.graph import Coupling, Edge, build_graph, canonical_roots, logged_warnings, read_group


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


Target = tuple[nn.Module, Callable[[Tensor], Tensor]]


class VarianceImportance(tp.importance.Importance):  # type: ignore[misc]
    """Score channels by the variance of their activation, for any Torch-Pruning pruner.

    The activation is read where it is consumed: at the input of the `Linear` or convolution layers whose input
    channels go with the group, after whatever stands between (activation, norm, dropout, pooling, reshape).

    Attributes:
        variance: Layer whose output channels are pruned -> variance of each; several consumers: their mean.
        means: Layer whose output channels are pruned -> mean of each; `means.inputs` has them by consumer.

    Source: VBP paper, sections 3.1 and 3.2.
    """

    def __init__(self, norm_per_layer: bool = False, target_layers: Sequence[Target] | None = None) -> None:
        """Make an importance without statistics.

        Args:
            norm_per_layer: Divide the scores of a group by their mean, so that groups of different scale compare.
            target_layers: Pairs (layer, function): take the statistics of `function(output of layer)` in place of
                those at the consumers of that layer's channels.
        """
        self.norm_per_layer = norm_per_layer
        self.target_layers = list(target_layers or ())
        self.variance: dict[nn.Module, Tensor] = {}
        self.means = ChannelMeans({})
        self._inputs: dict[nn.Module, ChannelMoments] = {}

    def collect_statistics(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        device: torch.device | str | None = None,
        *,
        ignored_layers: Sequence[nn.Module] = (),
    ) -> None:
        """Observe the model over all batches, in evaluation mode and without gradients; replaces earlier statistics.

        Args:
            model: The model to be pruned; left as it was.
            loader: Image tensors "batch channels height width", or tuples that begin with one.
            device: Where the images go; by default where the model is.
            ignored_layers: Layers not to be pruned: what only they would need is not observed.

        Raises:
            InputError: There is no image, the model cannot be traced, a layer never ran, or a value is not finite.
        """
        target = torch.device(device) if device is not None else next(model.parameters()).device
        batches = (_images(batch).to(target, non_blocking=True) for batch in loader)
        first = next(batches, None)
        if first is None or not len(first):
            raise InputError("calibration needs at least one image, got none; check the loader")
        graph = build_graph(model, first[:1])
        ignored = [module for layer in ignored_layers for module in layer.modules()]
        with logged_warnings(model):
            groups = list(graph.get_all_groups(ignored_layers=ignored))
            canonical = [canonical_roots(group) for group in groups]
        couplings = [read_group(group) for group in groups]
        names = {module: name for name, module in model.named_modules()}
        inputs = {edge.layer: Observer() for coupling in couplings for edge in coupling.consumers}
        targets = {layer: (Observer(), part) for layer, part in self.target_layers}
        read = [(layer, seen.of_input) for layer, seen in inputs.items()]
        made = [(layer, seen.of_output(part)) for layer, (seen, part) in targets.items()]
        with hooked(made, before=read), evaluation_mode(model), torch.no_grad():
            for images in itertools.chain([first], batches):
                model(images)
        self._inputs = {layer: finish(seen, names[layer]) for layer, seen in inputs.items()}
        self._override(couplings, {layer: finish(seen, names[layer]) for layer, (seen, _) in targets.items()}, names)
        self._summarise(couplings, canonical)

    def __call__(self, group: Any) -> Float[Tensor, "roots"] | None:
        """Score the root channels of a `tp.dependency.Group`; `None` where no layer reads them.

        Raises:
            InputError: There are no statistics of a layer that reads the group, or they have another width.
        """
        coupling = read_group(group)
        if not coupling.consumers:
            return None
        for edge in coupling.consumers:
            seen, width = self._inputs.get(edge.layer), input_channels(edge.layer)
            if seen is None or len(seen.mean) != width:
                raise InputError(
                    f"statistics at the input of {group._DG._module2name[edge.layer]} must cover {width} channels, "
                    f"got {'none' if seen is None else len(seen.mean)}; call collect_statistics on this model as it "
                    "is now (VBPPruner carries them through its own steps)"
                )
        whole = torch.equal(coupling.channels, torch.arange(len(group[0].idxs)))
        canonical = canonical_roots(group) if whole else coupling.channels
        scores, read = self._by_root(coupling, lambda moments: moments.variance)
        scores, read = scores[canonical], read[canonical]
        if self.norm_per_layer:
            mean = scores[read].mean()
            scores = scores / torch.where(mean > 0, mean, torch.ones_like(mean))
        return scores

    def state_by_name(self, model: nn.Module) -> dict[str, Any]:
        """Return the statistics as plain data keyed by dotted module names, for `torch.save` or another process."""
        names = {module: name for name, module in model.named_modules()}
        return {
            "variance": {names[layer]: value for layer, value in self.variance.items()},
            "means": {names[layer]: value for layer, value in self.means.items()},
            "inputs": {names[layer]: dict(vars(moments)) for layer, moments in self._inputs.items()},
        }

    def load_by_name(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Take what `state_by_name` returned, for a model of the same structure and widths.

        Raises:
            InputError: The data is of another form, or names a layer that the model does not have.
        """
        layers = dict(model.named_modules())
        try:
            inputs = {layers[name]: ChannelMoments(**entry) for name, entry in state["inputs"].items()}
            variance = {layers[name]: value for name, value in state["variance"].items()}
            means = {layers[name]: value for name, value in state["means"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"statistics must fit {type(model).__name__}, got {error!r} that it or they lack; give what "
                "state_by_name returned for a model of this structure"
            ) from error
        self._inputs, self.variance = inputs, variance
        self.means = ChannelMeans(means, {layer: moments.mean for layer, moments in inputs.items()})

    def cut_(self, coupling: Coupling) -> None:
        """Drop the channels of a group that is about to be pruned, so that the statistics follow the model."""
        self.means.cut_(coupling)
        for edge in coupling.producers:
            if edge.layer in self.variance:
                self.variance[edge.layer] = without(self.variance[edge.layer], edge.channels)
        for edge in coupling.consumers:
            if edge.layer in self._inputs:
                self._inputs[edge.layer] = moments_without(self._inputs[edge.layer], edge.channels)

    def _by_root(
        self, coupling: Coupling, value: Callable[[ChannelMoments], Tensor]
    ) -> tuple[Float[Tensor, "roots"], Tensor]:
        """Return a statistic, averaged over positions, then over consumers, and which roots are read at all."""
        size = 1 + max([int(coupling.channels.max()), *(int(edge.roots.max()) for edge in coupling.consumers)])
        total, readers = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for edge in coupling.consumers:
            values = value(self._inputs[edge.layer]).cpu()[edge.channels]
            times = torch.zeros(size, dtype=torch.float64).index_add_(0, edge.roots, torch.ones_like(values))
            total += torch.zeros_like(total).index_add_(0, edge.roots, values) / times.clamp(min=1)
            readers += times > 0
        return total / readers.clamp(min=1), readers > 0

    def _summarise(self, couplings: Sequence[Coupling], canonical: Sequence[Tensor]) -> None:
        self.variance = {}
        self.means = ChannelMeans({}, {layer: moments.mean for layer, moments in self._inputs.items()})
        for coupling, roots in zip(couplings, canonical, strict=True):
            if not coupling.consumers:
                continue
            variance, _ = self._by_root(coupling, lambda moments: moments.variance)
            mean, _ = self._by_root(coupling, lambda moments: moments.mean)
            for edge in coupling.producers:
                for entries, by_root in ((self.variance, variance[roots]), (self.means, mean[roots])):
                    entries.setdefault(edge.layer, torch.zeros(output_channels(edge.layer), dtype=torch.float64))
                    entries[edge.layer][edge.channels] = by_root[edge.roots]

    def _override(
        self,
        couplings: Sequence[Coupling],
        targets: Mapping[nn.Module, ChannelMoments],
        names: Mapping[nn.Module, str],
    ) -> None:
        """Write the statistics of `target_layers` in place of those at the consumers."""
        left = dict(targets)
        for coupling in couplings:
            for producer in coupling.producers:
                moments = left.pop(producer.layer, None) if coupling.consumers else None
                if moments is None:
                    continue
                if len(moments.mean) != output_channels(producer.layer):
                    raise InputError(
                        f"target_layers: the function for {names[producer.layer]} must keep its "
                        f"{output_channels(producer.layer)} channels, got {len(moments.mean)}"
                    )
                for edge in coupling.consumers:
                    self._inputs[edge.layer] = _overwritten(self._inputs[edge.layer], moments, producer, edge)
        if left:
            raise InputError(
                f"target_layers must be layers whose output channels can be pruned, got {names[next(iter(left))]!r}; "
                "name the Linear or convolution layer and give the activation as the function"
            )


def _overwritten(seen: ChannelMoments, moments: ChannelMoments, producer: Edge, edge: Edge) -> ChannelMoments:
    channel_of = dict(zip(producer.roots.tolist(), producer.channels.tolist(), strict=True))
    pairs = zip(edge.channels.tolist(), edge.roots.tolist(), strict=True)
    places, sources = zip(*((place, channel_of[root]) for place, root in pairs if root in channel_of), strict=True)
    mean, m2 = seen.mean.clone(), seen.m2.clone()
    mean[list(places)] = moments.mean[list(sources)]
    m2[list(places)] = moments.variance[list(sources)] * (seen.count - 1)
    return replace(seen, mean=mean, m2=m2)


def _images(batch: Any) -> Tensor:
    images = batch if isinstance(batch, Tensor) else batch[0]
    if not isinstance(images, Tensor):
        raise InputError(f"the loader must yield images, or tuples that begin with them, got {type(images).__name__}")
    return images
