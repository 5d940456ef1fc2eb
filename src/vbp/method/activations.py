"""Find which activation f stands between a hidden layer and its consumer, by the values themselves.

With x before and y after it, f is the first of the known functions with sum (f(x) - y)^2 <= 1e-10 sum y^2. Libraries
write activations as modules, functions and methods; what one does shows in what went in and came out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

# Share of the square that rounding may make of it: GELU and its tanh form differ by a thousand times more.
_ROUNDING = 1e-10

ACTIVATIONS: tuple[Activation, ...] = (
    F.gelu,
    lambda values: F.gelu(values, approximate="tanh"),
    F.relu,
    F.silu,
    lambda values: values * torch.sigmoid(1.702 * values),
    lambda values: values,
    F.leaky_relu,
    F.relu6,
    F.hardswish,
    F.mish,
    F.elu,
    F.selu,
    F.softplus,
    lambda values: F.relu(values).square(),
    torch.tanh,
    torch.sigmoid,
)


def find_activation(before: Tensor, after: Tensor) -> Activation | None:
    """Return the known activation that turns one tensor (not in half precision) into the other, or None."""
    if before.shape != after.shape:
        return None
    given, wanted = before.double(), after.double()
    size = wanted.square().sum()
    for activation in ACTIVATIONS:
        if bool((activation(given) - wanted).square().sum() <= _ROUNDING * size):
            return activation
    return None


def slope(activation: Activation, values: Tensor) -> Tensor:
    """Return the derivative at each value."""
    with torch.enable_grad():
        at = values.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(activation(at).sum(), at)
    return derivative
