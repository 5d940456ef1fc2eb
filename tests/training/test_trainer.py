"""An epoch of fine-tuning does what a training loop written by hand does, to the last bit, stopped or not."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbp import DistillationLoss, InputError, Trainer, TrainerSettings
from vbp.runtime.precision import Precision
from vbp.training.evaluate import evaluate
from vbp.training.meters import EpochResult, steps_per_epoch
from vbp.training.mixup import Mixup

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
        self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.epochs.append(epoch)
        self.start = start

    def global_size(self, batch: int) -> int:
        return len(self.of(self.epochs[-1])[batch][1])

    def of(self, epoch: int) -> list[Batch]:
        """Return the batches of an epoch."""
        turn = epoch % max(1, len(self.batches))
        return self.batches[turn:] + self.batches[:turn]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.of(self.epochs[-1])[self.start :])


def network(seed: int, classes: int = 3) -> nn.Module:
    """Return a small classifier in float64, without dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.BatchNorm1d(6), nn.Linear(6, classes)).double()


LOSS = DistillationLoss(0.6, 0.4, 3.0)


def loss_by_hand(logits: Tensor, labels: Tensor, teacher: nn.Module | None, pixels: Tensor) -> Tensor:
    """Return the loss of one batch."""
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


def adamw(steps: int, **changes: Any) -> TrainerSettings:
    """Return what the trainers here have in common."""
    return TrainerSettings(steps, RATE, **{"loss": LOSS, **changes})


def trainer(student: nn.Module, steps: int, teacher: nn.Module | None = None) -> Trainer:
    """Set up what the tests compare."""
    return Trainer(student, adamw(steps), device=CPU, teacher=teacher)


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
        Trainer(student, adamw(3, loss=loss), device=CPU).train_epoch(Loader(), 1)
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


def plain(seed: int, dropout: float = 0.0) -> nn.Module:
    """Return a small classifier in float64 whose images do not meet."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(dropout), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("taught", [False, True])
def test_accumulated_batches_equal_one_large_batch(taught: bool) -> None:
    teacher = plain(9) if taught else None
    parts, whole = Loader((4, 4, 3, 2, 1)), Loader(())
    # Steps of three batches, then two: 11 and 3 images.
    whole.batches = [
        tuple(torch.cat(both) for both in zip(*parts.of(5)[part], strict=True))  # type: ignore[misc]
        for part in (slice(3), slice(3, 5))
    ]
    students, results = [plain(1), plain(1)], []
    for student, loader, accumulate in zip(students, (parts, whole), (3, 1), strict=True):
        ours = Trainer(student, adamw(4, accumulate=accumulate), device=CPU, teacher=teacher)
        results.append([ours.train_epoch(loader, epoch) for epoch in (10, 20)])
        assert ours.steps_done == 4
    for value, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
    for of_parts, of_whole in zip(*results, strict=True):
        assert of_parts.loss == pytest.approx(of_whole.loss, rel=1e-12)
        assert (of_parts.top1, of_parts.images) == (of_whole.top1, 14)


@pytest.mark.parametrize(("batches", "accumulate", "steps"), [(6, 1, 6), (6, 3, 2), (7, 3, 3), (1, 8, 1)])
def test_the_last_step_of_an_epoch_may_have_fewer_batches(batches: int, accumulate: int, steps: int) -> None:
    assert steps_per_epoch(batches, accumulate) == steps
    ours = Trainer(plain(1), TrainerSettings(steps, RATE, accumulate=accumulate), device=CPU)
    ours.train_epoch(Loader((2,) * batches), 1)
    assert ours.steps_done == steps
    assert ours.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_gradients_are_measured_before_they_are_clipped(clip: float | None) -> None:
    loader, student, norms = Loader(), plain(1), []
    expected = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=RATE, weight_decay=0.2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for pixels, labels in loader.of(1):
        optimizer.zero_grad()
        F.cross_entropy(expected(pixels), labels, label_smoothing=0.1).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(expected.parameters(), clip or math.inf)))
        optimizer.step()
        scheduler.step()
    loss = DistillationLoss(label_smoothing=0.1)
    settings = TrainerSettings(3, RATE, weight_decay=0.2, clip_grad=clip, measure_gradients=True, loss=loss)
    ours = Trainer(student, settings, device=CPU)
    result = ours.train_epoch(loader, 1)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), expected.parameters(), strict=True))
    assert result.gradient_norm == pytest.approx(math.fsum(norms) / 3, rel=1e-12)
    assert min(norms) > 0.2


def test_the_moving_average_is_evaluated_and_the_student_is_trained() -> None:
    loader, student, seen = Loader(), network(1), []
    ours = Trainer(student, TrainerSettings(3, RATE, ema_decay=0.7), device=CPU)
    result = ours.train_epoch(loader, 1, after_step=lambda: seen.append(copy.deepcopy(student.state_dict())))
    expected = seen[0]
    for state in seen[1:]:
        expected = {
            name: 0.7 * expected[name] + 0.3 * value if value.is_floating_point() else value
            for name, value in state.items()
        }
    assert ours.evaluated is not student
    for name, value in ours.evaluated.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-15)
    assert result.loss == trainer(network(1), 3).train_epoch(Loader(), 1).loss


def test_student_and_teacher_see_the_same_mixed_images() -> None:
    student, teacher, seen = pictures(1), pictures(9), []
    for model in (student, teacher):
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    loader = Pictures((4, 3))
    mixing = Mixup(mixup=0.8, num_classes=3, seed=4)
    ours = Trainer(student, TrainerSettings(2, RATE, mixup=mixing), device=CPU, teacher=teacher)
    ours.train_epoch(loader, 2)
    for number, (pixels, labels) in enumerate(loader.of(2)):
        mixed, _ = mixing(pixels, labels, epoch=2, batch=number)
        assert torch.equal(seen[2 * number], mixed)
        assert torch.equal(seen[2 * number + 1], mixed)


class Drawing(nn.Module):
    """Draws from each of the three generators that a training step may use."""

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        return F.dropout(values, 0.3) * (1 + 0.1 * random.random() + 0.1 * np.random.random())


class Pictures(Loader):
    """The loader with images for Mixup."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__(sizes)
        generator = torch.Generator().manual_seed(6)
        self.batches = [
            (torch.randn(len(labels), 3, 4, 4, generator=generator, dtype=torch.float64), labels)
            for _, labels in self.batches
        ]


