"""An epoch of fine-tuning does what a training loop written by hand does, to the last bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbp import DistillationLoss, InputError, Trainer

Batch = tuple[Tensor, Tensor]
CPU = torch.device("cpu")
RATE = 0.03


class Loader:
    """Batches of different sizes in an order that depends on the epoch, as the real loader's."""

    def __init__(self, sizes: tuple[int, ...] = (4, 4, 3), classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(5)
        self.batches: list[Batch] = [
            (
                torch.randn(size, 4, generator=generator, dtype=torch.float64),
                torch.randint(classes, (size,), generator=generator),
            )
            for size in sizes
        ]
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def of(self, epoch: int) -> list[Batch]:
        """Give the batches of an epoch."""
        turn = epoch % max(1, len(self.batches))
        return self.batches[turn:] + self.batches[:turn]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.of(self.epochs[-1]))


def network(seed: int, classes: int = 3) -> nn.Module:
    """Give a small classifier in float64, without dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.BatchNorm1d(6), nn.Linear(6, classes)).double()


LOSS = DistillationLoss(0.6, 0.4, 3.0)


def loss_by_hand(logits: Tensor, labels: Tensor, teacher: nn.Module | None, pixels: Tensor) -> Tensor:
    """Give the loss of one batch."""
    if teacher is None:
        return F.cross_entropy(logits, labels)
    with torch.no_grad():
        target = teacher(pixels)
    return LOSS(logits, target, labels)


def train_by_hand(model: nn.Module, batches: Iterable[Batch], steps: int, teacher: nn.Module | None) -> list[float]:
    """Train with AdamW and a cosine, the plainest way, and give the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    model.train()
    for pixels, labels in batches:
        loss = loss_by_hand(model(pixels), labels, teacher, pixels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def trainer(student: nn.Module, steps: int, teacher: nn.Module | None = None) -> Trainer:
    """Set up what the tests compare."""
    return Trainer.of(student, steps=steps, learning_rate=RATE, device=CPU, teacher=teacher, loss=LOSS)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("epochs", [1, 2])
def test_epochs_equal_a_loop_by_hand_bit_for_bit(taught: bool, epochs: int) -> None:
    loader, teacher = Loader(), network(9).eval() if taught else None
    student = network(1)
    expected = copy.deepcopy(student)
    steps = epochs * len(loader)
    batches = [batch for epoch in range(1, epochs + 1) for batch in loader.of(epoch)]
    losses = train_by_hand(expected, batches, steps, teacher)
    # The evaluation between two epochs leaves the student in evaluation mode.
    ours = trainer(student.eval(), steps, teacher)
    results = [ours.train_epoch(loader, epoch) for epoch in range(1, epochs + 1)]
    assert loader.epochs == list(range(1, epochs + 1))
    for name, value in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
    sizes = [len(labels) for _, labels in batches]
    for epoch, result in enumerate(results):
        part = slice(epoch * len(loader), (epoch + 1) * len(loader))
        mean = math.fsum(a * b for a, b in zip(losses[part], sizes[part], strict=True)) / sum(sizes[part])
        assert result.loss == pytest.approx(mean, rel=1e-14)
        assert (result.epoch, result.images) == (epoch + 1, 11)


@pytest.mark.parametrize("taught", [False, True])
def test_an_epoch_equals_the_formulas_of_adamw_and_the_cosine(taught: bool) -> None:
    loader, teacher = Loader((5, 5, 5, 2)), network(9).eval() if taught else None
    student = network(1)
    expected = copy.deepcopy(student).train()
    # Decoupled weight decay, Adam with bias correction, and the rate of step k of n: (1 + cos(pi k / n)) / 2.
    first = [torch.zeros_like(value) for value in expected.parameters()]
    second = [torch.zeros_like(value) for value in expected.parameters()]
    for step, (pixels, labels) in enumerate(loader.of(1)):
        rate = RATE * (1 + math.cos(math.pi * step / len(loader))) / 2
        loss = loss_by_hand(expected(pixels), labels, teacher, pixels)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for value, gradient, m, v in zip(expected.parameters(), gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.999).add_(0.001 * gradient**2)
                direction = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                value.sub_(rate * 0.01 * value + rate * direction)
    trainer(student, len(loader), teacher).train_epoch(loader, 1)
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_rate_follows_one_cosine_to_0_over_all_epochs(epochs: int) -> None:
    loader = Loader()
    steps = epochs * len(loader)
    rates: list[float] = []

    def watched(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            rates.append(ours.optimizer.param_groups[0]["lr"])
            yield batch

    ours = trainer(network(1), steps)
    results = [ours.train_epoch(loader, epoch, watched) for epoch in range(1, epochs + 1)]
    expected = [RATE * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert [result.learning_rate for result in results] == rates[:: len(loader)]
    assert ours.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-15)


def test_accuracy_is_of_the_answers_before_each_step() -> None:
    loader, student = Loader(), network(1)
    seen: list[Tensor] = []
    student.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    result = trainer(student, 3).train_epoch(loader, 1)
    right = sum(
        int(row.argmax()) == label
        for logits, (_, labels) in zip(seen, loader.of(1), strict=True)
        for row, label in zip(logits, labels.tolist(), strict=True)
    )
    assert result.top1 == pytest.approx(100 * right / 11, rel=1e-14)
    assert 0 < right < 11


def test_the_teacher_stays_as_it_was_and_teaches_in_evaluation_mode() -> None:
    teacher, student = network(9).train(), network(1)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    modes: list[tuple[bool, bool]] = []
    teacher.register_forward_hook(lambda module, args, out: modes.append((module[2].training, out.requires_grad)))
    ours = trainer(student, 3, teacher)
    assert not teacher.training
    ours.train_epoch(Loader(), 1)
    assert modes == [(False, False)] * 3
    assert all(torch.equal(state[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.training


def test_without_a_teacher_the_loss_settings_change_nothing() -> None:
    students = [network(1), network(1)]
    for student, loss in zip(students, (LOSS, DistillationLoss(0.1, 2.0, 9.0)), strict=True):
        Trainer.of(student, steps=3, learning_rate=RATE, device=CPU, loss=loss).train_epoch(Loader(), 1)
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True))


class Wrapped(nn.Module):
    """A classifier with the output of a Hugging Face one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inner(pixels))


def test_hugging_face_outputs_train_the_same() -> None:
    plain, wrapped = network(1), network(1)
    trainer(plain, 3, network(9)).train_epoch(Loader(), 1)
    trainer(Wrapped(wrapped), 3, Wrapped(network(9))).train_epoch(Loader(), 1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))


@pytest.mark.parametrize("spoil", [lambda x: x * math.inf, lambda x: x * math.nan])
@pytest.mark.parametrize("taught", [False, True])
def test_a_loss_that_is_no_number_stops_the_run(spoil: Callable[[Tensor], Tensor], taught: bool) -> None:
    loader = Loader()
    loader.batches[1] = (spoil(loader.batches[1][0]), loader.batches[1][1])
    with pytest.raises(InputError, match=r"diverged: the loss of epoch 2 is nan .*lower --lr_ft"):
        trainer(network(1), 3, network(9) if taught else None).train_epoch(loader, 2)


def test_an_epoch_without_images_is_an_error() -> None:
    with pytest.raises(InputError, match="image"):
        trainer(network(1), 0).train_epoch(Loader(()), 1)
