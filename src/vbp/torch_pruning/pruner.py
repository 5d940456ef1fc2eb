"""`VBPPruner`: Torch-Pruning's pruner with exact counts and mean-shift compensation."""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from vbp.errors import InputError, some_of
from vbp.runtime.forward import run_model
from vbp.sites.cutting import HeadChange, update_attributes_
from vbp.sites.layers import unusual_layer, unusual_layers
from vbp.sites.tracer import trace_model
from vbp.torch_pruning.compensate import ChannelMeans, compensate_, watching_norms
from vbp.torch_pruning.graph import (
    Coupling,
    correct_graph_,
    logged_warnings,
    pair_gates_,
    read_group,
    tracing,
)
from vbp.torch_pruning.importance import VarianceImportance
from vbp.torch_pruning.mean_check import MeanCheck, MeanMovement
from vbp.torch_pruning.planning import plan_step
from vbp.torch_pruning.trial import Removal, check_removals

_log = logging.getLogger(__name__)

# The base class has one dict for all pruners as the default of each of these, and writes into it.
_SHARED_DEFAULTS = ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")


def own_containers(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Copy those of the base class's arguments that it would share between pruners, or change for the caller.

    Raises:
        InputError: An entry of `ignored_layers` is none of its kinds.
    """
    options.update({name: dict(options[name]) for name in _SHARED_DEFAULTS})
    unwrapped = options["unwrapped_parameters"]
    if unwrapped is not None:
        options["unwrapped_parameters"] = list(unwrapped.items() if isinstance(unwrapped, dict) else unwrapped)
    ignored: list[Any] = []
    for layer in options["ignored_layers"] or ():
        if isinstance(layer, type):
            ignored.extend(module for module in model.modules() if isinstance(module, layer))
        elif isinstance(layer, nn.Module | nn.Parameter):
            ignored.append(layer)
        elif layer is not ...:  # the placeholder of a snippet
            raise InputError(f"ignored_layers must hold modules, parameters or module types, got {layer!r}")
    options["ignored_layers"] = ignored
    return options


def check_options(options: Mapping[str, Any]) -> None:
    """Raise an `InputError` if an argument of the base class is out of range, or would do nothing."""
    ratio = options["pruning_ratio"] if options["ch_sparsity"] is None else options["ch_sparsity"]
    shares = {"pruning_ratio": ratio, "max_pruning_ratio": options["max_pruning_ratio"]}
    shares["head_pruning_ratio"] = options["head_pruning_ratio"]
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise InputError(f"{name} must be in [0, 1], got {share}; 0.35 removes 35 % of the channels")
    for name in ("round_to", "iterative_steps"):
        if options[name] is not None and options[name] < 1:
            raise InputError(f"{name} must be at least 1, got {options[name]}")
    if options["isomorphic"] and not options["global_pruning"]:
        raise InputError("isomorphic ranks groups of one pattern together, got global_pruning=False; set it to True")


class VBPPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """Prune by any importance, exactly as much as asked, and compensate what the channels contributed on average.

    It takes all arguments of `tp.pruner.BasePruner`; docs/torch_pruning.md says where its policy differs.

    Attributes:
        mean_dict: Means of the channels as they are now; they follow the model through the pruner's steps.

    Source: VBP paper, sections 3.2 and 3.3.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any,
        *args: Any,
        mean_dict: Mapping[nn.Module, Tensor] | None = None,
        check: bool = True,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        """Trace the model; nothing in it is changed. The arguments are those of the base class, and three more.

        Compensation needs `mean_dict`: `imp.means`, or a dict from the pruned layers, or their dotted names, to the
        mean of each output channel as it reaches its consumers. With `check`, each step first prunes a copy of the
        model and runs it on the example inputs: a tensor, or the positional (sequence) or named (dict) arguments of
        `model.forward`. `verbose` logs what each group loses.

        Raises:
            InputError: An argument is out of range, or the model cannot be traced.
        """
        bound = inspect.signature(tp.pruner.BasePruner.__init__).bind(
            self, model, example_inputs, importance, *args, **kwargs
        )
        bound.apply_defaults()
        options = own_containers(model, dict(bound.arguments))
        check_options(options)
        options.pop("self")
        options["forward_fn"] = options["forward_fn"] or run_model
        self.verbose = verbose
        self.example_inputs, self.forward_fn, self.check = example_inputs, options["forward_fn"], check
        with tracing(model), watching_norms(model) as following:
            super().__init__(**options)
        nodes = self.DG.module2node
        self._following = {
            layer: norm for layer, norm in following.items() if layer in nodes and len(nodes[layer].outputs) == 1
        }
        default = self.forward_fn is run_model
        traced = trace_model(model, example_inputs, convolutions=True) if default else None
        self._unusual = unusual_layers(model) if traced is None else traced.unusual
        self._names = {module: name for name, module in model.named_modules()}
        self.initial_units: dict[nn.Module, tuple[int, int]] = {}  # root -> units, and channels of each
        self._warned: set[str] = set()
        self._mean_check: MeanCheck | None = None
        self.mean_dict: ChannelMeans | None = None
        if mean_dict is not None:
            self.mean_dict = ChannelMeans.of(mean_dict, model)

    @property
    def DG(self) -> Any:  # noqa: N802  the base class's name
        """Return the dependency graph."""
        return self._graph

    @DG.setter
    def DG(self, graph: Any) -> None:  # noqa: N802
        """Correct the graph that the base class traced, before it is used."""
        correct_graph_(graph)
        self._graph = graph

    def step(self, interactive: bool = False, enable_compensation: bool = True) -> Iterator[Any] | None:
        """Prune up to the ratio of the next iterative step.

        Args:
            interactive: Return the groups instead of pruning them; each is compensated when its `prune()` is called.
            enable_compensation: Add the mean shift to the consumers; needs `mean_dict`.

        Raises:
            InputError: The step would remove nothing, is one too many, or would break the model; nothing is changed
                then and the step can be taken again.
        """
        if self.current_step >= self.iterative_steps:
            raise InputError(
                f"the pruner has iterative_steps={self.iterative_steps}, got step {self.current_step + 1}; "
                "make a new pruner, or give more iterative_steps"
            )
        if enable_compensation and self.mean_dict is None:
            raise InputError("compensation needs mean_dict, got none; give imp.means, or enable_compensation=False")
        self.current_step += 1
        try:
            removals = self.plan_removals(enable_compensation)
        except BaseException:
            self.current_step -= 1
            raise
        if self._mean_check is not None:
            self._mean_check.ensure_reference()
        groups = self._groups(removals, enable_compensation)
        if interactive:
            return groups
        for group in groups:
            group.prune()
        return None

    def enable_meancheck(self, model: nn.Module) -> None:
        """Watch how far pruning moves the output mean of each layer that loses input channels.

        The next forward pass of `model`, the pruner's own, is the reference; without one before `step`, the example
        inputs are.

        Raises:
            InputError: It is another model, or is watched already.
        """
        if model is not self.model:
            raise InputError("enable_meancheck must get the pruner's own model, got another object")
        if self._mean_check is not None:
            raise InputError("the mean check is on already; call disable_meancheck first")
        self._mean_check = MeanCheck(model, self._following, self.example_inputs, self.forward_fn)

    def disable_meancheck(self) -> dict[str, MeanMovement]:
        """Run the reference images through the model as it is now, log and return how far each output mean moved.

        The keys are the names of the layers that lost input channels.

        Raises:
            InputError: The check is not on.
        """
        if self._mean_check is None:
            raise InputError("the mean check is not on; call enable_meancheck(model) first")
        check, self._mean_check = self._mean_check, None
        return check.finish(self._names)

    def plan_removals(self, compensated: bool) -> list[Removal]:
        """Return what the current step removes, checked; `compensated`: the means are needed.

        Raises:
            InputError: The step would remove nothing, lacks means, or would break the model.
        """
        with torch.no_grad(), logged_warnings(self.model):
            removals = plan_step(self)
        if not removals:
            raise InputError(
                f"step {self.current_step} must remove channels, got none to remove at pruning_ratio "
                f"{self.per_step_pruning_ratio[self.current_step]:.4g}: raise pruning_ratio or max_pruning_ratio, "
                "lower round_to or iterative_steps, or ignore fewer layers"
            )
        coupled: dict[str, tuple[int, int]] = {}
        for removal in removals:
            group = self.group_of(removal)
            coupling = read_group(group)
            for name in sorted({self._names[edge.layer] for edge in (*coupling.producers, *coupling.consumers)}):
                if name in self._unusual:
                    raise InputError(
                        f"{unusual_layer(name, self._unusual[name])}: ignored_layers, with what it reads"
                    )
            if len(group[0].idxs) != len(removal.channels):
                coupled[self._names[removal.root]] = (len(removal.channels), len(group[0].idxs))
                continue
            if compensated:
                assert self.mean_dict is not None
                for edge in coupling.consumers:
                    self.mean_dict.at(edge, coupling, self._names[edge.layer])
                self._warn_inexact(coupling, removal)
        if coupled:
            asked, got = next(iter(coupled.values()))
            raise InputError(
                f"channels must go one by one, got layers whose channels go together, as in an attention: "
                f"{some_of(list(coupled))} (the first must lose {asked} channels and would lose {got}); give "
                "num_heads={layer: heads} for them, or put the layers of every attention into ignored_layers"
            )
        if self.check:
            check_removals(self.DG, removals, self.example_inputs, self.forward_fn)
        return removals

    def _warn_inexact(self, coupling: Coupling, removal: Removal) -> None:
        for kind, names in (
            ("a normalisation over the pruned channels", coupling.norms),
            ("a layer that the mean shift cannot enter", coupling.opaque),
            ("query and key channels", removal.attention.layers if removal.attention else ()),
        ):
            if names and kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(
                    f"compensation is inexact behind {kind}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}; "
                    "ignore the layers that write these channels to keep it exact",
                    stacklevel=4,
                )

    def group_of(self, removal: Removal) -> Any:
        """Return the `tp.dependency.Group` of a removal in the graph as it is now."""
        pair_gates_(self.DG)
        with logged_warnings(self.model):
            return self.DG.get_pruning_group(removal.root, removal.handler, removal.channels)

    def _groups(self, removals: list[Removal], compensated: bool) -> Iterator[Any]:
        for removal in removals:
            # Made when its turn comes: groups before it may have shifted the indices behind a concatenation.
            group = self.group_of(removal)
            group.prune = functools.partial(self._prune_group, group, compensated, removal.attention)
            yield group

    def _prune_group(
        self,
        group: Any,
        compensated: bool,
        attention: HeadChange | None,
        idxs: list[int] | None = None,
        record_history: bool = True,
    ) -> None:
        """Replace `Group.prune`: compensate, prune, and update statistics and settings."""
        if idxs is not None:
            root = group[0].dep
            pair_gates_(self.DG)
            group, attention = self.DG.get_pruning_group(root.target.module, root.handler, idxs), None
        coupling = read_group(group)
        if self.verbose:
            _log.info("%s loses %d channels", self._names[coupling.root], len(coupling.channels))
        if compensated:
            assert self.mean_dict is not None
            with torch.no_grad():
                compensate_(coupling, self.mean_dict, self._following, self._names)
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        tp.dependency.Group.prune(group, record_history=record_history)
        for name in frozen:
            # Torch-Pruning makes new parameters, which would learn.
            self.model.get_parameter(name).requires_grad_(False)
        for kept in (self.mean_dict, self.importance, self._mean_check):
            if isinstance(kept, ChannelMeans | VarianceImportance | MeanCheck):
                kept.cut_(coupling)
        if attention is not None:
            update_attributes_(self.model, attention)
            for name in attention.layers:
                layer = self.model.get_submodule(name)
                self.num_heads[layer] = self.out_channel_groups[layer] = attention.heads_left
