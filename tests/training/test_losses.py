"""The loss, against its formula written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbp import DistillationLoss, InputError


def logits(seed: int, batch: int = 3, classes: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of a student and of a teacher, and labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, batch, classes, generator=generator, dtype=torch.float64) * scale
    return student, teacher, torch.randint(classes, (batch,), generator=generator)


def log_probabilities(row: list[float], temperature: float) -> list[float]:
    """Return the log-softmax of one row."""
    scaled = [value / temperature for value in row]
    peak = max(scaled)
    normaliser = peak + math.log(math.fsum(math.exp(value - peak) for value in scaled))
    return [value - normaliser for value in scaled]


def formula(loss: DistillationLoss, student: Tensor, teacher: Tensor, labels: Tensor) -> float:
    """Return `alpha * CE + beta * T^2 * sum_c p_c (log p_c - log q_c)`, p the teacher's and q the student's."""
    terms = []
    for own, other, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        q, p = log_probabilities(own, loss.temperature), log_probabilities(other, loss.temperature)
        divergence = math.fsum(math.exp(b) * (b - a) for a, b in zip(q, p, strict=True))
        terms.append(-loss.alpha * log_probabilities(own, 1)[label] + loss.beta * loss.temperature**2 * divergence)
    return math.fsum(terms) / len(terms)


weights = st.floats(0, 2)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), weights, weights, st.floats(0.25, 8))
@settings(deadline=None, max_examples=25)
def test_the_loss_equals_its_formula(
    seed: int, batch: int, classes: int, alpha: float, beta: float, temperature: float
) -> None:
    loss = DistillationLoss(alpha + 0.1, beta, temperature)
    student, teacher, labels = logits(seed, batch, classes)
    expected = formula(loss, student, teacher, labels)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_defaults_are_the_papers() -> None:
    assert DistillationLoss() == DistillationLoss(alpha=0.7, beta=0.3, temperature=2.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_the_gradient_of_the_student_equals_its_formula(temperature: float) -> None:
    loss = DistillationLoss(0.7, 0.3, temperature)
    student, teacher, labels = logits(1)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher, labels), student)
    plain = student.detach().softmax(1) - F.one_hot(labels, 5)
    soft = (student.detach() / temperature).softmax(1) - (teacher / temperature).softmax(1)
    expected = (0.7 * plain + 0.3 * temperature * soft) / len(labels)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_a_high_temperature_leaves_the_size_of_the_gradient() -> None:
    # In the limit the divergence pulls the centred logits together: that is what the factor T^2 is for.
    student, teacher, labels = logits(2)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(DistillationLoss(0, 0.3, 1e5)(student, teacher, labels), student)
    apart = student.detach() - teacher
    expected = 0.3 * (apart - apart.mean(1, keepdim=True)) / apart.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_without_beta_it_is_the_cross_entropy() -> None:
    student, teacher, labels = logits(3)
    assert torch.equal(DistillationLoss(1.0, 0.0, 7.0)(student, teacher, labels), F.cross_entropy(student, labels))


def test_without_alpha_the_labels_do_not_matter_and_the_teacher_itself_has_no_loss() -> None:
    student, teacher, labels = logits(4)
    loss = DistillationLoss(0.0, 0.3, 2.0)
    assert torch.equal(loss(student, teacher, labels), loss(student, teacher, (labels + 1) % 5))
    assert loss(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-15)
    assert loss(student, teacher, labels) > 0.01


def test_certain_teachers_and_students_give_no_nan() -> None:
    student = torch.tensor([[1000.0, 0.0, -1000.0]], dtype=torch.float64, requires_grad=True)
    value = DistillationLoss()(student, -student.detach(), torch.tensor([0]))
    value.backward()  # type: ignore[no-untyped-call]
    # CE is 0; at T = 2 the student gives the teacher's class a log-probability of -1000.
    assert value.item() == pytest.approx(0.3 * 4 * 1000)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf])
def test_a_bad_temperature_is_named(temperature: float) -> None:
    with pytest.raises(InputError, match=f"kd_T must be .*got {temperature}"):
        DistillationLoss(temperature=temperature)


@pytest.mark.parametrize(
    ("alpha", "beta"), [(-0.1, 0.3), (0.7, -0.1), (0.0, 0.0), (math.nan, 0.3), (0.7, math.nan), (math.inf, 0.3)]
)
def test_bad_weights_are_named(alpha: float, beta: float) -> None:
    with pytest.raises(InputError, match=f"kd_alpha and kd_beta must be .*got {alpha} and {beta}"):
        DistillationLoss(alpha, beta)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_a_bad_label_smoothing_is_named(smoothing: float) -> None:
    with pytest.raises(InputError, match=f"label_smoothing must be .*got {smoothing}"):
        DistillationLoss(label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_labels_are_smoothed_in_the_cross_entropy_alone(smoothing: float) -> None:
    student, teacher, labels = logits(5)
    loss = DistillationLoss(label_smoothing=smoothing)
    targets = (1 - smoothing) * F.one_hot(labels, 5).double() + smoothing / 5
    expected = -(targets * student.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss.cross_entropy(student, labels), expected, rtol=1e-12, atol=1e-12)
    change = loss(student, teacher, labels) - DistillationLoss()(student, teacher, labels)
    plain = 0.7 * (expected - F.cross_entropy(student, labels))
    torch.testing.assert_close(change, plain, rtol=1e-9, atol=1e-12)


def test_shares_of_classes_are_taken_as_they_are() -> None:
    student, teacher, _ = logits(6)
    shares = torch.softmax(torch.arange(15, dtype=torch.float32).reshape(3, 5) / 4, dim=1)
    loss = DistillationLoss(label_smoothing=0.3)
    expected = -(shares.double() * student.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss.cross_entropy(student, shares), expected, rtol=1e-12, atol=1e-12)
    whole = loss(student, teacher, shares) - DistillationLoss(0.0, 0.3)(student, teacher, shares)
    torch.testing.assert_close(whole, 0.7 * expected, rtol=1e-9, atol=1e-12)
