"""Torch functions by what they do to channels, under the names that Python, torch and torch.nn.functional share."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions of one value alone that bend.
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
# Functions that work on each channel's positions.
POSITIONAL = _names(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d interpolate max_pool1d "
    "max_pool2d pad upsample"
)
REDUCTIONS = _names("amax amin linalg_vector_norm max mean norm std sum var vector_norm")
PRODUCTS = _names("__matmul__ bmm matmul scaled_dot_product_attention")
# Questions about a tensor: they read no values.
QUERIES = _names(
    "__len__ dim size stride numel nelement is_contiguous is_floating_point is_complex element_size type get_device "
    "data_ptr ndimension requires_grad_ __hash__ __repr__ __bool__ is_same_size"
)
