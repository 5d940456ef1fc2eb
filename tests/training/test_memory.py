"""Gradients do not depend on how many activations are kept; an end of memory is named before the work begins."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, randomise_
from torch import Tensor, nn

from vbp import InputError, Trainer, TrainerSettings
from vbp.runtime.forward import logits_of
from vbp.runtime.memory import out_of_memory
from vbp.training.memory import MemoryUse, dry_step, enable_gradient_checkpointing_
from vbp.training.mixup import Mixup

CPU = torch.device("cpu")
_LACKS = ("torchvision-vit", "hf-convnext")
_OFFERS = [name for name in FAMILIES if not name.startswith(("torchvision", *_LACKS))]


@pytest.mark.parametrize("name", _OFFERS)
def test_gradients_are_the_same(name: str) -> None:
    family = FAMILIES[name]
    plain = randomise_(family.build()).double().train()
    saving = copy.deepcopy(plain)
    enable_gradient_checkpointing_(saving)
    gradients, passes = [], []
    for model in (plain, saving):
        calls: list[nn.Module] = []
        for module in model.modules():
            module.register_forward_hook(lambda module, args, output, calls=calls: calls.append(module))
        torch.manual_seed(3)
        logits = logits_of(model(family.example()))
        F.cross_entropy(logits, torch.tensor([0, 1])).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        passes.append(len(calls))
    assert passes[0] < passes[1]  # some are gone through again
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", _LACKS)
def test_a_model_that_does_not_offer_it_is_named(name: str) -> None:
    with pytest.raises(InputError, match=r"grad_checkpointing needs a timm or Hugging Face model .*got \w+ without"):
        enable_gradient_checkpointing_(FAMILIES[name].build())


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
])  # fmt: skip
@pytest.mark.parametrize("stage", ["fine-tuning", "evaluation", "calibration"])
def test_an_end_of_memory_names_what_helps(error: Exception, stage: str) -> None:
    flags = ("--train_batch_size", "--grad_accum", "--grad_checkpointing", "--amp bf16", "--use_kd")
    with pytest.raises(InputError, match=f"{stage} needs more memory than there is") as caught, out_of_memory(stage):
        raise error
    text = str(caught.value)
    assert all(flag in text for flag in (flags if stage == "fine-tuning" else ("--val_batch_size", "--amp bf16")))
    assert (str(error).splitlines() or [type(error).__name__])[0] in text
    assert "\n" not in text


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory():
        raise RuntimeError("shapes do not fit")


class Hungry(nn.Module):
    """Has no memory for more than four images, in one of the two modes."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.when = training
        self.seen: list[tuple[bool, int]] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen.append((self.training, len(pixels)))
        if self.training == self.when and len(pixels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return pixels


def trainer(*, hungry: bool = True, taught: bool = True, accumulate: int = 1) -> Trainer:
    """Return a trainer with all that has a state."""
    torch.manual_seed(1)
    student = nn.Sequential(
        Hungry(hungry), nn.Flatten(), nn.Linear(12, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 3)
    )
    teacher = copy.deepcopy(student) if taught else None
    settings = TrainerSettings(
        steps=4, warmup_steps=2, learning_rate=0.1, ema_decay=0.5, accumulate=accumulate,
        mixup=Mixup(0.8, num_classes=3),
    )  # fmt: skip
    return Trainer(student, settings, device=CPU, teacher=teacher)


SHAPE = (3, 2, 2)


@pytest.mark.parametrize(("hungry", "train", "val", "stage"), [
    (True, 5, 4, "fine-tuning"), (False, 4, 5, "evaluation"),
])  # fmt: skip
def test_an_end_of_memory_is_found_before_the_work(hungry: bool, train: int, val: int, stage: str) -> None:
    ours = trainer(hungry=hungry, taught=hungry)
    with pytest.raises(InputError, match=f"{stage} needs more memory"):
        dry_step(ours, SHAPE, batch_size=train, val_batch_size=val)


class Images:
    """Two batches of four images."""

    def __len__(self) -> int:
        return 2

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        pass

    def global_size(self, batch: int) -> int:
        return 4

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(2)
        return iter([(torch.randn(4, *SHAPE, generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(2)])


def test_a_dry_step_changes_nothing() -> None:
    dry, plain = trainer(accumulate=2), trainer(accumulate=2)
    torch.manual_seed(5)
    dry.student.eval()
    use = dry_step(dry, SHAPE, batch_size=4, val_batch_size=3)
    assert use == MemoryUse()
    assert not any(module.training for module in dry.student.modules())
    hungry = dry.student.get_submodule("0")
    assert isinstance(hungry, Hungry)
    assert hungry.seen == [(True, 4), (True, 4)]  # the average is evaluated
    assert dry.optimizer.state == {}
    assert (dry.epoch, dry.steps_done) == (0, 0)
    result = dry.train_epoch(Images(), 1)  # type: ignore[arg-type]
    torch.manual_seed(5)
    expected = plain.train_epoch(Images(), 1)  # type: ignore[arg-type]
    assert (result.loss, result.learning_rate) == (expected.loss, expected.learning_rate)
    for name, value in plain.evaluated.state_dict().items():
        assert torch.equal(dry.evaluated.state_dict()[name], value), name
    for name, value in plain.student.state_dict().items():
        assert torch.equal(dry.student.state_dict()[name], value), name


def test_memory_use_is_said_in_one_line() -> None:
    assert str(MemoryUse(3 * 2**29, 2**31)) == "a step and an evaluation batch take 1.50 GiB of 2.00 GiB"
    assert str(MemoryUse()) == "a step and an evaluation batch fit into memory"
