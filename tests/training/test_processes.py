"""Two processes train and evaluate as one does; torch's own launcher of processes stands in for torchrun."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from vbp import DistillationLoss, InputError, Trainer, TrainerSettings
from vbp.data.preprocessing import Preprocessing
from vbp.runtime.precision import Precision
from vbp.runtime.processes import Processes
from vbp.runtime.session import Session
from vbp.statistics.images import CalibrationImages
from vbp.statistics.objective import Objective
from vbp.statistics.stream_target import Outputs, StreamTarget
from vbp.training.evaluate import Accuracy, evaluate
from vbp.training.memory import dry_step
from vbp.training.tuning import Tuner, TunerSettings
from vbp.training.tuning_length import TuningLength
from vbp.training.tuning_report import TuningReport

CPU = torch.device("cpu")


class Dealt:
    """Deals out each batch image by image: of 8, 8 and 5 images one process gets 4, 4 and 3."""

    sizes = (8, 8, 5)

    def __init__(self, rank: int, world: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.batches = [
            (
                torch.randn(size, 4, generator=generator, dtype=torch.float64),
                torch.randint(3, (size,), generator=generator),
            )
            for size in self.sizes
        ]
        self.share = slice(rank, None, world)
        self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.start = start

    def global_size(self, batch: int) -> int:
        return self.sizes[batch]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(pixels[self.share], labels[self.share]) for pixels, labels in self.batches[self.start :]])


def network(seed: int, middle: nn.Module | None = None) -> nn.Module:
    """Return a small classifier in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), middle or nn.GELU(), nn.Linear(6, 3)).double()


def trainer(student: nn.Module, processes: Processes) -> Trainer:
    """Set up two epochs."""
    settings = TrainerSettings(
        steps=4, learning_rate=0.03, loss=DistillationLoss(0.6, 0.4, 3.0), accumulate=2, ema_decay=0.7,
        clip_grad=0.5, measure_gradients=True,
    )  # fmt: skip
    return Trainer(student, settings, device=CPU, teacher=network(9), processes=processes)


def two_train_as_one(mine: Processes) -> None:
    one, two = trainer(network(1), Processes()), trainer(network(1), mine)
    for epoch in (1, 2):
        alone = one.train_epoch(Dealt(0, 1), epoch)
        together = two.train_epoch(Dealt(mine.rank, 2), epoch)
        assert together.images == alone.images == 21
        assert together.top1 == alone.top1
        assert together.loss == pytest.approx(alone.loss, rel=1e-12)
        assert together.gradient_norm == pytest.approx(alone.gradient_norm, rel=1e-12)
    state = two.state_dict()["student"]
    assert list(state) == list(network(1).state_dict())
    for name, value in one.state_dict()["student"].items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
    for value, other in zip(one.evaluated.parameters(), two.evaluated.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)


def both_hold_the_same_running_statistics(mine: Processes) -> None:
    ours = trainer(network(1, nn.BatchNorm1d(6)), mine)
    ours.train_epoch(Dealt(mine.rank, 2), 1)
    for model in (ours.student, ours.evaluated):
        mean = model.get_buffer("1.running_mean")
        first, second = mine.all_gather(mean)
        assert torch.equal(first, second)
        assert mean.abs().max() > 0


def two_that_were_stopped_go_on(mine: Processes) -> None:
    def after_step() -> None:
        if through.steps_done == 3:
            torch.save((through.state_dict(), through.process_state()), file)

    file = io.BytesIO()
    through = trainer(network(1, nn.Dropout(0.4)), mine)
    torch.manual_seed(mine.rank)  # each process draws for itself
    for epoch in (1, 2):
        expected = through.train_epoch(Dealt(mine.rank, 2), epoch, after_step=after_step)
    file.seek(0)
    shared, own = torch.load(file, weights_only=True)
    resumed = trainer(network(5, nn.Dropout(0.4)), mine)
    # The state that all share comes from the main process.
    resumed.load_state_dict(mine.all_gather(shared)[0], own)
    result = resumed.train_epoch(Dealt(mine.rank, 2), 2)
    assert (result.loss, result.top1, result.gradient_norm) == (
        expected.loss, expected.top1, expected.gradient_norm,
    )  # fmt: skip
    for name, value in through.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], value)


