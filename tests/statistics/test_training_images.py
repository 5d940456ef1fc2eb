"""Calibration images as training reads them: cropped at random, decoded once, without labels."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from pixels import Pixels

from vbp.data.data_path import list_images
from vbp.data.decoding import DecodedOnce
from vbp.data.digits import PREPROCESSING
from vbp.runtime.processes import Processes
from vbp.runtime.session import Session
from vbp.statistics.images import CalibrationImages, GivenImages
from vbp.statistics.training_images import UnlabelledLoader, training_images

MAX = 10_000


def epoch(loader: UnlabelledLoader, number: int, start: int = 0) -> list[torch.Tensor]:
    loader.set_epoch(number, start)
    return [pixels for pixels, labels in loader if labels is None]


@pytest.fixture(scope="module")
def given() -> UnlabelledLoader:
    generator = torch.Generator().manual_seed(1)
    images = GivenImages(
        [torch.rand(7, 3, 12, 16, generator=generator), torch.rand(6, 3, 12, 16, generator=generator)]
    )
    return training_images(images, range(2, 13), 4)


def test_prepared_images_are_cropped_anew_in_each_epoch(given: UnlabelledLoader) -> None:
    first, again, second = epoch(given, 1), epoch(given, 1), epoch(given, 2)
    assert [len(batch) for batch in first] == [given.global_size(batch) for batch in range(3)] == [4, 4, 3]
    assert len(given) == 3
    assert all(one.shape[1:] == (3, 12, 16) for one in first)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(epoch(given, 2, 1), second[1:], strict=True))
    assert torch.cat(first).min() >= 0
    assert torch.cat(first).max() <= 1 + 1e-6


def test_vectors_are_mixed_but_not_cropped() -> None:
    vectors = torch.arange(24.0).reshape(8, 3)
    batches = epoch(training_images(GivenImages([vectors]), range(2, 8), 4), 1)
    # On the line between two of them.
    assert torch.cat(batches).diff(dim=1) == pytest.approx(torch.ones(6, 2), abs=1e-5)
    assert torch.cat(batches).min() >= 6


def test_each_file_is_decoded_once_and_the_log_says_the_bytes(
    digits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    images = CalibrationImages(list_images(digits, "train", 10), PREPROCESSING, hflip=False)
    loader = training_images(images, range(10, 30), 8)
    assert "20 of 20 images are kept decoded in memory: 0.0 MiB" in caplog.text
    monkeypatch.setattr("vbp.data.folder.ImageList.read", None)  # no file is opened any more
    first, second = epoch(loader, 1), epoch(loader, 2)
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert not torch.equal(first[0], second[0])
    monkeypatch.undo()
    monkeypatch.setattr("vbp.statistics.training_images.available_memory", lambda: 0)
    from_files = epoch(training_images(images, range(10, 30), 8), 1)
    assert "0 of 20 images are kept decoded in memory" in caplog.text
    assert all(torch.equal(one, other) for one, other in zip(first, from_files, strict=True))


def test_two_processes_share_out_the_mixtures_of_one(digits: Path) -> None:
    known = list_images(digits, "train", 10), PREPROCESSING
    alone = training_images(CalibrationImages(*known, hflip=False), range(10, 30), 8)
    shares = [
        training_images(CalibrationImages(*known, Session(Processes(rank, 2)), hflip=False), range(10, 30), 4)
        for rank in (0, 1)
    ]
    for batch, *parts in zip(epoch(alone, 3), *(epoch(share, 3) for share in shares), strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(part, batch[rank::2])


def test_mixtures_lie_between_two_images_or_have_a_rectangle_of_another() -> None:
    ones, zeros = torch.ones(30, 3, 8, 8), torch.zeros(30, 3, 8, 8)
    mixtures = torch.cat(epoch(training_images(GivenImages([ones, zeros]), range(60), 60), 1))
    # One in two is no mixture, and one in four is of two images that are alike.
    plain = sum(bool((one.round(decimals=5) == one.flatten()[0].round()).all()) for one in mixtures)
    assert 30 < plain < 58
    even = [float(one.flatten()[0]) for one in mixtures if one.std() < 1e-6]
    cut = [one for one in mixtures if one.std() >= 1e-6]
    assert any(0.05 < value < 0.95 for value in even)
    assert cut
    assert all(set(one.round(decimals=5).unique().tolist()) == {0.0, 1.0} for one in cut)


def test_images_are_kept_as_far_as_the_memory_goes_and_bad_ones_are_left_to_the_reader() -> None:
    source = Pixels(6, bad=frozenset({1}))
    kept = DecodedOnce.keep(source, at_most=58 * 3, max_pixels=MAX)  # an image of one pixel takes 58 bytes
    assert (kept.kept, kept.size) == (3, 174)
    assert [bitmap is not None for bitmap in kept.bitmaps] == [True, False, True, True, False, False]
    source.read_so_far.clear()
    with kept.read(3) as stream, Image.open(stream) as image:
        assert image.getpixel((0, 0)) == (3, 3, 3)
    assert source.read_so_far == []
    with kept.read(4) as stream, Image.open(stream) as image:
        assert image.getpixel((0, 0)) == (4, 4, 4)
    assert source.read_so_far == [4]
    with pytest.raises(OSError, match="bad sector"):
        kept.read(1)
    assert (len(kept), kept.labels, kept.name(2), kept.root) == (6, source.labels, "pixel 2", "memory")
