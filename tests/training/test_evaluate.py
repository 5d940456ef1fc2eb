"""Accuracy, against a count by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vbp import Accuracy, InputError, evaluate
from vbp.runtime.forward import logits_of
from vbp.runtime.precision import Precision


class Answers(nn.Module):
    """A classifier whose logits are its input, so that a test chooses them."""

    def forward(self, pixels: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return pixels


class NamedAnswers(Answers):
    """The same, with an output like that of a Hugging Face classifier."""

    def forward(self, pixels: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(pixels))


Batch = tuple[Tensor, Tensor]


def random_batches(seed: int, classes: int, sizes: list[int]) -> list[Batch]:
    """Return logits without ties, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.stack([torch.randperm(classes, generator=generator) for _ in range(size)]).double(),
            torch.randint(classes, (size,), generator=generator),
        )
        for size in sizes
    ]


def by_hand(batches: list[Batch]) -> Accuracy:
    """Count images for which fewer than one, or fewer than five, classes lie above the right one."""
    ranks = [
        sum(value > row[label] for value in row)
        for logits, labels in batches
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    return Accuracy(sum(rank < 1 for rank in ranks), sum(rank < 5 for rank in ranks), len(ranks))


@pytest.mark.parametrize("model", [Answers(), NamedAnswers()])
@given(st.integers(0, 10**6), st.integers(1, 12), st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(deadline=None, max_examples=25)
def test_accuracy_equals_a_count_by_hand(model: nn.Module, seed: int, classes: int, sizes: list[int]) -> None:
    batches = random_batches(seed, classes, sizes)
    assert evaluate(model, batches, "cpu") == by_hand(batches)


@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_with_up_to_five_classes_every_answer_is_among_five(classes: int) -> None:
    accuracy = evaluate(Answers(), random_batches(0, classes, [8, 3]), torch.device("cpu"))
    assert accuracy.correct5 == accuracy.images == 11
    assert accuracy.top5 == 100


def test_percentages_are_of_all_images_and_not_means_of_batches() -> None:
    right, wrong = torch.eye(8)[:1], torch.eye(8)[1:4]
    batches = [(right, torch.tensor([0])), (wrong, torch.tensor([0, 0, 0]))]
    accuracy = evaluate(Answers(), batches, "cpu")
    assert (accuracy.correct1, accuracy.images) == (1, 4)
    assert accuracy.top1 == 25
    assert Accuracy(2, 6, 8).top5 == 75


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_of_every_module_is_put_back(training: bool) -> None:
    # Training with a frozen normalisation layer: it must not be thawed by an evaluation.
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Answers())
    model.train(training)
    model[1].train(not training)
    before = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, [(torch.randn(2, 3), torch.tensor([0, 1]))], "cpu")
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))]])
def test_no_image_is_an_error_and_leaves_the_training_flag(batches: list[Batch]) -> None:
    model = Answers().train()
    with pytest.raises(InputError, match="evaluation needs at least one image, got none"):
        evaluate(model, batches, "cpu")
    assert model.training


@pytest.mark.parametrize(
    "output",
    [(torch.zeros(1, 2),), {"logits": torch.zeros(1, 2), "boxes": torch.zeros(1, 4)}, SimpleNamespace(logits=None)],
)
def test_an_output_without_logits_is_an_error(output: Any) -> None:
    with pytest.raises(InputError, match=f"return a tensor or an output with .logits, got {type(output).__name__}"):
        logits_of(output)


def test_logits_are_found_in_either_kind_of_output() -> None:
    logits = torch.zeros(1, 2)
    assert logits_of(logits) is logits
    assert logits_of(SimpleNamespace(logits=logits)) is logits


def test_logits_come_from_a_pass_in_the_precision_asked_for() -> None:
    torch.manual_seed(0)
    model, kinds = nn.Linear(8, 8), []
    model.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    batches = random_batches(0, 8, [4])
    batches = [(pixels.float(), labels) for pixels, labels in batches]
    for precision in (Precision(), Precision(torch.bfloat16)):
        assert evaluate(model, batches, "cpu", precision=precision).images == 4
    assert kinds == [torch.float32, torch.bfloat16]
