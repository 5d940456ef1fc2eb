"""What each torch function does to the channels of the tensors that it receives.

Functions are known under the names that Python, torch and torch.nn.functional share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from vbp.sites.channel_ids import Channels, columns, compact, distinct, present, respread, varying_dims


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Nonlinear functions of one value.
ACTIVATIONS = _names(
    "celu elu elu_ erf exp gelu hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ leaky_relu "
    "leaky_relu_ logsigmoid mish prelu relu relu_ relu6 selu selu_ sigmoid sigmoid_ silu silu_ softplus softsign "
    "square tanh tanh_ pow pow_ clamp clamp_ __pow__"
)

# Functions that combine values at one place.
ELEMENTWISE = ACTIVATIONS | _names(
    "add add_ addcmul div div_ mul mul_ multiply neg rsub sub sub_ true_divide __rsub__ sqrt rsqrt abs"
)

# Functions that keep shape and place of every value.
SAME = _names(
    "alpha_dropout bfloat16 clone contiguous cpu cuda detach double dropout dropout1d dropout2d dropout_ "
    "feature_alpha_dropout float half identity to type_as"
)

# Functions that move values without touching them; they move ids in the same way.
VIEWS = _names(
    "__getitem__ cat chunk concat expand expand_as flip index_select movedim moveaxis narrow permute repeat "
    "repeat_interleave roll select split split_with_sizes stack swapaxes swapdims t tensor_split transpose unbind "
    "unsafe_chunk unsafe_split"
)

# Functions that only rename the places of values.
RESHAPES = _names("flatten reshape reshape_as squeeze unflatten unsqueeze view view_as")

# Functions that read the type or the shape of their second tensor, not its values.
_LIKE = _names("expand_as reshape_as to type_as view_as")

# Functions that work on each channel's positions.
POSITIONAL = _names(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d interpolate max_pool1d "
    "max_pool2d pad upsample"
)

_SCALINGS = _names("mul mul_ multiply div div_ true_divide __truediv__")
_SUMS = _names("add add_ sub sub_")
# Nonlinear functions of several positions.
_NONLINEAR = _names(
    "adaptive_max_pool2d amax amin linalg_vector_norm max max_pool1d max_pool2d norm std var vector_norm"
)
REDUCTIONS = _names("amax amin linalg_vector_norm max mean norm std sum var vector_norm")
PRODUCTS = _names("__matmul__ bmm matmul scaled_dot_product_attention")

# Properties of a tensor: reading them reads no values.
QUERIES = _names(
    "__len__ dim size stride numel nelement is_contiguous is_floating_point is_complex element_size type get_device "
    "data_ptr ndimension requires_grad_ __hash__ __repr__ __bool__ is_same_size"
)


@dataclass(frozen=True)
class Read:
    """The channel at each column of a linear layer."""

    layer: str
    ids: Tensor


@dataclass
class Attention:
    """The channels of one attention call; None for those that could not be followed, queries and keys together.

    Attributes:
        implicit_scale: Whether no scale is given to a fused kernel, which then takes it from the query channels.
    """

    query: Int[Tensor, "heads head_dim"] | None
    key: Int[Tensor, "heads head_dim"] | None
    implicit_scale: bool
    value: Int[Tensor, "heads head_dim"] | None = None


@dataclass
class Trace:
    """Everything that one forward pass shows."""

    channels: Channels = field(default_factory=Channels)
    reads: list[Read] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    unusual: dict[str, str] = field(default_factory=dict)  # layer -> why its own parameters do not describe it


class ChannelFlow:
    """Keeps a tensor of channel ids beside every tensor whose channels are known."""

    def __init__(self, parameters: Mapping[nn.Parameter, str]) -> None:
        self._parameters = parameters
        self.ids: Any = WeakIdKeyDictionary()  # tensor -> compact ids of the same shape
        self.mixtures: Any = WeakIdKeyDictionary()  # tensor computed across channels -> the set of those channels
        self.from_image: Any = WeakIdKeyDictionary()  # tensors computed from the model's input
        self.trace = Trace()

    def follow(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, operands: list[Tensor], output: Any
    ) -> None:
        """Assign ids to the output of a function, or record that the function uses channels in an unknown way."""
        if name in _LIKE:
            operands = operands[:1]
        if any(operand in self.ids for operand in operands):
            if not self._follow(func, name, args, kwargs, operands, output):
                self.leak(operands, name or "an unnamed operation")
        elif any(operand in self.mixtures for operand in operands):
            self._follow_mixture(name, operands, tensors_in(output))

    def _follow(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, operands: list[Tensor], output: Any
    ) -> bool:
        """Assign ids to the output; return False if the operation does not keep channels apart."""
        if name in PRODUCTS:
            return self._follow_product(name, args, kwargs, output)
        if name in VIEWS or name == "__get__":
            return self._follow_view(func, args, kwargs, output)
        if not isinstance(output, Tensor):
            return False
        tagged = [operand for operand in operands if operand in self.ids]
        ids = self.ids[tagged[0]]
        if name in RESHAPES:
            self.ids[output] = compact(ids.reshape(output.shape))
            return True
        if name in SAME and len(tagged) == 1:
            self.ids[output] = ids
            return True
        if name in POSITIONAL and len(tagged) == 1:
            self._bind(name, ids)
            after = respread(ids, tuple(output.shape))
            if after is not None:
                self.ids[output] = after
            return after is not None
        if name in REDUCTIONS and len(tagged) == 1:
            return self._follow_reduction(name, ids, args, kwargs, output)
        return name in ELEMENTWISE and self._follow_elementwise(name, args, operands, output)

    def _follow_view(self, func: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> bool:
        if any(leaf not in self.ids and leaf in self.from_image for leaf in tensors_in((args, kwargs))):
            return False

        def swap(leaf: Any) -> Any:
            return self.ids[leaf] if isinstance(leaf, Tensor) and leaf in self.ids else leaf

        try:
            views = func(*tree_map(swap, args), **tree_map(swap, kwargs))
        except (RuntimeError, TypeError):
            return False
        for leaf, ids in zip(tree_leaves(output), tree_leaves(views), strict=True):
            if isinstance(leaf, Tensor):
                if not isinstance(ids, Tensor) or ids.shape != leaf.shape or ids.dtype != torch.int32:
                    return False
                self.ids[leaf] = compact(ids)
        return True

    def _follow_reduction(self, name: str, ids: Tensor, args: Any, kwargs: Any, output: Tensor) -> bool:
        """Reduce over positions, or, across channels, to a mixture that must come back to the same channels."""
        self._bind(name, ids)
        after = respread(ids, tuple(output.shape))
        if after is None and output.ndim < ids.ndim:
            kept = [dim for dim in range(ids.ndim) if dim not in _reduced_dims(name, args, kwargs, ids.ndim)]
            same = [ids.shape[dim] for dim in kept] == list(output.shape)
            if same and set(varying_dims(ids)) <= set(kept):
                narrow = distinct(ids)
                after = narrow.reshape([narrow.shape[dim] for dim in kept]).expand(output.shape)
        if after is not None:
            self.ids[output] = after
        else:
            self.mixtures[output] = set(present(ids))
        return True

    def _follow_elementwise(self, name: str, args: Any, operands: list[Tensor], output: Tensor) -> bool:
        channels = self.trace.channels
        with_ids = [self.ids[operand] for operand in operands if operand in self.ids]
        if any(ids.ndim != output.ndim for ids in with_ids):
            return False
        main = max(with_ids, key=lambda ids: distinct(ids).numel())
        spread = respread(main, tuple(output.shape))
        if spread is None:
            return False
        for operand in operands:
            if operand in self.ids:
                ids = self.ids[operand]
                if bool((distinct(ids) != distinct(main)).any()):
                    # A product of two layers' channels is a gate: they stay or go together. A sum is a residual.
                    if name not in ("mul", "mul_", "multiply"):
                        return False
                    channels.couple(ids, main)
            elif operand in self.mixtures:
                if not self.mixtures[operand] <= set(present(main)):
                    return False
                channels.mixed.update(self.mixtures[operand])
            elif not self._neutral(operand, main):
                return False
        if name in ACTIVATIONS:
            channels.activated.update(present(main))
        if not self._any_basis(name, args, len(with_ids)):
            channels.bound.update(present(main))
        self.ids[output] = spread
        return True

    def _any_basis(self, name: str, args: Any, with_ids: int) -> bool:
        """Return whether a function is the same in any basis of the channels: a factor, a sum without constants."""
        channels = [isinstance(value, Tensor) and value in self.ids for value in args[:2]]
        if name in _SCALINGS:
            return with_ids == 1 and (channels[0] or "mul" in name)
        return name == "neg" or (name in _SUMS and all(channels))

    def _bind(self, name: str, ids: Tensor) -> None:
        if name in _NONLINEAR:
            self.trace.channels.bound.update(present(ids))

    def _neutral(self, operand: Tensor, ids: Tensor) -> bool:
        """Return whether an operand treats all channels alike, or is a parameter with one element a channel."""
        if operand.numel() == 1:
            return True
        aligned = operand.reshape((1,) * (ids.ndim - operand.ndim) + tuple(operand.shape))
        varying = varying_dims(ids)
        if all(aligned.shape[dim] == 1 for dim in varying):
            return True
        source = operand if operand in self._parameters else getattr(operand, "_base", None)
        name = self._parameters.get(source) if isinstance(source, nn.Parameter) else None
        if name is None or len(varying) != 1 or operand.numel() != ids.shape[varying[0]]:
            return False
        channels = columns(ids, varying[0])
        if channels is None:
            return False
        self.trace.channels.couple(channels, self.trace.channels.add("parameter", name, operand.numel()))
        return True

    def _follow_product(self, name: str, args: Any, kwargs: Any, output: Any) -> bool:
        """Record `softmax(q k) v`, whether fused or written out as two products."""
        if name == "scaled_dot_product_attention":
            given = (*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs))[:3]
            query, key, value = (self.ids.get(tensor) for tensor in given)
            if value is None:
                return False
            if query is None or key is None:
                # Something stands between their layers and the softmax; the values pass it all the same.
                self.leak([tensor for tensor in given[:2] if isinstance(tensor, Tensor)], name)
                return self._mix_positions(value, output, weights=given[0])
            noted = self._note_attention(query, key.transpose(-2, -1), implicit_scale=kwargs.get("scale") is None)
            return noted and self._mix_positions(value, output)
        left, right = (self.ids.get(tensor) for tensor in args[:2])
        if left is not None and right is not None:
            return self._note_attention(left, right, implicit_scale=False)
        values, weights = (right, args[0]) if left is None else (left.transpose(-2, -1), args[1])
        if values is None or values.ndim != output.ndim or weights in self.mixtures:
            return False
        return self._mix_positions(values, output, transposed=left is not None, weights=weights)

    def _mix_positions(
        self, value: Tensor, output: Tensor, *, transposed: bool = False, weights: Tensor | None = None
    ) -> bool:
        """Assign the ids of the values to the output: the weights of attention mix positions, not channels.

        The `weights` are those of queries and keys whose channels are not known.
        """
        after = respread(value, tuple(output.mT.shape if transposed else output.shape))
        if after is None or value.ndim - 2 in varying_dims(value):
            return False
        self.ids[output] = after.transpose(-2, -1) if transposed else after
        heads = self._heads(value)
        if self.trace.attentions and self.trace.attentions[-1].value is None:
            self.trace.attentions[-1].value = heads
        elif heads is not None and weights is not None and weights in self.from_image:
            self.trace.attentions.append(Attention(None, None, False, heads))
        return True

    def _note_attention(self, query: Tensor, key: Tensor, *, implicit_scale: bool) -> bool:
        queries, keys = self._heads(query), self._heads(key.transpose(-2, -1))
        if queries is None or keys is None or queries.shape != keys.shape:
            return False
        self.trace.channels.couple(queries, keys)
        self.trace.attentions.append(Attention(queries, keys, implicit_scale))
        return True

    def _heads(self, ids: Tensor) -> Tensor | None:
        """Return the channels of "batch heads tokens head_dim" as "heads head_dim", if they are so."""
        if ids.ndim != 4 or not ids.numel() or not set(varying_dims(ids)) <= {1, 3}:
            return None
        return ids[0, :, 0, :]

    def _follow_mixture(self, name: str, operands: list[Tensor], outputs: list[Tensor]) -> None:
        mixed: set[int] = set().union(*(self.mixtures.get(operand, set()) for operand in operands))
        if name in ELEMENTWISE | RESHAPES | REDUCTIONS | SAME:
            for output in outputs:
                self.mixtures[output] = mixed
        else:
            self.leak(operands, name)

    def leak(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Record that the channels of these tensors are used in a way that pruning would break."""
        for tensor in tensors:
            if tensor in self.ids:
                self.trace.channels.leak(present(self.ids[tensor]), reason)
            self.trace.channels.leak(self.mixtures.get(tensor, ()), reason)


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _reduced_dims(name: str, args: Any, kwargs: Any, ndim: int) -> set[int]:
    place = 2 if "norm" in name else 1  # a norm takes its order first
    dims = kwargs.get("dim", args[place] if len(args) > place else None)
    if dims is None:
        return set(range(ndim))
    return {dim % ndim for dim in (dims if isinstance(dims, tuple | list) else (dims,))}
