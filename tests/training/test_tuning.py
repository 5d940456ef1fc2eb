"""Tuning without labels: nearer to the dense model on held-out images, or as it was; and to go on after a kill."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from vbp import DenseReference, DistillationLoss, InputError, Trainer, TrainerSettings
from vbp.runtime.precision import Precision
from vbp.statistics.images import GivenImages
from vbp.training.tuning import Tuner, TunerSettings, _half_way
from vbp.training.tuning_length import RATES, Schedule, TuningLength
from vbp.training.tuning_report import TuningReport

OFF = Precision()
ONE = TuningLength(epochs=1)


class KilledError(Exception):
    """The job was killed."""


def dense() -> nn.Module:
    """Return a small convolutional network with what behaves otherwise in training: a BatchNorm and dropout."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 36, 5)
    return nn.Sequential(*layers)


def shaken(model: nn.Module, by: float = 0.02) -> nn.Module:
    """Return a copy with other weights: what surgery leaves."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def images() -> GivenImages:
    generator = torch.Generator().manual_seed(2)
    return GivenImages(list(torch.randn(64, 3, 8, 8, generator=generator).split(20)))


def tuner(
    model: nn.Module, teacher: nn.Module, images: GivenImages, length: TuningLength = ONE, **more: Any
) -> Tuner:
    return Tuner(model, teacher, images, TunerSettings(length, batch_size=8), precision=OFF, **more)


def kl(teacher: nn.Module, model: nn.Module, images: GivenImages) -> float:
    return DenseReference.held_out(teacher, images, range(16)).divergence(model)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("off", None), ("auto", TuningLength()), ("8", TuningLength(epochs=8)), (8, TuningLength(epochs=8)),
        ("5m", TuningLength(seconds=300.0)), ("1.5h", TuningLength(seconds=5400.0)),
        ("90s", TuningLength(seconds=90.0)),
    ],
)  # fmt: skip
def test_a_length_is_epochs_or_a_time(text: str | int, length: TuningLength | None) -> None:
    assert TuningLength.of(text) == length


@pytest.mark.parametrize("text", ["on", "0", 0, -1, "0m", "5 m", "5min", "", "1e3", "nan", True])
def test_another_length_is_refused(text: str | int) -> None:
    with pytest.raises(
        InputError, match=r"tune must be auto, off, a number of epochs above 0 as 8, or a time as 90s"
    ):
        TuningLength.of(text)


def test_trials_are_short_and_a_run_of_their_length_needs_no_other() -> None:
    assert Schedule(750, 8).phases == [1, 1, 1, 8]
    assert Schedule(750, 32).phases == [4, 4, 4, 32]
    assert Schedule(750, 1).phases == [1, 1, 1]
    assert Schedule.by_device(20_000, "cpu") == Schedule(1000, 8)
    assert Schedule.by_device(20_000, "cuda") == Schedule(10_000, 8)
    assert Schedule.by_device(75, "cpu") == Schedule(75, 8)


@pytest.mark.parametrize("seconds", [1.0, 20.0, 300.0, 3600.0])
def test_a_schedule_fits_into_its_time(seconds: float) -> None:
    found = Schedule.within(seconds, 0.01, 750, 250, least=8)
    judged = 3 * 250 / 4
    taken = 0.01 * sum(found.phases) * (found.images + judged)
    assert taken <= seconds or found.images == 8
    longer = Schedule(found.images, found.epochs + 1)
    assert 0.01 * sum(longer.phases) * (longer.images + judged) > 0.9 * seconds
    assert found.images == 750 or found.epochs == 1


def test_the_model_comes_nearer_and_the_dense_one_stays_as_it_was(images: GivenImages) -> None:
    teacher = dense().train()
    model, before = shaken(teacher), copy.deepcopy(teacher.state_dict())
    norm = copy.deepcopy(dict(model[1].named_buffers()))
    start = kl(teacher, model, images)
    report = tuner(model, teacher, images, TuningLength(epochs=4)).tune_()
    assert (report.before, report.images, report.held_out) == (pytest.approx(start, rel=1e-4), 48, 16)
    assert report.after < report.before
    assert report.after == pytest.approx(kl(teacher, model, images), rel=1e-4)
    assert f"KL {report.before:.4f} -> {report.after:.4f} on 16 held-out images" in report.sentence()
    # Each rate was tried, and the longer training is at one of them.
    assert [(row.learning_rate, row.epochs) for row in report.rows[:3]] == [(rate, 1) for rate in RATES]
    assert [row.epoch for row in report.rows[3:]] == [1, 2, 3, 4] or len(report.rows) == 3
    assert min(row.best for row in report.rows) == report.after
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(value.equal(before[name]) for name, value in teacher.state_dict().items())
    # Running statistics are no part of it: mixtures are no images that the model will see.
    assert all(value.equal(norm[name]) for name, value in model[1].named_buffers())


def test_where_no_epoch_is_better_the_model_stays_bit_for_bit(images: GivenImages) -> None:
    teacher = dense()
    model = copy.deepcopy(teacher)
    report = tuner(model, teacher, images).tune_()
    assert (report.before, report.epoch, report.learning_rate) == (report.after, 0, None)
    assert report.before == pytest.approx(0, abs=1e-6)
    assert "no epoch was better than none on 16 held-out images" in report.sentence()
    assert "stays as it was" in report.to_dict()["sentence"]
    assert all(value.equal(teacher.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_rate_at_which_training_diverges_is_left_out(
    images: GivenImages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = dense()
    monkeypatch.setattr("vbp.training.tuning.RATES", (1e-4, 1e-3, 1e30))
    model = shaken(teacher)
    report = tuner(model, teacher, images, TuningLength(epochs=2)).tune_()
    assert "training at peak learning rate 1e+30 diverged: it is left out" in caplog.text
    assert report.after < report.before
    assert {row.learning_rate for row in report.rows} == {1e-4, 1e-3}
    monkeypatch.setattr("vbp.training.tuning.RATES", (1e30, 1e31, 1e32))
    model = shaken(teacher)
    start = copy.deepcopy(model.state_dict())
    report = tuner(model, teacher, images, TuningLength(epochs=2)).tune_()
    assert (report.rows, report.epoch) == ((), 0)
    assert "at best inf after training" in report.sentence()
    assert all(value.equal(start[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("trials", "chosen"), [((0.9, 0.99, 1.04), 0), ((1.1, 1.05, 1.2), 1), ((1.0, 0.95, 0.5), 2)])
def test_the_rate_of_the_nearest_trial_is_taken(
    images: GivenImages, monkeypatch: pytest.MonkeyPatch, trials: tuple[float, ...], chosen: int
) -> None:
    # What the trials and the training after them come to, as shares of the divergence before.
    teacher = dense()
    job = tuner(shaken(teacher), teacher, images, TuningLength(epochs=2))
    before = job._state.before
    shares = iter([share for trial in (*trials, 0.8, 0.7) for share in (2.0, 3.0, trial)])
    monkeypatch.setattr(job._reference, "divergence", lambda model: next(shares) * before)
    report = job.tune_()
    assert [row.learning_rate for row in report.rows] == [*RATES, RATES[chosen], RATES[chosen]]
    assert report.after == pytest.approx(min(0.7, *trials) * before)
    assert report.weights == "half way"
    assert "half way to the averaged weights)" in report.sentence()


def test_half_way_is_the_mean_of_all_weights() -> None:
    start, end = dense(), shaken(dense())
    middle = _half_way(start, end)
    for name, value in middle.named_parameters():
        expected = (start.get_parameter(name) + end.get_parameter(name)) / 2
        torch.testing.assert_close(value, expected)
    assert not any(mine is other for mine, other in zip(middle.parameters(), end.parameters(), strict=True))


def test_a_time_limit_is_kept_and_too_few_images_are_refused(images: GivenImages) -> None:
    teacher = dense()
    report = tuner(shaken(teacher), teacher, images, TuningLength(seconds=0.05)).tune_()
    assert report.images >= 8
    with pytest.raises(InputError, match="tune needs at least 8 calibration images, got 7"):
        tuner(shaken(teacher), teacher, GivenImages([torch.randn(7, 3, 8, 8)]))


@pytest.mark.parametrize("steps", [0, 6, 20, 30])
def test_a_tuner_that_was_killed_goes_on_as_if_it_had_not_been(images: GivenImages, steps: int) -> None:
    teacher, length = dense(), TuningLength(epochs=2)
    model = shaken(teacher)
    through = copy.deepcopy(model)
    expected = tuner(through, teacher, images, length).tune_()
    first, file, done = tuner(copy.deepcopy(model), teacher, images, length), io.BytesIO(), [0]

    def after_step() -> None:
        done[0] += 1
        if done[0] == steps:
            torch.save((first.state_dict(), first.process_state()), file)
            raise KilledError

    if steps == 0:
        torch.save((first.state_dict(), first.process_state()), file)
    else:
        with pytest.raises(KilledError):
            first.tune_(after_step)
    file.seek(0)
    state, own = torch.load(file, weights_only=True)
    again = shaken(teacher)
    again.load_state_dict(state["start"])
    found = tuner(again, teacher, images, length, state=state, own=own).tune_()
    assert _timeless(found) == _timeless(expected)
    assert all(value.equal(through.state_dict()[name]) for name, value in again.state_dict().items())


def _timeless(report: TuningReport) -> dict[str, Any]:
    return {name: value for name, value in vars(report).items() if not name.startswith("peak")}


@pytest.mark.parametrize("damage", [{"phase": 9}, {"before": math.nan}, {"rows": [1]}, {"schedule": {"images": 3}}])
def test_a_damaged_state_is_refused(images: GivenImages, damage: Mapping[str, Any]) -> None:
    teacher = dense()
    state = tuner(shaken(teacher), teacher, images).state_dict()
    state["plain"] |= damage
    with pytest.raises((InputError, ValueError)):
        tuner(shaken(teacher), teacher, images, state=state)


def test_vectors_and_models_of_other_precision_can_be_tuned_too() -> None:
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4)).double()
    images = GivenImages([torch.randn(40, 6)])
    report = tuner(shaken(teacher, 0.2), teacher, images, TuningLength(epochs=2)).tune_()
    assert report.after < report.before


# The trainer's share in it.


class Unlabelled:
    """Two batches without labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.batches = [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(2)]

    def __len__(self) -> int:
        return 2

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        pass

    def global_size(self, batch: int) -> int:
        return 8

    def __iter__(self) -> Any:
        return ((pixels, None) for pixels in self.batches)


