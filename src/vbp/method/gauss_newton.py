"""Refit both layers of an MLP, not its consumer alone: one Gauss-Newton step.

With x the input of the hidden layer, f its activation and y the wanted output of the consumer, at the positions t of
a sample with weights w,

    minimise  sum_t w_t |S (y_t - V [f(U [x_t;1]);1])|^2        over U and V, from where they are.

For any U the best V is a ridge regression, so V is left to it and what remains is a function of U alone (variable
projection). Linearised in U, and damped (Levenberg-Marquardt) by a share of what a change of U does to each hidden
channel, it is a linear least squares problem, solved by a few steps of conjugate gradients, whose matrix is never
formed. The last images of the sample are held out: the step is shortened, and in the end not taken, if the error on
them, computed anew, does not fall.

Source: Golub, Pereyra (1973), variable projection; Kaufman (1975), its simpler Jacobian, used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vbp.method.activations import Activation, slope
from vbp.method.ridge import cholesky, ridge_penalty

# Steps of conjugate gradients: on DeiT-tiny the eighth and the sixteenth lower the error by 1 % of what four do.
_STEPS = 4

# Shares of the step that are tried; the last leaves the hidden layer alone.
_LENGTHS = (1.0, 0.5, 0.25, 0.0)

# Share of the sample that is held out: its last images.
HELD_OUT_SHARE = 1 / 8

# The output metric is mixed half and half with the plain one, as in `vbp.method.fisher`.
_SHARE = 0.5


@dataclass(frozen=True)
class MLPSample:
    """Hold the input of an MLP and the output wanted of it: as many positions of each of `images` images, in order.

    `inputs` are those of the hidden layer or, where that layer is not fitted, of the consumer. `weights` say what
    each position counts for, not negative. `metric` is that of the outputs, symmetric; its scale does not matter.
    """

    inputs: Float[Tensor, "positions in"]
    outputs: Float[Tensor, "positions out"]
    weights: Float[Tensor, "positions"]
    metric: Float[Tensor, "out out"]
    images: int

    def to(self, device: torch.device | str) -> MLPSample:
        """Move to another device."""
        inputs, outputs, weights, metric = (
            one.to(device) for one in (self.inputs, self.outputs, self.weights, self.metric)
        )
        return MLPSample(inputs, outputs, weights, metric, self.images)

    def split(self) -> tuple[MLPSample, MLPSample]:
        """Return the images that are fitted to, and the held-out ones; a single image is both."""
        last = max(1, round(HELD_OUT_SHARE * self.images)) if self.images > 1 else 0
        rest = self.images - last
        place = rest * (len(self.weights) // self.images)
        one, other = (
            MLPSample(self.inputs[part], self.outputs[part], self.weights[part], self.metric, images)
            for part, images in ((slice(None, place), rest), (slice(place if last else 0, None), last or rest))
        )
        return one, other


class HiddenLayers(NamedTuple):
    """Hold the weights of both layers, the bias as their last column."""

    hidden: Float[Tensor, "hidden in_and_one"] | None
    consumer: Float[Tensor, "out hidden_and_one"]


@dataclass(frozen=True)
class HiddenFit:
    """Hold the fitted layers, and the error on held-out images, as a share of the output's variance.

    If nothing is better than what was given, the layers are those, and `after` is `before`.
    """

    layers: HiddenLayers
    before: float
    after: float

    @property
    def better(self) -> bool:
        """Return whether the fit lowers the error."""
        return self.after < self.before


def fit_hidden(
    layers: HiddenLayers,
    activation: Activation,
    sample: MLPSample,
    *,
    ridge: float,
    damping: float,
) -> HiddenFit:
    """Bring an MLP nearer to the wanted output, from the given layers, which have the sample's type and device.

    Without a hidden layer the consumer alone is fitted, to a sample of what it reads. `ridge` times `ridge_penalty`
    at 1 regularises the change of the consumer; `damping` times its squared effect, channel by channel, that of the
    hidden layer.

    Raises:
        InputError: Covariances are not finite.
    """
    problem, held_out = (_Problem(activation, part, ridge, damping) for part in sample.split())
    start = held_out.error(layers)
    if start <= torch.finfo(sample.outputs.dtype).eps:
        return HiddenFit(layers, start, start)  # rounding alone
    best, least = layers, start
    change = None if layers.hidden is None else problem.change(layers.hidden, layers.consumer)
    for length in _LENGTHS:
        hidden = None if layers.hidden is None or change is None else layers.hidden + length * change
        fitted = HiddenLayers(hidden, problem.consumer(hidden, layers.consumer))
        if (error := held_out.error(fitted)) < least:
            best, least = fitted, error
            break
    return HiddenFit(best, start, least)


class _Problem:
    """Hold the sample with the roots of its weights; all sums over positions are so weighted means."""

    def __init__(self, activation: Activation, sample: MLPSample, ridge: float, damping: float) -> None:
        self._activation, self._ridge, self._damping = activation, ridge, damping
        self._inputs = F.pad(sample.inputs, (0, 1), value=1.0)
        self._outputs = sample.outputs
        self._root = (sample.weights / sample.weights.sum()).sqrt()[:, None]
        self._metric = _root_of(sample.metric).to(sample.outputs.dtype)
        centred = self._outputs - (self._root.square() * self._outputs).sum(0)
        self._energy = float(self._weighed(centred).square().sum())

    def error(self, layers: HiddenLayers) -> float:
        """Return the squared error, as a share of the output's variance."""
        residual = self._residual(self._read(layers.hidden), layers.consumer)
        return float(self._weighed(residual).square().sum()) / max(self._energy, torch.finfo(torch.float64).tiny)

    def consumer(self, hidden: Tensor | None, consumer: Tensor) -> Float[Tensor, "out hidden_and_one"]:
        """Return the best consumer for this hidden layer, regularised towards the present one."""
        read = self._read(hidden)
        residual = self._residual(read, consumer)
        regression = _Regression(read, self._root, self._ridge)
        change = regression.coefficients(self._root * residual)
        level = (self._root.square() * residual).sum(0)
        return consumer + torch.cat([change.T, (level - regression.mean @ change)[:, None]], 1)

    def change(self, hidden: Tensor, consumer: Tensor) -> Float[Tensor, "hidden in_and_one"]:
        """Return the step of the hidden layer, the consumer following it."""
        before = self._inputs @ hidden.T
        read, bend = self._activation(before), self._root * slope(self._activation, before)
        del before
        regression = _Regression(read, self._root, self._ridge)
        weight = self._metric @ consumer[:, :-1]

        def forward(step: Tensor) -> Tensor:
            return regression.rest((bend * (self._inputs @ step.T)) @ weight.T)

        def backward(rest: Tensor) -> Tensor:
            return (bend * (rest @ weight)).T @ self._inputs

        # What a change of one channel's row does, other channels left aside: penalty and preconditioner.
        size = weight.square().sum(0) * bend.square().sum(0)
        size = size.clamp_min(float(size.max()) * 1e-6).clamp_min(torch.finfo(size.dtype).tiny)[:, None]
        gram = (self._root * self._inputs).double()
        gram = gram.T @ gram
        gram.diagonal().add_(ridge_penalty(gram, 1e-3))
        factor = cholesky(gram, 1e-3)

        def damped(step: Tensor) -> Tensor:
            return self._damping * size * (step.double() @ gram).to(step.dtype)

        def conditioned(slopes: Tensor) -> Tensor:
            solved: Tensor = torch.cholesky_solve(slopes.T.double(), factor)
            return solved.T.to(slopes.dtype) / ((1 + self._damping) * size)

        slopes = backward(regression.rest(self._weighed(self._residual(read, consumer))))
        return _conjugate_gradient(slopes, lambda step: backward(forward(step)) + damped(step), conditioned)

    def _read(self, hidden: Tensor | None) -> Float[Tensor, "positions hidden"]:
        return self._inputs[:, :-1] if hidden is None else self._activation(self._inputs @ hidden.T)

    def _residual(self, read: Tensor, consumer: Tensor) -> Float[Tensor, "positions out"]:
        return self._outputs - read @ consumer[:, :-1].T - consumer[:, -1]

    def _weighed(self, outputs: Float[Tensor, "positions out"]) -> Float[Tensor, "positions out"]:
        return self._root * (outputs @ self._metric.T)


