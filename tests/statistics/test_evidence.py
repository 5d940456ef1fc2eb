"""Evidence read in parts and by several processes: that of one pass, each image with its own random numbers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from itertools import zip_longest
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from pairs import Pair
from PIL import Image
from torch import Tensor

import vbp.statistics.evidence
import vbp.statistics.images
from vbp import InputError, Preprocessing, RunConfig, Statistics
from vbp.data.digits import MODEL_KWARGS, MODEL_NAME, WEIGHTS
from vbp.data.images import balanced_order
from vbp.pruning.divergence import held_back
from vbp.recipes.demo import PREPROCESSING_OVERRIDES
from vbp.recipes.setup import Job, prepare
from vbp.runtime.processes import Processes
from vbp.statistics.evidence import EvidenceReader, Need, check_given
from vbp.statistics.images import calibration_share, views_of

ALL: tuple[Need, ...] = ("statistics", "covariance", "sensitivity")
IMAGES = 40


@pytest.fixture(scope="module")
def job(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Return the demo's model on some digits, in float64."""
    config = RunConfig(
        data_path=str(digits),
        model_name=MODEL_NAME,
        model_kwargs=dict(MODEL_KWARGS),
        checkpoint=WEIGHTS,
        **PREPROCESSING_OVERRIDES,
        num_workers=0,
        calib_samples=IMAGES,
        limit_val=10,
        save_dir=tmp_path_factory.mktemp("run"),
    )
    job = prepare(config, Processes(), torch.device("cpu"))
    job.model.double()
    return job


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    real = vbp.statistics.evidence.evaluation_transform

    def exact(preprocessing: Preprocessing) -> Callable[[Any], Tensor]:
        transform = real(preprocessing)
        return lambda image: transform(image).double()

    for module in (vbp.statistics.evidence, vbp.statistics.images):
        monkeypatch.setattr(module, "evaluation_transform", exact)


def _read(job: Job, needs: tuple[Need, ...], parts: list[range], sizes: list[int], world: int) -> Statistics:
    """Read parts with a batch size each by some processes in turn, and merge as a run does."""
    merged: list[Statistics] = []
    shares: list[list[Statistics | None]] = []
    for rank in range(world):
        reader = EvidenceReader(replace(job, processes=Processes(rank, world)), needs, covariance_tokens=0.5)
        found = []
        for part, size in zip(parts, sizes, strict=True):
            reader._job = replace(reader._job, config=replace(job.config, val_batch_size=size))
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
    job: Job, parts: list[range], sizes: list[int], world: int
) -> None:
    whole = _read(job, ALL, [range(IMAGES)], [IMAGES], 1)
    split = _read(job, ALL, parts, sizes, world)
    assert (whole.images, whole.token_fraction, whole.data) == (split.images, split.token_fraction, split.data)
    assert (whole.images, whole.token_fraction, whole.data) == (IMAGES, 0.5, job.data)
    for site in job.sites:
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


def test_only_what_is_needed_is_collected_and_memory_is_told(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vbp.statistics.evidence"):
        plain = EvidenceReader(job, ["statistics"]).read(range(8))
        assert not caplog.messages
        EvidenceReader(job, ALL)
    assert plain is not None
    assert not plain.covariances
    assert not plain.sensitivities
    # Four sites of 256 channels, and 64 outputs of each.
    size = 4 * 8 * (256 * 256 + 256) / 1e6
    assert caplog.messages == [
        f"calibration: covariance of 4 sites, {size:.0f} MB on cpu",
        "calibration: sensitivity of 4 sites, 2 MB on cpu",
    ]
    assert EvidenceReader(job, []).gradients() is None


def test_gradients_go_on_from_part_to_part(job: Job) -> None:
    whole, parts = EvidenceReader(job, ["gradients"]), EvidenceReader(job, ["gradients", "statistics"])
    assert whole.read(range(12)) is None
    assert parts.read(range(5)) is not None
    assert parts.read(range(5, 12)) is not None
    found, wanted = parts.gradients(), whole.gradients()
    assert found is not None
    assert wanted is not None
    for name, gradient in wanted.items():
        _close(found[name], gradient)


def test_held_back_images_are_the_first_of_the_order_whoever_reads_them(job: Job) -> None:
    alone = held_back(job, job.model, 11)
    assert alone.images == 11
    order = balanced_order(job.calibration, job.config.seed)
    transform = vbp.statistics.evidence.evaluation_transform(job.classifier.preprocessing)
    pixels = []
    for place in order[:11]:
        with job.calibration.read(place) as file:
            pixels.append(transform(Image.open(file).convert("RGB")))
    assert torch.equal(torch.cat(alone._batches), torch.stack(pixels))
    changed = copy.deepcopy(job.model)
    with torch.no_grad():
        changed.get_parameter("head.weight").mul_(0.9)
    barrier, slots = Barrier(2), [torch.empty(0)] * 2

    def work(rank: int) -> tuple[int, float]:
        model = copy.deepcopy(job.model)
        mine = replace(job, processes=Pair(rank, barrier, slots), classifier=replace(job.classifier, model=model))
        images = held_back(mine, mine.model, 11)
        assert 5 <= sum(map(len, images._batches)) <= 6
        return images.images, images.divergence(copy.deepcopy(changed))

    with ThreadPoolExecutor(2) as pool:
        for images, divergence in pool.map(work, range(2)):
            assert images == 11
            assert divergence == pytest.approx(alone.divergence(changed), rel=1e-9)
            assert divergence > 0


def test_given_statistics_must_hold_what_is_needed(job: Job) -> None:
    given = EvidenceReader(job, ["statistics", "covariance"]).read(range(8))
    with_file = replace(job, given=given, config=replace(job.config, stats_path=Path("stored")))
    check_given(with_file, ["statistics", "covariance"])
    with pytest.raises(InputError, match="stored must hold the sensitivity"):
        check_given(with_file, ALL)
    check_given(job, ALL)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_views_of_an_image_follow_it_whoever_reads_them(job: Job, world: int) -> None:
    size, views, images = 7, 3, 11
    config = replace(job.config, val_batch_size=size, hflip=False)

    def batches(rank: int) -> list[tuple[Tensor, Tensor]]:
        found = replace(job, config=config, processes=Processes(rank, world))
        loader = calibration_share(found, range(2, 2 + images), views)
        return [] if loader is None else [*loader]

    alone = replace(job, config=config)
    loader = calibration_share(alone, range(2, 2 + images), views)
    assert loader is not None
    pixels, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    again = torch.cat([one for one, _ in loader])
    assert torch.equal(again, pixels)
    shares = [batches(rank) for rank in range(world)]
    dealt = torch.cat([one for batch in zip_longest(*shares) for one, _ in filter(None, batch)])
    assert torch.equal(dealt, pixels)
    order = balanced_order(job.calibration, config.seed)[2 : 2 + images]
    assert labels.tolist() == [job.calibration.labels[place] for place in order for _ in range(views)]
    # One in three is the image as for evaluation, the others are crops.
    single = calibration_share(alone, range(2, 2 + images))
    assert single is not None
    plain = torch.cat([one for one, _ in single])
    same = (pixels == plain.repeat_interleave(views, 0)).flatten(1).all(1)
    assert 3 < int(same.sum()) < 20


def test_a_gpu_reads_four_views_and_a_cpu_one_unless_told_otherwise(job: Job) -> None:
    assert views_of(job) == 1
    assert views_of(replace(job, device=torch.device("cuda", 0))) == 4
    assert views_of(replace(job, config=replace(job.config, refit_views=6))) == 6