def pictures(seed: int) -> nn.Module:
    """Return a classifier of images in float64 that draws random numbers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 6), nn.GELU(), Drawing(), nn.BatchNorm1d(6), nn.Linear(6, 3)
    ).double()


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Ends training after a step."""


def everything(seed: int, *, mixing: bool = True) -> Trainer:
    """Set up a trainer with all that has a state: two epochs of three steps."""
    settings = TrainerSettings(
        steps=6, warmup_steps=2 if mixing else 0, learning_rate=RATE, accumulate=2, clip_grad=0.5, ema_decay=0.8,
        measure_gradients=True, mixup=Mixup(0.8, 1.0, 0.1, num_classes=3, seed=4) if mixing else None,
    )  # fmt: skip
    return Trainer(pictures(seed), settings, device=CPU, teacher=pictures(9))


def saved(trainer: Trainer) -> io.BytesIO:
    """Write both states to a file."""
    file = io.BytesIO()
    torch.save((trainer.state_dict(), trainer.process_state()), file)
    file.seek(0)
    return file


def train_on(trainer: Trainer, after_step: Callable[[], None] | None = None) -> list[EpochResult]:
    """Train what is left of two epochs."""
    loader = Pictures((4, 4, 4, 3, 4))
    return [trainer.train_epoch(loader, epoch, after_step=after_step) for epoch in range(max(1, trainer.epoch), 3)]


def same(one: Any, other: Any) -> bool:
    """Compare nested states bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def timeless(result: EpochResult) -> tuple[Any, ...]:
    """Return what does not depend on the clock."""
    return (result.epoch, result.loss, result.top1, result.learning_rate, result.images, result.gradient_norm)


def begin(seed: int) -> None:
    """Seed every generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6])
