"""Run a model in evaluation mode, frozen or with hooks, and leave it as it was; what it returns."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from vbp.errors import InputError
from vbp.runtime.random_state import random_state, set_random_state_


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back into its own mode afterwards.

    `model.train(mode)` would thaw a BatchNorm that its user keeps frozen in a training model.
    """
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
    except NotImplementedError as error:  # programs of torch.export
        raise InputError(
            f"the model must have an evaluation mode, got a {type(model).__name__} ({error}); give the module that "
            "it was made from"
        ) from error
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def copy_model(model: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a model, in which tensors that a forward pass has kept do not belong to its graph.

    Modules may cache what they compute from their parameters, as LeViT its attention biases. Of a pass with gradients
    such a tensor cannot be copied as it is. Objects in `shared`, by their `id`, are not copied.
    """
    memo: dict[int, Any] = dict(shared or {})
    for module in model.modules():
        for value in tree_leaves(list(vars(module).values())):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def snapshot(modules: Iterable[nn.Module], *tables: Literal["_parameters", "_buffers"]) -> Callable[[], None]:
    """Return a function that restores modes and attributes of modules, and the tensors of these tables."""
    saved = []
    for module in modules:
        own = vars(module)
        kept = {key: dict(own[key]) for key in tables if isinstance(own[key], dict)}  # TorchScript has other tables
        values = [value for key in tables for value in dict(own[key].items()).values() if value is not None]
        saved.append((module, dict(own), kept, [(value, value.detach().clone()) for value in values]))

    def restore() -> None:
        for module, own, kept, values in saved:
            for target, state in ((vars(module), own), *((own[key], kept[key]) for key in kept)):
                target.clear()
                target.update(state)
            with torch.no_grad():
                for value, before in values:
                    if not value.is_meta and not torch.equal(value, before):
                        value.copy_(before)

    return restore


@contextmanager
def training_paths(model: nn.Module) -> Iterator[None]:
    """Let modules take the paths that their code takes in training alone, and restore the model and random numbers.

    The layers of torch itself stay in evaluation mode: they have no such path, and norms would learn from the body.
    """
    device = next(iter(model.parameters()), torch.empty(0)).device
    state, restore = random_state(device), snapshot(model.modules(), "_buffers")
    modes = {module: module.training for module in model.modules()}
    for module in model.modules():
        module.training = not type(module).__module__.startswith("torch.") and not isinstance(module, _BatchNorm)
    try:
        yield
    finally:
        restore()
        for module, mode in modes.items():
            module.training = mode
        set_random_state_(state, device)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient, and restore afterwards which ones did."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


Hook = Callable[..., Any]


@contextmanager
def hooked(
    after: Iterable[tuple[nn.Module, Hook]] = (), *, before: Iterable[tuple[nn.Module, Hook]] = ()
) -> Iterator[None]:
    """Call hooks around the forward passes of modules while the body runs, and remove them afterwards.

    Those `before` are called as `hook(module, args, kwargs)`, those `after` as `hook(module, values, output)`, where
    `values` are all arguments, those given by name last; what they return, unless None, replaces the arguments or the
    output.
    """
    with ExitStack() as hooks:
        for module, hook in before:
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for module, hook in after:
            hooks.callback(module.register_forward_hook(partial(_call_after, hook), with_kwargs=True).remove)
        yield


def _call_after(hook: Hook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return hook(module, call_values(args, kwargs), output)


def call_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call, those given by name last: a layer may be called as `layer(input=x)`."""
    return (*args, *kwargs.values())


# The one argument of a model, its arguments in their order, or by name.
ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


def run_model(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call a model with a tensor, the sequence of its arguments, or the mapping of its named ones.

    Floating-point tensors come in the type of the model's parameters.

    Raises:
        InputError: The model takes other arguments.
    """
    named = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    args = () if isinstance(example_inputs, Mapping) else example_inputs
    args, named = fitted(model, ((args,) if isinstance(args, Tensor) else tuple(args), named))
    try:
        inspect.signature(model.forward).bind(*args, **named)
    except TypeError as error:
        raise InputError(
            f"example_inputs must be the arguments of {type(model).__name__}.forward, got "
            f"{', '.join(named) or len(args)} ({error}); give a tuple of all, or a dict by their names"
        ) from error
    except ValueError:
        pass  # compiled code has no signature
    return model(*args, **named)


Values = TypeVar("Values")


def fitted(model: nn.Module, values: Values) -> Values:
    """Return values, nested or not, with every floating-point tensor in the type of the model's parameters."""
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), None)
    fit = lambda value: value.to(dtype) if value.is_floating_point() else value  # noqa: E731
    return values if dtype is None else tree_map_only(Tensor, fit, values)


def logits_of(output: Any) -> Float[Tensor, "batch classes"]:
    """Return the logits of a model's output: the tensor itself, or a Hugging Face output's `logits`.

    Those of a convolutional head, "batch classes 1 1", lose their last two dimensions. Where an output has one tensor
    alone, with a row for each image, these are its logits: PPLCNet calls them `last_hidden_state`.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping) and len(output) == 1:
        (only,) = output.values()
        logits = only if isinstance(only, Tensor) and only.ndim == 2 else None
    if not isinstance(logits, Tensor):
        raise InputError(
            f"a classifier must return a tensor or an output with .logits, got {type(output).__name__}; "
            "wrap the model"
        )
    if logits.ndim > 2 and all(size == 1 for size in logits.shape[2:]):
        logits = logits.flatten(1)
    if logits.ndim != 2:
        raise InputError(
            f"a classifier must return one row of logits for each image, got shape {list(logits.shape)}; wrap the "
            "model so that it does"
        )
    return logits


# What a transformers model adds to its output when told to: intermediate values.
_INTERMEDIATE = ("hidden_states", "attentions")


def output_tensors(output: Any) -> dict[str, Tensor]:
    """Return the tensors of numbers in a model's output by name: of a tensor, a tuple or list, or a mapping, nested.

    A single tensor is `output`, those of a list are called by their places; maps of one position are rows.
    """
    tensors: dict[str, Tensor] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.ndim > 1:
                single = value.ndim > 2 and all(size == 1 for size in value.shape[2:])
                tensors[name or "output"] = value.flatten(1) if single else value
        elif isinstance(value, Mapping):
            for key, one in value.items():
                if key not in _INTERMEDIATE:
                    add(f"{name}.{key}" if name else str(key), one)
        elif isinstance(value, tuple | list):
            for place, one in enumerate(value):
                add(f"{name}.{place}" if name else str(place), one)

    add("", output)
    return tensors
