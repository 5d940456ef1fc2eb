"""Read weight files without running code from them, convert, and match them to a network tensor by tensor."""

from __future__ import annotations

import argparse
import contextlib
import logging
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vbp.errors import InputError, one_line, some_of
from vbp.runtime.files import is_regular, open_regular
from vbp.runtime.sealed import READING_ERRORS, load_plain

T = TypeVar("T")
_log = logging.getLogger(__name__)
SUFFIXES = (".safetensors", ".pth", ".pt")
OTHER_SUFFIXES = (".bin", ".ckpt", ".pth.tar")

# Where training scripts put the weights in a larger file. Averaged ones come first, for their accuracy is reported.
AVERAGED = ("state_dict_ema", "model_ema", "ema")
PLAIN = ("state_dict", "model", "model_state_dict", "module", "net")

# Put before each name by a class that holds the network.
PREFIXES = ("model.", "net.", "backbone.", "module.")

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
    if not is_regular(path):
        raise InputError(f"the checkpoint must be an existing file, got {path}; check the path")
    if not path.name.lower().endswith(SUFFIXES + OTHER_SUFFIXES):
        raise InputError(
            f"the checkpoint must be a {', '.join(SUFFIXES)} file (or {', '.join(OTHER_SUFFIXES)}), got {path}; save "
            "the state dict as one of these"
        )
    kind = _foreign(path)
    if kind is not None:
        raise InputError(f"{path} must hold the weights of a model, got {kind}")


def read_weights(path: Path) -> StateDict:
    """Read the tensors of a weight file to the CPU, without the wrappers that training scripts add.

    A file that is no `.safetensors` is read by `torch.load(weights_only=True)`: nothing in it is run.
    """
    check_weight_file(path)
    read = _read_safetensors if path.name.lower().endswith(".safetensors") else _read_pickle
    return unwrapped_state(_unwrap(read(path), path))


def unwrapped_state(state: Mapping[str, T]) -> dict[str, T]:
    """Return a state by the names of the model that DDP, DataParallel, torch.compile or AveragedModel wraps.

    A compiled block has `_orig_mod` within its names; AveragedModel counts its updates in `n_averaged`.
    """
    plain = {uncompiled(name): value for name, value in state.items()}
    while True:
        inner = {name: value for name, value in plain.items() if name != "n_averaged"}
        if not inner or not all(name.startswith("module.") for name in inner):
            return plain
        plain = {name.removeprefix("module."): value for name, value in inner.items()}


def uncompiled(name: str) -> str:
    """Return a dotted name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def readings(weights: StateDict) -> Iterator[tuple[str, StateDict]]:
    """Yield weights as they are, then without one more prefix that all of them share; each with what it lacks."""
    removed = ""
    yield removed, weights
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in weights)), None):
        removed += prefix
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        yield removed, weights


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
    unusable = [name for name, tensor in weights.items() if tensor.is_meta or tensor.is_quantized]
    if fault is None and unusable:
        fault = f"{len(unusable)} without values or quantised ({some_of(unusable)})"
    if fault is not None:
        raise InputError(_does_not_fit(path, fault))
    load_weights_(model, weights)


def load_weights_(model: nn.Module, weights: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Load a state dict of exactly the model's tensors, in the version that its modules have.

    A file holds tensors alone, not the versions that a state dict has beside them; modules may ask for theirs. Those
    of torch do without: a BatchNorm of no version may lack its count of batches.
    """
    state = OrderedDict(weights)
    versions = getattr(model.state_dict(), "_metadata", {})
    own = [name for name, module in model.named_modules() if not type(module).__module__.startswith("torch.")]
    state._metadata = {name: versions[name] for name in own if name in versions}  # type: ignore[attr-defined]
    model.load_state_dict(state, strict=True, assign=assign)


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


def _foreign(path: Path) -> str | None:
    """Return what a file is that people take for weights, and the remedy; None if it may hold weights."""
    with open_regular(path) as file:
        start = file.read(64).lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; fetch the file itself by `git lfs pull`"
    if start.startswith(b"<"):
        return "an HTML or XML page; fetch the file itself, the link needs a login or leads to a page about it"
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return "a TorchScript program; save torch.jit.load(FILE).state_dict() by torch.save"
    return None


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
        # What torch says of an unreadable pickle is advice to run the code in it.
        reason = "no pickle of tensors" if "weights_only" in str(error) else one_line(error)
        raise InputError(
            f"{path} is no readable PyTorch weight file ({reason}); it may be truncated, or hold "
            "other objects than tensors: fetch it again, or save it as torch.save(model.state_dict(), FILE)"
        ) from error


def _unsafe_globals(path: Path) -> list[str]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except READING_ERRORS:
        return []  # too damaged, or too old a format, to say
    return sorted(name for name in names if name != "argparse.Namespace")


def _unwrap(content: object, path: Path) -> StateDict:
    got = type(content).__name__
    if isinstance(content, Mapping):
        held = [name for name in AVERAGED if _is_state(content.get(name))]
        held = held or [name for name in PLAIN if _is_state(content.get(name))]
        if len(held) > 1:
            raise InputError(f"{path} must hold one state dict, got those under {', '.join(held)}; save one of them")
        if held:
            _log.info("weights taken from %r in %s", held[0], path)
            return dict(content[held[0]])
        if _is_state(content):
            return dict(content)
        got = some_of([str(name) for name in content]) or "nothing"
    raise InputError(
        f"{path} must hold a state dict (names and tensors), bare or under one of {', '.join(AVERAGED + PLAIN)}, got "
        f"{got}; save it as torch.save(model.state_dict(), FILE)"
    )


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())
    )