def both_hear_that_the_loss_of_one_is_no_number(mine: Processes) -> None:
    loader = Dealt(mine.rank, 2)
    loader.batches[2][0][1] = torch.inf  # the second process's
    with pytest.raises(InputError, match="diverged: the loss of epoch 1 is nan"):
        trainer(network(1), mine).train_epoch(loader, 1)


def a_dry_step_of_both_changes_nothing(mine: Processes) -> None:
    ours = trainer(network(1).float(), mine)
    assert ours.teacher is not None
    ours.teacher.float()
    before = copy.deepcopy(ours.state_dict()["student"])
    dry_step(ours, (4,), batch_size=3, val_batch_size=2)
    assert all(torch.equal(before[name], value) for name, value in ours.student.state_dict().items())
    assert ours.steps_done == 0


def counts_are_added_up(mine: Processes) -> None:
    batches = [(torch.eye(6), torch.tensor([0, 1, 2, 3, 4, 0]))] if mine.rank == 0 else []
    assert evaluate(nn.Identity(), batches, "cpu", processes=mine) == Accuracy(5, 6, 6)
    with pytest.raises(InputError, match="evaluation needs at least one image, got none"):
        evaluate(nn.Identity(), [], "cpu", processes=mine)


@dataclass(frozen=True)
class Noise:
    """Images of noise."""

    numbers: tuple[int, ...]
    root = "noise"

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(number % 3 for number in self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"noise {index}"

    def read(self, index: int) -> BinaryIO:
        pixels = np.random.default_rng(self.numbers[index]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return stream

    def select(self, indices: Sequence[int]) -> Noise:
        return Noise(tuple(self.numbers[index] for index in indices))

    def fingerprint(self) -> str:
        return "noise"


def two_tune_as_one(mine: Processes) -> None:
    def tuned(processes: Processes, batch_size: int) -> tuple[TuningReport, nn.Module]:
        teacher, pruned = (nn.Sequential(nn.Flatten(), nn.Linear(192, 4), network(seed)).double() for seed in (1, 1))
        with torch.no_grad():
            pruned[1].weight *= 0.9
        images = CalibrationImages(Noise(tuple(range(41))), preprocessing, Session(processes), hflip=False)
        settings = TunerSettings(TuningLength(epochs=2), batch_size=batch_size)
        between = Objective.of(Outputs(teacher, ("1",)), images.first(41), "features")
        stream = StreamTarget(("1",), between)
        return Tuner(pruned, teacher, images, settings, precision=Precision(), stream=stream).tune_(), pruned

    torch.manual_seed(0)
    preprocessing = Preprocessing((8, 8), 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    alone, one = tuned(Processes(), 8)
    torch.manual_seed(0)
    together, two = tuned(mine, 4)
    assert together.after < together.before
    assert (together.epoch, together.learning_rate) == (alone.epoch, alone.learning_rate)
    for ours, theirs in zip(together.rows, alone.rows, strict=True):
        assert ours.divergences == pytest.approx(theirs.divergences, rel=1e-9)
        assert (ours.epoch, ours.epochs, ours.learning_rate) == (theirs.epoch, theirs.epochs, theirs.learning_rate)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-9)
    for value, other in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-9)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = Processes(rank, 2, rank, 2, dist.new_group(backend="gloo"))
    for check in (
        two_train_as_one, both_hold_the_same_running_statistics, two_that_were_stopped_go_on,
        both_hear_that_the_loss_of_one_is_no_number, a_dry_step_of_both_changes_nothing, counts_are_added_up,
        two_tune_as_one,
    ):  # fmt: skip
        check(mine)
    (Path(folder) / f"done{rank}").touch()
    dist.destroy_process_group()


def test_two_processes_train_and_evaluate_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}
