"""Read weight files without running code from them, convert, and match them to a network tensor by tensor."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vbp.errors import InputError, one_line, some_of
from vbp.runtime.sealed import READING_ERRORS, load_plain

_log = logging.getLogger(__name__)
SUFFIXES = (".safetensors", ".pth", ".pt")

# Where training scripts put the weights in a larger file, in the order tried: averaged weights come first,
# for they are the ones whose accuracy is reported.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

# Put before each name by DistributedDataParallel and torch.compile.
PREFIXES = ("module.", "_orig_mod.")

# Buffers that older versions saved and newer ones compute: a conversion may drop them.
DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")

# What a conversion raises on tensors that it does not expect.
CONVERSION_ERRORS = (KeyError, AttributeError, ValueError, IndexError, RuntimeError, TypeError)
StateDict = dict[str, Tensor]
Conversion = Callable[[StateDict, nn.Module], StateDict]


@dataclass(frozen=True)
class WeightFile:
    """A file to load; `facebook` marks the original ConvNeXt layout."""

    path: Path
    facebook: bool = False


def check_weight_file(path: Path) -> None:
    """Stop before any work if `path` does not exist or does not end as a weight file's name does."""
    if not path.is_file():
        raise InputError(f"the checkpoint must be an existing file, got {path}; check the path")
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"the checkpoint must be a {', '.join(SUFFIXES)} file, got {path}; save the state dict as one of these"
        )


def read_weights(path: Path) -> StateDict:
    """Read the tensors of a weight file to the CPU, without the wrappers that training scripts add.

    A `.pth` or `.pt` file is read by `torch.load(weights_only=True)`: nothing in it is run.
    """
    check_weight_file(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    weights = _unwrap(content, path)
    for prefix in PREFIXES * 2:  # either may stand outside the other
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def convert(weights: StateDict, conversion: Conversion | None, model: nn.Module, path: Path) -> StateDict:
    """Return the weights under the names of `model`; a tensor of the file that is dropped without use is an error."""
    if conversion is None:
        return weights
    try:
        converted = conversion(dict(weights), model)
    except CONVERSION_ERRORS as error:
        known = _convertible(weights, conversion, model)
        fault = mismatch(model.state_dict(), known) or f"the conversion failed: {one_line(error)}"
        raise InputError(_does_not_fit(path, fault)) from error
    resized = [name for name in converted if name in weights and converted[name].shape != weights[name].shape]
    if resized:
        _log.warning("%s: resampled to the model's image size: %s", path, some_of(resized))
    used = {tensor.data_ptr() for tensor in converted.values()}
    dropped = [
        name
        for name, tensor in weights.items()
        if name not in converted and tensor.data_ptr() not in used and not any(part in name for part in DERIVED)
    ]
    # Tensors computed from others, such as q, k and v joined, leave these without a successor.
    sources = {tensor.data_ptr() for tensor in weights.values()}
    computed = any(name not in weights and tensor.data_ptr() not in sources for name, tensor in converted.items())
    if dropped and not computed:
        raise InputError(_does_not_fit(path, describe_mismatch((), dropped, ())))
    return converted


def _convertible(weights: StateDict, conversion: Conversion, model: nn.Module) -> StateDict:
    """Return what a conversion makes of a file on which it fails: tensors that it cannot take keep their names."""
    refused = {}
    for name, tensor in weights.items():
        try:
            conversion({name: tensor}, model)
        except CONVERSION_ERRORS:
            refused[name] = tensor
    try:
        rest = {name: tensor for name, tensor in weights.items() if name not in refused}
        return {**conversion(rest, model), **refused}
    except CONVERSION_ERRORS:
        return weights


def load_strictly_(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy `weights` into `model`; each tensor must have its counterpart, else the model is unchanged."""
    fault = mismatch(model.state_dict(), weights)
    if fault is not None:
        raise InputError(_does_not_fit(path, fault))
    model.load_state_dict(dict(weights), strict=True)


def mismatch(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Return what is missing, too much or of another shape; None if the two fit."""
    shapes = [
        (name, tuple(given[name].shape), tuple(tensor.shape))
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    return describe_mismatch(missing, unexpected, shapes) if missing or unexpected or shapes else None


def describe_mismatch(
    missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[tuple[str, Iterable[int], Iterable[int]]]
) -> str:
    """Describe tensors missing, too many, and of another shape (name, in the file, in the model)."""
    named_shapes = [f"{name}: file {list(given)}, model {list(own)}" for name, given, own in shapes]
    kinds = (("missing", list(missing)), ("too much", list(unexpected)), ("of another shape", named_shapes))
    return "; ".join(f"{len(names)} {kind} ({some_of(names)})" for kind, names in kinds if names)


def _does_not_fit(path: Path, fault: str) -> str:
    return (
        f"the weights in {path} do not fit the model: {fault}; give the model name and the model arguments "
        "that the file was trained with"
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is no readable safetensors file ({one_line(error)}); it may be truncated, fetch it again"
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        # timm's training script stores its command line as a Namespace: plain data, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return load_plain(path)
    except READING_ERRORS as error:
        unsafe = _unsafe_globals(path)
        if unsafe:
            raise InputError(
                f"{path} holds more than tensors ({some_of(unsafe)}) and could run code when read; only a state "
                "dict is allowed, save it as torch.save(model.state_dict(), FILE)"
            ) from error
        raise InputError(
            f"{path} is no readable PyTorch weight file ({one_line(error)}); it may be truncated, or hold "
            "other objects than tensors: fetch it again, or save it as torch.save(model.state_dict(), FILE)"
        ) from error


def _unsafe_globals(path: Path) -> list[str]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except READING_ERRORS:
        return []  # too damaged, or too old a format, to say
    return sorted(name for name in names if name != "argparse.Namespace")


def _unwrap(content: object, path: Path) -> StateDict:
    if isinstance(content, Mapping):
        wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        inner: Mapping[Any, Any] = content if wrapper is None else content[wrapper]
        if inner and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in inner.items()):
            if wrapper is not None:
                _log.info("weights taken from %r in %s", wrapper, path)
            return dict(inner)
        got = some_of([str(name) for name in content]) or "nothing"
    else:
        got = type(content).__name__
    raise InputError(
        f"{path} must hold a state dict (names and tensors), bare or under one of {', '.join(WRAPPERS)}, got "
        f"{got}; save it as torch.save(model.state_dict(), FILE)"
    )
