"""The residual stream as a target: where it is, its error against one computed by hand, and training by it."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, randomise_
from torch import Tensor, nn

from vbp import DistillationLoss, InputError, Trainer, TrainerSettings, find_sites, make_plan, prune_
from vbp.pruning.criteria import variance_scores
from vbp.sites.residual import find_residual_adds
from vbp.statistics.collect import collect_statistics
from vbp.statistics.images import GivenImages
from vbp.statistics.stream_target import StreamTarget

CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, hidden), nn.Linear(hidden, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
        return out


class Net(nn.Module):
    """Two blocks over sixteen tokens, and a head that reads their mean."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 5)
        self.blocks = nn.Sequential(Block(hidden), Block(hidden))

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.stem(pixels).flatten(2).transpose(1, 2)
        out: Tensor = self.head(self.blocks(tokens).mean(1))
        return out


def net(seed: int, hidden: int = 12) -> Net:
    torch.manual_seed(seed)
    return Net(hidden)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def found(teacher: nn.Module, student: nn.Module, images: Tensor) -> StreamTarget | None:
    sites = find_sites(student, images[:1])
    return StreamTarget.find(teacher, student, sites, images[:1], GivenImages([images]))


def streams(model: Net, images: Tensor) -> list[Tensor]:
    first = model.blocks[0](model.stem(images).flatten(2).transpose(1, 2))
    return [first, model.blocks[1](first)]


def test_the_error_is_the_standardised_one_of_tokens_and_their_mean(images: Tensor) -> None:
    teacher, student = net(0).double(), net(1).double()
    target = found(teacher, student, images.double())
    assert target is not None
    assert target.modules == ("blocks.0", "blocks.1")
    some = images[:7].double()
    watch = target.watch(student, teacher)
    with watch.watching():
        student(some)
        teacher(some)
        loss = watch.loss()
    expected = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for wanted, given, every in zip(
            streams(teacher, some), streams(student, some), streams(teacher, images.double()), strict=True
        ):
            for pool in (lambda x: x, lambda x: x.mean(1, keepdim=True)):
                variance = pool(every).flatten(0, 1).var(0, correction=0)
                variance = variance + 0.01 * variance.mean()
                expected += ((pool(wanted) - pool(given)).square() / variance).mean() / 4
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    loss.backward()
    assert all(each.grad is None for each in teacher.parameters())
    assert student.blocks[0].fc1.weight.grad is not None
    # What was noted is gone, and so are the hooks.
    assert not student.blocks[0]._forward_hooks
    assert watch._student == watch._teacher == {}


def test_there_is_none_between_streams_of_other_widths_or_where_nothing_is_added(images: Tensor) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 5))
    assert found(copy.deepcopy(plain), plain, images) is None
    assert found(plain, net(0), images) is None
    other = net(0)
    other.stem = nn.Conv2d(3, 6, 4, 4)  # other positions
    assert found(other, net(0), images) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_its_stream_when_it_is_pruned(name: str) -> None:
    family = FAMILIES[name]
    model, images = randomise_(family.build()).double().eval(), family.example(4)
    sites = find_sites(model, images[:1])
    statistics = collect_statistics(model, sites, [images])
    student = copy.deepcopy(model)
    prune_(student, make_plan(sites, variance_scores(statistics), keep_ratio=0.5), statistics.means)
    target = StreamTarget.find(model, student, sites, images[:1], GivenImages([images]))
    expected = {add.module for add in find_residual_adds(model, images[:1], sites)}
    assert set(target.modules if target else ()) == expected


class Batches:
    """Batches without labels."""

    def __init__(self, images: Tensor) -> None:
        self._batches = list(images.split(8))

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        pass

    def global_size(self, batch: int) -> int:
        return len(self._batches[batch])

    def __iter__(self):  # type: ignore[no-untyped-def]
        return ((pixels, None) for pixels in self._batches)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_brings_the_streams_together(
    images: Tensor, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:  # as the compiler sees the model, but without generated code
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda module: real(module, backend="eager"))
    errors = {}
    for weight in (0.0, 50.0):
        teacher, student = net(0), net(1)
        target = found(teacher, student, images)
        assert target is not None
        settings = TrainerSettings(
            steps=50, learning_rate=1e-2, loss=DistillationLoss(0.0, 1.0, 1.0), compile=compiled,
            stream=target, stream_weight=weight,
        )  # fmt: skip
        trainer = Trainer(student, settings, device=CPU, teacher=teacher)
        for epoch in range(1, 11):
            trainer.train_epoch(Batches(images), epoch)
        watch = target.watch(student, teacher)
        with watch.watching(), torch.no_grad():
            student(images)
            teacher(images)
            errors[weight] = float(watch.loss())
        assert not student.blocks[0]._forward_hooks
    assert errors[50.0] < 0.5 * errors[0.0]


def test_a_stream_needs_a_teacher(images: Tensor) -> None:
    target = found(net(0), net(1), images)
    with pytest.raises(InputError, match="distilled from a teacher, got none"):
        Trainer(net(1), TrainerSettings(4, 1e-3, stream=target), device=CPU)