def test_without_labels_the_teacher_says_which_class_is_right() -> None:
    teacher = dense().eval()
    settings = TrainerSettings(
        steps=4, learning_rate=1e-30, loss=DistillationLoss(0.0, 1.0, 1.0), fixed_statistics=True, weight_decay=0.0
    )
    trainer = Trainer(copy.deepcopy(teacher), settings, device=torch.device("cpu"), teacher=teacher)
    result = trainer.train_epoch(Unlabelled(), 1)
    assert (result.top1, result.loss) == (100.0, pytest.approx(0.0, abs=1e-6))
    with pytest.raises(InputError, match=r"kd_alpha must be 0 for batches without labels, got 0\.7"):
        Trainer(dense(), TrainerSettings(4, 1e-3), device=torch.device("cpu"), teacher=teacher).train_epoch(
            Unlabelled(), 1
        )
    with pytest.raises(InputError, match="training needs labels or a teacher, got batches with neither"):
        Trainer(dense(), TrainerSettings(4, 1e-3), device=torch.device("cpu")).train_epoch(Unlabelled(), 1)


def test_biases_and_norms_have_a_rate_of_their_own_and_no_decay() -> None:
    model = dense()
    trainer = Trainer(model, TrainerSettings(4, 1e-3, vector_rate=10.0), device=torch.device("cpu"))
    groups = {id(each): group for group in trainer.optimizer.param_groups for each in group["params"]}
    assert isinstance(trainer.optimizer, AdamW)
    found = [(groups[id(each)]["lr"], groups[id(each)]["weight_decay"]) for each in model.parameters()]
    weight, vector = (1e-3, 0.01), (1e-2, 0.0)
    assert found == [weight, vector, vector, vector, weight, vector]
    alone = Trainer(nn.LayerNorm(4), TrainerSettings(4, 1e-3, vector_rate=2.0), device=torch.device("cpu"))
    assert [group["lr"] for group in alone.optimizer.param_groups] == [2e-3]


def test_the_loss_without_labels_is_the_divergence(images: GivenImages) -> None:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    loss = DistillationLoss(0.0, 1.0, 1.0)(student, teacher, None)
    p = teacher.softmax(1)
    expected = (p * (p.log() - student.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_tensors_of_a_teacher_stay_off_the_graph(images: GivenImages) -> None:
    teacher = dense()
    grads: list[Tensor | None] = []
    tuner(shaken(teacher), teacher, images).tune_(lambda: grads.extend(each.grad for each in teacher.parameters()))
    assert grads
    assert all(gradient is None for gradient in grads)
