"""The convex problem behind the refit of the last linear layer: pure tensor functions.

With f the features that the layer reads, standardised to x = (f - m) / d over the images, its weight W takes a map B
and a shift c:

    z = W (f + B x + c) + b,    minimise  mean_i KL(dense_i || softmax z_i) + s h / 2 (|B|^2 + |c|^2 / 100)

with h the mean curvature of the KL by one feature's shift, so that the strength s has no unit. z is linear in B and
c and the KL convex in z, so the least is unique. L-BFGS finds it from B = 0, c = 0. Where z are features, not logits,
the sum over outputs j of w_j (z_j - dense_j)^2 stands in the place of the KL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FOLDS = 4

# The shift is one in (features + 1) of the coefficients, and better known than the others.
_SHIFT = 0.01
_STEPS = 50

# Nats, and length of a step: far below the accuracy that a thousand images allow.
_CHANGE = 1e-6


@dataclass(frozen=True)
class HeadProblem:
    """Hold the convex problem of some images; `inputs` are x with a one for the shift."""

    weight: Float[Tensor, "classes features"]
    bias: Float[Tensor, "classes"]
    features: Float[Tensor, "images features"]
    inputs: Float[Tensor, "images features_and_one"]
    target: Float[Tensor, "images classes"]
    mean: Float[Tensor, "features"]
    scale: Float[Tensor, "features"]
    weights: Float[Tensor, "classes"] | None = None

    @staticmethod
    def of(layer: nn.Linear, features: Tensor, target: Tensor, weights: Tensor | None = None) -> HeadProblem:
        """Take what the layer reads, and the dense model's log-probabilities, or, with `weights`, its features."""
        weight = layer.weight.detach().to("cpu", features.dtype)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().to("cpu", weight.dtype)
        mean, scale = features.mean(0), features.std(0, correction=0)
        # A feature that is the same in all images differs by rounding alone.
        scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.inf)
        inputs = F.pad((features - mean) / scale, (0, 1), value=1.0)
        weights = None if weights is None else weights.to(weight)
        return HeadProblem(weight, bias, features, inputs, target, mean, scale, weights)

    @property
    def logits(self) -> Float[Tensor, "images classes"]:
        """Return the logits without a change."""
        return self.features @ self.weight.T + self.bias

    def divergence(self, change: Tensor | None) -> float:
        """Return the mean KL, or squared error, after a change, or without one."""
        return float(self.errors(change).mean())

    def errors(self, change: Tensor | None) -> Float[Tensor, "images"]:
        """Return the KL, or squared error, of each image after a change, or without one."""
        logits = self.logits
        if change is not None:
            logits = logits + self.inputs @ change @ self.weight.T
        return self._errors(logits)

    def rows(self, chosen: Tensor) -> HeadProblem:
        """Return the problem of some of the images, in the same coordinates."""
        features, inputs, target = self.features[chosen], self.inputs[chosen], self.target[chosen]
        return replace(self, features=features, inputs=inputs, target=target)

    def cross_validated(self, strength: float, views: int = 1) -> float:
        """Return the mean KL on images left out of the fit, with all their `views`, which are neighbours.

        Where the first fold is worse than without a change by more than twice the standard error of the difference,
        it is infinite: the other folds are not tried.
        """
        images = len(self.features)
        fold = torch.arange(images) // views % FOLDS
        divergence = 0.0
        for number in range(FOLDS):
            out = fold == number
            left_out = self.rows(out)
            found = left_out.errors(self.rows(~out).fit(strength))
            lost = found - left_out.errors(None)
            if number == 0 and float(lost.mean()) > 2 * float(lost.std(correction=0)) / len(lost) ** 0.5:
                return math.inf
            divergence += float(found.sum()) / images
        return divergence

    def fit(self, strength: float) -> Float[Tensor, "features_and_one features"]:
        """Return B' and, as the last row, c."""
        penalty = torch.full((self.inputs.shape[1], 1), 0.5 * strength * self._curvature(), dtype=self.weight.dtype)
        penalty[-1] *= _SHIFT
        start = self.logits
        change = torch.zeros(self.inputs.shape[1], self.weight.shape[1], dtype=start.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [change], max_iter=_STEPS, history_size=10, tolerance_change=_CHANGE, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = start + self.inputs @ change @ self.weight.T
            value = self._errors(logits).mean() + (penalty * change.square()).sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        return change.detach()

    def _curvature(self) -> float:
        """Return the mean over features of the error's second derivative by a feature's shift, at the target."""
        if self.weights is not None:
            return float(2 * (self.weights @ self.weight.square()).mean())
        probabilities = self.target.exp()
        centre = probabilities @ self.weight
        whole = self.weight.square().sum(1) @ probabilities.mean(0) - centre.square().sum(1).mean()
        return float(whole) / self.weight.shape[1]

    def fold_into_weight(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's weight and bias with a change folded in."""
        weight, change = self.weight.double(), change.double()
        move = (change[:-1] / self.scale.double()[:, None]).T
        return weight + weight @ move, self.bias.double() + weight @ (change[-1] - move @ self.mean.double())

    def _errors(self, logits: Tensor) -> Float[Tensor, "images"]:
        if self.weights is None:
            return F.kl_div(logits.log_softmax(-1), self.target, log_target=True, reduction="none").sum(1)
        return (logits - self.target).square() @ self.weights
