"""Evidence read in parts and by several processes: that of one pass, each image with its own random numbers."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from itertools import zip_longest
from threading import Barrier
from typing import Any

import pytest
import torch
from pairs import Pair
from PIL import Image
from torch import Tensor, nn

import vbp.statistics.images
from vbp import InputError, Preprocessing, Site, Statistics, find_sites, list_images, load_classifier
from vbp.data.digits import MODEL_KWARGS, MODEL_NAME, WEIGHTS, write_digits
from vbp.data.images import balanced_order, balanced_subset
from vbp.pruning.divergence import DenseReference
from vbp.recipes.demo import PREPROCESSING_OVERRIDES
from vbp.runtime.processes import Processes
from vbp.runtime.session import Session
from vbp.statistics.collect import collect_statistics
from vbp.statistics.evidence import EvidenceReader, Need
from vbp.statistics.images import CalibrationImages, GivenImages, default_views

ALL: tuple[Need, ...] = ("statistics", "covariance", "sensitivity")
IMAGES = 40


@dataclass(frozen=True)
class Case:
    """A dense model, its sites, and images."""

    model: nn.Module
    sites: tuple[Site, ...]
    images: CalibrationImages

    def reader(self, needs: Sequence[Need], **changes: Any) -> EvidenceReader:
        """Return what reads these images, with some of their settings changed."""
        return EvidenceReader(self.model, self.sites, replace(self.images, **changes), needs, covariance_tokens=0.5)

    def shared(self, processes: Processes, **changes: Any) -> CalibrationImages:
        """Return the images as one of several processes has them."""
        return replace(self.images, session=Session(processes), **changes)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return the demo's model on some digits, in float64."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    classifier = load_classifier(MODEL_NAME, model_kwargs=MODEL_KWARGS, checkpoint=WEIGHTS, **PREPROCESSING_OVERRIDES)
    images = balanced_subset(list_images(folder, "train", classifier.num_classes), IMAGES, 0)
    model = classifier.model
    sites = find_sites(model, classifier.example_input())
    return Case(model.double(), sites, CalibrationImages(images, classifier.preprocessing, batch_size=128))


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    real = vbp.statistics.images.evaluation_transform

    def exact(preprocessing: Preprocessing) -> Callable[[Any], Tensor]:
        transform = real(preprocessing)
        return lambda image: transform(image).double()

    monkeypatch.setattr(vbp.statistics.images, "evaluation_transform", exact)


def _read(case: Case, needs: tuple[Need, ...], parts: list[range], sizes: list[int], world: int) -> Statistics:
    """Read parts with a batch size each by some processes in turn, and merge as a run does."""
    merged: list[Statistics] = []
    shares: list[list[Statistics | None]] = []
    for rank in range(world):
        images = case.shared(Processes(rank, world))
        reader = EvidenceReader(case.model, case.sites, images, needs, covariance_tokens=0.5)
        found = []
        for part, size in zip(parts, sizes, strict=True):
            object.__setattr__(images, "batch_size", size)
            found.append(reader.read(part))
        shares.append(found)
    for part in zip(*shares, strict=True):
        merged.append(reduce(Statistics.merge, [one for one in part if one is not None]))
    return reduce(Statistics.merge, merged)


def _close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("parts", "sizes", "world"),
    [
        ([range(IMAGES)], [7], 2),
        ([range(9), range(9, 22), range(22, IMAGES)], [4, 20, 5], 1),
        # In the first part the second process has nothing.
        ([range(9), range(9, IMAGES)], [9, 4], 2),
    ],
)
def test_parts_and_processes_give_what_one_pass_gives(
    case: Case, parts: list[range], sizes: list[int], world: int
) -> None:
    whole = _read(case, ALL, [range(IMAGES)], [IMAGES], 1)
    split = _read(case, ALL, parts, sizes, world)
    assert (whole.images, whole.token_fraction, whole.data) == (split.images, split.token_fraction, split.data)
    assert (whole.images, whole.token_fraction, whole.data) == (IMAGES, 0.5, case.images.fingerprint)
    for site in case.sites:
        name = site.name
        _close(split.means[name], whole.means[name])
        _close(split.variances[name], whole.variances[name])
        one, other = whole.covariances[name], split.covariances[name]
        assert one.count == other.count == IMAGES * 9  # of 17 tokens
        _close(other.mean, one.mean)
        _close(other.m2, one.m2)
        first, second = whole.sensitivities[name], split.sensitivities[name]
        assert first.images == second.images == IMAGES
        _close(second.pivot, first.pivot)
        _close(second.inputs, first.inputs)
        _close(second.outputs, first.outputs)


def test_only_what_is_needed_is_collected_and_memory_is_told(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vbp.statistics.evidence"):
        plain = case.reader(["statistics"]).read(range(8))
        assert not caplog.messages
        case.reader(ALL)
    assert plain is not None
    assert not plain.covariances
    assert not plain.sensitivities
    # Four sites of 256 channels, and 64 outputs of each.
    size = 4 * 8 * (256 * 256 + 256) / 1e6
    assert caplog.messages == [
        f"calibration: covariance of 4 sites, {size:.0f} MB on cpu",
        "calibration: sensitivity of 4 sites, 2 MB on cpu",
    ]
    assert case.reader([]).gradients() is None


def test_gradients_go_on_from_part_to_part(case: Case) -> None:
    whole, parts = case.reader(["gradients"]), case.reader(["gradients", "statistics"])
    assert whole.read(range(12)) is None
    assert parts.read(range(5)) is not None
    assert parts.read(range(5, 12)) is not None
    found, wanted = parts.gradients(), whole.gradients()
    assert found is not None
    assert wanted is not None
    for name, gradient in wanted.items():
        _close(found[name], gradient)


def test_held_out_images_are_the_first_of_the_order_whoever_reads_them(case: Case) -> None:
    alone = DenseReference.held_out(case.model, case.images, range(11))
    assert alone.images == 11
    order = balanced_order(case.images.images, case.images.seed)
    transform = vbp.statistics.images.evaluation_transform(case.images.preprocessing)
    pixels = []
    for place in order[:11]:
        with case.images.images.read(place) as file:
            pixels.append(transform(Image.open(file).convert("RGB")))
    assert torch.equal(torch.cat([*alone.batches]), torch.stack(pixels))
    changed = copy.deepcopy(case.model)
    with torch.no_grad():
        changed.get_parameter("head.weight").mul_(0.9)
    barrier, slots = Barrier(2), [torch.empty(0)] * 2

    def work(rank: int) -> tuple[int, float]:
        shared = case.shared(Pair(rank, barrier, slots))
        images = DenseReference.held_out(copy.deepcopy(case.model), shared, range(11))
        assert 5 <= sum(map(len, images.batches)) <= 6
        return images.images, images.divergence(copy.deepcopy(changed))

    with ThreadPoolExecutor(2) as pool:
        for images, divergence in pool.map(work, range(2)):
            assert images == 11
            assert divergence == pytest.approx(alone.divergence(changed), rel=1e-9)
            assert divergence > 0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_views_of_an_image_follow_it_whoever_reads_them(case: Case, world: int) -> None:
    size, views, images = 7, 3, 11
    settings = {"batch_size": size, "hflip": False}

    def batches(rank: int) -> list[tuple[Tensor, Tensor]]:
        loader = case.shared(Processes(rank, world), **settings).share(range(2, 2 + images), views)
        return [] if loader is None else [*loader]

    alone = replace(case.images, **settings)
    loader = alone.share(range(2, 2 + images), views)
    assert loader is not None
    pixels, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    again = torch.cat([one for one, _ in loader])
    assert torch.equal(again, pixels)
    assert torch.equal(torch.cat([*alone.pixels(range(2, 2 + images), "views", views)]), pixels)
    shares = [batches(rank) for rank in range(world)]
    dealt = torch.cat([one for batch in zip_longest(*shares) for one, _ in filter(None, batch)])
    assert torch.equal(dealt, pixels)
    order = balanced_order(alone.images, alone.seed)[2 : 2 + images]
    assert labels.tolist() == [alone.images.labels[place] for place in order for _ in range(views)]
    # One in three is the image as for evaluation, the others are crops.
    single = alone.share(range(2, 2 + images))
    assert single is not None
    plain = torch.cat([one for one, _ in single])
    same = (pixels == plain.repeat_interleave(views, 0)).flatten(1).all(1)
    assert 3 < int(same.sum()) < 20


@pytest.mark.parametrize("world", [1, 2])
def test_statistics_of_views_are_those_of_so_many_images(case: Case, world: int) -> None:
    crop = dataclasses.replace(case, images=replace(case.images, views=3))
    one, many = _read(case, ALL, [range(12)], [36], 1), _read(crop, ALL, [range(12)], [9], world)
    assert (one.images, many.images) == (12, 36)
    # The same numbers for any number of processes, whose batches are of the same size.
    again = _read(crop, ALL, [range(12)], [9], 1)
    name = case.sites[0].name
    _close(many.covariances[name].m2, again.covariances[name].m2)
    _close(many.sensitivities[name].inputs, again.sensitivities[name].inputs)
    # The values are those of the views, which the loader gives.
    seen = torch.cat([pixels for pixels, _ in replace(crop.images, batch_size=9).parts(range(12), "", labels=True)])
    mean = collect_statistics(case.model, case.sites, [seen]).means[name]
    _close(many.means[name], mean)
    assert not torch.allclose(mean, one.means[name])


def test_a_gpu_reads_four_views_and_a_cpu_one() -> None:
    assert default_views(torch.device("cpu")) == 1
    assert default_views(torch.device("cuda", 0)) == 4


def test_given_batches_are_read_again_and_by_place() -> None:
    pixels = torch.arange(10.0)[:, None, None, None].expand(10, 3, 2, 2)
    given = GivenImages([(pixels[:4], torch.zeros(4)), (pixels[4:6], torch.zeros(2)), (pixels[6:], torch.zeros(4))])
    assert len(given) == 10
    some = given.pixels(range(3, 8), "some")
    for _ in range(2):
        assert torch.equal(torch.cat([*some]), pixels[3:8])
    assert torch.equal(torch.cat([*given.pixels(range(8, 1008), "rest")]), pixels[8:])
    with pytest.raises(InputError, match="can be gone through several times"):
        GivenImages(iter([pixels]))
    with pytest.raises(InputError, match="views must be 1 for batches of prepared images, got 4"):
        given.pixels(range(3), "some", views=4)
