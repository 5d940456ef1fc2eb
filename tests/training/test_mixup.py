"""Mixed images and labels, against the formulas; what is drawn depends on the place in the run alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vbp import InputError
from vbp.training.mixup import Mixup


def batch(count: int) -> tuple[Tensor, Tensor]:
    """Return images whose every pixel says which image it is, and labels."""
    pixels = torch.arange(1.0, count + 1, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 8, 8)
    return pixels.clone(), torch.arange(count) % 4


def one_hot(labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Spread a share of each label over four classes."""
    return torch.eye(4)[labels] * (1 - smoothing) + smoothing / 4


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixup_is_a_weighted_mean_of_images_and_of_labels(count: int, smoothing: float) -> None:
    pixels, labels = batch(count)
    mixed, targets = Mixup(0.8, 0.0, smoothing, num_classes=4)(pixels, labels, epoch=1, batch=count)
    partner = pixels.flip(0)  # of an odd batch the middle one is its own
    share = 1.0 if count == 1 else float((mixed[0] - partner[0]).mean() / (pixels[0] - partner[0]).mean())
    assert 0 <= share <= 1
    torch.testing.assert_close(mixed, share * pixels + (1 - share) * partner, rtol=1e-12, atol=1e-12)
    expected = share * one_hot(labels, smoothing) + (1 - share) * one_hot(labels.flip(0), smoothing)
    torch.testing.assert_close(targets, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [4, 5])
def test_cutmix_mixes_labels_by_the_area_that_is_replaced(count: int) -> None:
    pixels, labels = batch(count)
    shares = set()
    for number in range(6):
        mixed, targets = Mixup(cutmix=1.0, num_classes=4)(pixels, labels, epoch=1, batch=number)
        own = mixed == pixels
        assert torch.equal(mixed, torch.where(own, pixels, pixels.flip(0)))
        share = own[0].double().mean()
        expected = share * one_hot(labels) + (1 - share) * one_hot(labels.flip(0))
        torch.testing.assert_close(targets, expected.float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(mixed[count // 2], pixels[count // 2]) == (count % 2 == 1 or share == 1)
        shares.add(float(share))
    assert len(shares) > 2


def test_what_is_drawn_depends_on_seed_epoch_batch_and_process_alone() -> None:
    pixels, labels = batch(4)

    def mixed(seed: int = 0, epoch: int = 1, batch: int = 2, rank: int = 3) -> Tensor:
        mixing = Mixup(0.8, 1.0, num_classes=4, seed=seed)
        return mixing(pixels, labels, epoch=epoch, batch=batch, rank=rank)[0]

    np.random.seed(1)
    first = mixed()
    np.random.seed(2)
    expected = np.random.RandomState(2).rand(3)
    torch.manual_seed(1)
    assert torch.equal(mixed(), first)
    assert np.array_equal(np.random.rand(3), expected)  # the program's own numbers go on as they would
    others = [mixed(seed=1), mixed(epoch=2), mixed(batch=1), mixed(rank=0), mixed(epoch=2, batch=1)]
    assert all(not torch.equal(other, first) for other in others)
    assert torch.equal(pixels, batch(4)[0])


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (-0.1, 1.0), (0.8, float("nan")), (float("inf"), 0.0)])
def test_bad_alphas_are_named(alphas: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=f"mixup and cutmix must be .*got {alphas[0]} and {alphas[1]}"):
        Mixup(*alphas)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_a_bad_smoothing_is_named(smoothing: float) -> None:
    with pytest.raises(InputError, match=f"label_smoothing must be .*got {smoothing}"):
        Mixup(0.8, 0.0, smoothing)