class _Regression:
    """Ridge regression on the hidden channels and a constant."""

    def __init__(self, hidden: Float[Tensor, "positions hidden"], root: Tensor, ridge: float) -> None:
        self._root = root
        self.mean = (root.square() * hidden).sum(0)
        self._centred = root * (hidden - self.mean)
        covariance = (self._centred.T @ self._centred).double()
        covariance.diagonal().add_(ridge * ridge_penalty(covariance, 1.0))
        self._factor = cholesky(covariance, ridge)

    def coefficients(self, values: Float[Tensor, "positions out"]) -> Float[Tensor, "hidden out"]:
        """Return those of the channels, for values that carry the roots of their weights."""
        solved: Tensor = torch.cholesky_solve((self._centred.T @ values).double(), self._factor)
        return solved.to(values.dtype)

    def rest(self, values: Float[Tensor, "positions out"]) -> Float[Tensor, "positions out"]:
        """Return what the regression leaves of values that carry the roots of their weights."""
        values = values - self._root * (self._root * values).sum(0)
        return values - self._centred @ self.coefficients(values)


def _conjugate_gradient(slopes: Tensor, matrix: Activation, conditioned: Activation) -> Tensor:
    """Solve a linear system by some steps of preconditioned conjugate gradients from zero."""
    solution = torch.zeros_like(slopes)
    along = step = conditioned(slopes)
    length = (slopes * along).sum()
    for _ in range(_STEPS):
        if not float(length) > 0:
            break  # solved
        image = matrix(step)
        share = length / (step * image).sum()
        solution = solution + share * step
        slopes = slopes - share * image
        along = conditioned(slopes)
        longer = (slopes * along).sum()
        step, length = along + longer / length * step, longer
    return solution


def _root_of(metric: Float[Tensor, "out out"]) -> Float[Tensor, "out out"]:
    """Return S with S'S the metric mixed with the plain one, of mean diagonal 1."""
    metric = metric.double()
    plain = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    trace = metric.trace()
    mixed = plain if not float(trace) > 0 else _SHARE * len(metric) / trace * metric + (1 - _SHARE) * plain
    values, vectors = torch.linalg.eigh(mixed)
    root: Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.T
    return root