def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(stop: int, mixing: bool) -> None:
    def after_step() -> None:
        if stopped.steps_done == stop:
            raise Stopped

    through, stopped = everything(1, mixing=mixing), everything(1, mixing=mixing)
    begin(3)
    expected, end = train_on(through), through.process_state()
    begin(3)
    with pytest.raises(Stopped):
        train_on(stopped, after_step)
    file = saved(stopped)
    # Another process: other weights, other random numbers.
    resumed = everything(5, mixing=mixing)
    begin(7)
    resumed.load_state_dict(*torch.load(file, weights_only=True))
    assert (resumed.epoch, resumed.batches_done) == (1 + stop // 4, (2, 4, 5)[(stop - 1) % 3])
    check_ends_as(resumed, through, expected, end)


def test_training_goes_on_between_epochs_too() -> None:
    through, resumed = everything(1), everything(5)
    begin(3)
    first = through.train_epoch(Pictures((4, 4, 4, 3, 4)), 1)
    file = saved(through)
    expected = [first, through.train_epoch(Pictures((4, 4, 4, 3, 4)), 2)]
    end = through.process_state()
    resumed.load_state_dict(*torch.load(file, weights_only=True))
    check_ends_as(resumed, through, expected, end)


def check_ends_as(resumed: Trainer, through: Trainer, expected: list[EpochResult], end: dict[str, Any]) -> None:
    """Train to the end and compare with training that went through."""
    results = train_on(resumed)
    assert same(resumed.state_dict(), through.state_dict())
    last = resumed.process_state()
    assert all(same(last[name], end[name]) for name in ("random", "sums", "learning_rate"))
    assert [timeless(result) for result in results] == [timeless(result) for result in expected][-len(results) :]


def test_an_epoch_that_is_done_is_not_trained_again() -> None:
    ours, loader = trainer(network(1), 3), Loader()
    result = ours.train_epoch(loader, 1)
    state = copy.deepcopy(ours.state_dict())
    assert timeless(ours.train_epoch(loader, 1)) == timeless(result)
    assert same(ours.state_dict(), state)


def test_autocast_trains_as_the_loop_by_hand_does_and_the_loss_is_in_float32() -> None:
    loader, student, teacher = Loader(), plain(1).float(), plain(9).float()
    loader.batches = [(pixels.float(), labels) for pixels, labels in loader.batches]
    expected, kinds = copy.deepcopy(student), []
    optimizer = torch.optim.AdamW(expected.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for pixels, labels in loader.of(1):
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = expected(pixels), teacher(pixels).detach()
        kinds.append(logits.dtype)
        optimizer.zero_grad()
        LOSS(logits.float(), target.float(), labels).backward()
        optimizer.step()
        scheduler.step()
    precision = Precision.choose("bf16", CPU)
    Trainer(student, adamw(3), device=CPU, teacher=teacher, precision=precision).train_epoch(loader, 1)
    assert kinds == [torch.bfloat16] * 3
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), expected.parameters(), strict=True))


def test_steps_that_fp16_cannot_hold_are_left_out_and_counted() -> None:
    loader, student, seen = Loader((4, 4, 4)), plain(1).float(), []
    loader.batches = [(pixels.float(), labels) for pixels, labels in loader.batches]

    def after_step() -> None:
        seen.append(copy.deepcopy(student.state_dict()))
        scale = ours.state_dict()["scaler"]["scale"]
        ours.load_state_dict(
            ours.state_dict()
            | {"scaler": ours.state_dict()["scaler"] | {"scale": 2.0**60 if len(seen) == 1 else scale}},
            ours.process_state(),
        )

    settings = TrainerSettings(3, RATE, clip_grad=1.0, measure_gradients=True)
    ours = Trainer(student, settings, device=CPU, precision=Precision(torch.float16, "cpu"))
    result = ours.train_epoch(loader, 1, after_step=after_step)
    assert result.skipped_steps == 2
    assert same(seen[0], seen[2])
    assert result.gradient_norm is not None
    assert 0 < result.gradient_norm < 10
    assert math.isfinite(result.loss)


def test_the_compiled_model_trains_the_same_under_the_names_of_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    # The real back end takes half a minute; this one captures and differentiates as it does.
    monkeypatch.setattr(torch, "compile", lambda module: compiled(module, backend="aot_eager"))
    students, results, correct = [network(1), network(1)], [], []
    for student, compile in zip(students, (False, True), strict=True):
        ours = Trainer(student, adamw(3, compile=compile), device=CPU, teacher=network(9))
        results.append(ours.train_epoch(Loader((4, 4, 4)), 1))
        assert list(ours.state_dict()["student"]) == list(network(1).state_dict())
        assert ours.evaluated is student
        assert (ours.predictor is student) == (not compile)
        correct.append(evaluate(ours.predictor, Loader().batches, CPU))
    assert correct[0] == correct[1]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-12)
    for value, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "grad_accum must be at least 1, got 0"),
        ({"clip_grad": 0.0}, "clip_grad must be above 0 and finite, got 0.0"),
        ({"clip_grad": math.nan}, "clip_grad must be above 0 and finite, got nan"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"warmup_steps": 3}, "got 3 warm-up steps of 3; lower --warmup_epochs"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(plain(1), TrainerSettings(3, RATE, **settings), device=CPU)
