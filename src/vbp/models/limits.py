"""Refuse what does more than describe an architecture, and an architecture far larger than its weights."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import reprlib
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vbp.errors import InputError

# What makes timm or transformers load weights, code or kernels, names files, or makes another kind of model.
_MORE_THAN_ARCHITECTURE = (
    *("cache_dir", "checkpoint_path", "features_only", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("auto_map", "custom_pipelines", "kernel_config", "quantization_config", "use_kernels", "architecture"),
    *("backbone", "backbone_kwargs", "model_args", "use_pretrained_backbone", "use_timm_backbone"),
)
_NO_ARGUMENTS = {"self", "args", "kwargs", "device", "dtype", *_MORE_THAN_ARCHITECTURE}
_ATTENTION = ("eager", "sdpa")  # all others may fetch a kernel from the hub

# Names with these parts may be numbers of layers, each of which takes time to build.
_DEPTHS = ("depth", "layers", "blocks")
MOST_LAYERS, LARGEST_NUMBER, LONGEST_LIST, DEEPEST = 2**12, 2**20, 2**10, 8


@dataclass(frozen=True)
class Limits:
    """The modules, and the elements of parameters and buffers, that a model may have; by default those of any."""

    modules: int = 20_000
    elements: int = 2**33

    @classmethod
    def of_dense(cls, pruned: Mapping[str, Tensor]) -> Limits:
        """Return those of the dense model of these weights: it is larger, and has buffers that are not saved."""
        # Tied and expanded weights are stored once.
        stored = {
            value.data_ptr(): value.untyped_storage().nbytes() // value.element_size() for value in pruned.values()
        }
        elements = 64 * sum(stored.values()) + 2**22
        return cls(min(cls.modules, 20 * len(pruned) + 1000), min(cls.elements, elements))


ANY = Limits()


def check_description(value: Any, what: str, name: str = "", depth: int = 0) -> None:
    """Raise InputError for code, kernels, other weights and endless sizes in what describes an architecture.

    `what` begins the text. A list counts by the sum of its numbers: these may be the depths of stages.
    """
    most = MOST_LAYERS if any(part in name for part in _DEPTHS) else LARGEST_NUMBER
    items = value if isinstance(value, list | tuple) else [value]
    sizes = [abs(item) for item in items if isinstance(item, int | float)]
    attention = name.endswith(("attn_implementation", "attn_implementation_internal"))
    if (name in _MORE_THAN_ARCHITECTURE and value) or (attention and value not in (None, *_ATTENTION)):
        fault = f"describe (with {' or '.join(_ATTENTION)} attention) the architecture only"
    elif not all(size <= most for size in sizes) or sum(sizes) > most:
        fault = f"hold numbers up to {most}, also in sum"
    elif len(items) > LONGEST_LIST or depth > DEEPEST:
        fault = f"hold lists up to {LONGEST_LIST} long and {DEEPEST} deep"
    else:
        inner = value.items() if isinstance(value, Mapping) else ((name, item) for item in items if items is value)
        for key, item in inner:
            if key not in ("id2label", "label2id"):  # as long as there are classes
                check_description(item, what, str(key), depth + 1)
        return
    raise InputError(f"{what} must {fault}, got {name[:40]} = {reprlib.repr(value)}; leave it out")


def check_timm_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise InputError unless these are plain arguments of the classes from which timm builds `name`.

    Allowed are the names of their parameters, with numbers, single words, null and lists of these.
    """
    from timm.models import model_entrypoint  # timm takes seconds to import

    known = {"img_size", "in_chans", "num_classes"}
    for kind in vars(sys.modules[model_entrypoint(name).__module__]).values():
        if inspect.isclass(kind) and (issubclass(kind, nn.Module) or is_dataclass(kind)):
            for parent in {*kind.__mro__} - {nn.Module, object}:
                known.update(inspect.signature(parent).parameters)
    for argument, value in arguments.items():
        if argument not in known - _NO_ARGUMENTS or not _is_plain(value):
            raise InputError(
                f"timm cannot build {name} from the argument {argument[:80]!r} = {reprlib.repr(value)}: allowed are "
                "those of its classes, with numbers, single words, null or lists of these; leave it out"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    word = isinstance(value, str) and re.fullmatch(r"\w{0,40}", value)
    return value is None or bool(word) or isinstance(value, int | float)


@contextlib.contextmanager
def bounded_construction(limits: Limits) -> Iterator[None]:
    """Stop the construction of a model in this thread before it is larger than the limits.

    Raises:
        InputError: In the constructor, before the memory is taken.
    """
    counts, thread = {"modules": 0, "elements": 0}, threading.get_ident()

    def count(_: nn.Module, __: str, registered: nn.Module | Tensor | None) -> None:
        if registered is None or threading.get_ident() != thread:
            return
        kind = "elements" if isinstance(registered, Tensor) else "modules"
        counts[kind] += registered.numel() if isinstance(registered, Tensor) else 1
        if counts[kind] > getattr(limits, kind):
            raise _too_large(f"{getattr(limits, kind)} {kind}")

    with contextlib.ExitStack() as stack:
        for kind in ("module", "parameter", "buffer"):
            hook = getattr(registration, f"register_module_{kind}_registration_hook")(count)
            stack.callback(hook.remove)
        stack.enter_context(_SmallTensors(limits.elements))
        yield


class _SmallTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks up the size of every result on the meta device, and computes it if it is not too large."""

    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shapes, named = pytree.tree_map_only(Tensor, lambda value: value.to("meta"), (args, dict(kwargs)))
        if any(argument.name == "device" for argument in func._schema.arguments):
            named["device"] = torch.device("meta")
        with contextlib.suppress(RuntimeError):  # a size that depends on values is no larger than they are
            for result in pytree.tree_leaves(func(*shapes, **named)):
                if isinstance(result, Tensor) and math.prod(result.shape) > self.elements:
                    raise _too_large(f"{self.elements} elements")
        return func(*args, **kwargs)


def _too_large(most: str) -> InputError:
    return InputError(
        f"the architecture has more than {most}, out of proportion to its weights; build the dense model yourself "
        "and pass it: load_pruned(path, model=fresh_dense_model)"
    )
