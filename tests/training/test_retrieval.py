"""Agreement of two encoders, against neighbours that are found one by one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from pairs import Pair
from torch import Tensor, nn

from vbp import InputError
from vbp.statistics.objective import Objective
from vbp.training.retrieval import Embeddings, compare_embeddings, embed
from vbp.training.trainer import Trainer, TrainerSettings


def rows(images: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(images, 5, generator=generator)
    return first, first + 0.5 * torch.randn(images, 5, generator=generator)


def neighbours(values: Tensor, place: int) -> set[int]:
    cosine = torch.cosine_similarity(values[place][None], values)
    order = cosine.argsort(descending=True).tolist()
    order.remove(place)
    return set(order[:10])


def test_neighbours_and_cosine_are_those_of_the_definition() -> None:
    first, second = rows()
    found = compare_embeddings(Embeddings(first), Embeddings(second))
    common = sum(len(neighbours(first, place) & neighbours(second, place)) for place in range(40))
    assert found.neighbours == pytest.approx(100 * common / 400)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(first, second).mean()), abs=1e-6)
    assert (found.images, found.same) == (40, None)


def test_a_model_agrees_with_itself() -> None:
    first, _ = rows(5)  # fewer than ten neighbours
    found = compare_embeddings(
        Embeddings(first, torch.arange(5)), Embeddings(3 * first, torch.tensor([0, 1, 2, 3, 0]))
    )
    assert (found.neighbours, found.same) == (100, 80)
    assert found.cosine == pytest.approx(1, abs=1e-6)


def test_two_processes_see_what_one_sees() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6))
    images = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    objective = Objective.of(model, [images])
    alone = embed(model, objective, images.split(4), "cpu")
    barrier, slots = Barrier(2), [None, None]

    def work(rank: int) -> Embeddings:
        return embed(model, objective, [images[4 * rank : 4 * rank + 4]], "cpu", processes=Pair(rank, barrier, slots))

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(work, range(2)):
            torch.testing.assert_close(found.rows, alone.rows)


def test_what_cannot_be_compared_is_refused() -> None:
    first, second = rows(4)
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6))
    objective = Objective.of(model, [torch.randn(4, 3, 2, 2)])
    with pytest.raises(InputError, match="must be of the same images"):
        compare_embeddings(Embeddings(first), Embeddings(second[:3]))
    with pytest.raises(InputError, match="at least two images"):
        embed(model, objective, [torch.randn(1, 3, 2, 2)], "cpu")
    with pytest.raises(InputError, match="must be finite, got NaN or infinity for 4 of 4 images"):
        embed(model, objective, [torch.full((4, 3, 2, 2), torch.nan)], "cpu")


def test_a_student_learns_the_features_of_its_teacher() -> None:
    def tower(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 6), nn.LayerNorm(6))

    teacher, student = tower(0), tower(1)
    images = torch.randn(32, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    objective = Objective.of(teacher, [images])
    settings = TrainerSettings(steps=60, learning_rate=0.01, objective=objective)
    trainer = Trainer(student, settings, device=torch.device("cpu"), teacher=teacher)
    results = [trainer.train_epoch(Loader(images), epoch) for epoch in range(1, 61)]
    assert results[-1].loss < 0.2 * results[0].loss
    assert results[-1].top1 == 0  # no label took part
    with pytest.raises(InputError, match="distilled from a teacher, got none"):
        Trainer(student, settings, device=torch.device("cpu"))


class Loader:
    """One batch an epoch, whose labels are no classes."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return 1

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        pass

    def global_size(self, batch: int) -> int:
        return len(self.images)

    def __iter__(self) -> Any:
        return iter([(self.images, torch.full((len(self.images),), 99))])
