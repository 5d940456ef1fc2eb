"""Stages and processes change nothing about the statistics, and all processes stop together once it is converged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from vbp import InputError
from vbp.method.moments import channel_moments
from vbp.pruning.convergence import (
    CONVERGED_SHARE,
    Convergence,
    Stage,
    calibrate,
    changed_share,
    merge_across,
    stage_ends,
)
from vbp.pruning.make_plan import make_plan
from vbp.pruning.plan import PruningPlan, SitePlan
from vbp.runtime.processes import Processes
from vbp.sites.site import Site
from vbp.statistics.statistics import Statistics

ALONE = Processes()
SITES = (Site(("a.fc1",), "a.fc2", 60), Site(("b.fc1",), "b.fc2", 40))


def images(count: int) -> dict[str, Tensor]:
    """Return activations "images tokens hidden" of each site, of very different means and variances."""
    generator = torch.Generator().manual_seed(0)

    def draw(hidden: int) -> Tensor:
        scale = torch.logspace(-1, 1, hidden, dtype=torch.float64)
        return torch.randn(count, 3, hidden, generator=generator, dtype=torch.float64) * scale + 50

    return {site.name: draw(site.hidden) for site in SITES}


def statistics_of(values: dict[str, Tensor], places: range) -> Statistics | None:
    """Return what one pass over some images sees."""
    if not len(places):
        return None
    moments = {name: channel_moments(value[list(places)]) for name, value in values.items()}
    return Statistics(moments, len(places), "model", "data")


def plan_of(statistics: Statistics) -> PruningPlan:
    return make_plan(SITES, statistics.variances, keep_ratio=0.5)


def scripted(*kept: range) -> Callable[[Statistics], PruningPlan]:
    """Return a planner that keeps other channels of one site at each stage."""
    script = iter(kept)
    return lambda statistics: PruningPlan((SitePlan(SITES[0], tuple(next(script))),), 0.5, "global")


@dataclass
class Meeting:
    """A job of several processes, each a thread: what they give is exchanged in the order of ranks."""

    world: int
    gathered: int = 0
    barrier: threading.Barrier = field(init=False)
    values: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world, timeout=20)
        self.values = [None] * self.world

    def run(self, work: Callable[[Processes], Any]) -> list[Any]:
        """Return what each process returns."""
        found: list[Any] = [None] * self.world

        def process(rank: int) -> None:
            try:
                found[rank] = work(_Member(rank, self.world, meeting=self))
            except InputError as error:
                found[rank] = error

        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@dataclass(frozen=True)
class _Member(Processes):
    meeting: Any = None

    def all_gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = list(self.meeting.values)
        self.meeting.gathered += self.rank == 0
        self.meeting.barrier.wait()
        return values


def same(first: Statistics, second: Statistics) -> None:
    """Compare to 1e-12, relative."""
    assert first.images == second.images
    assert (first.model, first.data) == (second.model, second.data)
    for name, moments in first.moments.items():
        other = second.moments[name]
        assert moments.count == other.count
        torch.testing.assert_close(moments.mean, other.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(moments.variance, other.variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("total", "ends"),
    [
        (1, (1,)),
        (511, (256, 511)),
        (510, (510,)),
        (1000, (500, 1000)),
        (4096, (256, 512, 1024, 2048, 4096)),
    ],
)
def test_stages_are_halves_from_the_end(total: int, ends: tuple[int, ...]) -> None:
    assert stage_ends(total) == ends


def test_every_stage_of_imagenet_is_a_doubling() -> None:
    ends = stage_ends(1_281_167)
    assert ends[-1] == 1_281_167
    assert 256 <= ends[0] < 512
    assert all(2 * half - 1 <= whole <= 2 * half for half, whole in pairwise(ends))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_stages_and_processes_give_what_one_pass_gives(world: int) -> None:
    total = 1100
    values = images(total)
    whole = statistics_of(values, range(total))
    assert whole is not None

    def work(processes: Processes) -> tuple[Statistics, Convergence]:
        return calibrate(
            lambda places: statistics_of(values, places[processes.rank :: world]), total, plan_of, processes
        )

    meeting = Meeting(world)
    found = meeting.run(work)
    for statistics, convergence in found:
        same(statistics, whole)
        assert plan_of(statistics) == plan_of(whole)
        assert convergence == found[0][1]
        assert [stage.images for stage in convergence.stages] == [275, 550, 1100]
    # Every process holds the same bits, and they met at the ends of stages alone.
    for name, moments in found[0][0].moments.items():
        assert all(torch.equal(other.moments[name].m2, moments.m2) for other, _ in found)
    assert meeting.gathered == 2 * 3


def test_a_process_without_images_contributes_nothing() -> None:
    values = images(2)
    shards = [range(0), range(1), range(0), range(1, 2)]
    for statistics in Meeting(4).run(lambda job: merge_across(statistics_of(values, shards[job.rank]), job)):
        whole = statistics_of(values, range(2))
        assert whole is not None
        same(statistics, whole)


def test_no_image_on_any_process_is_an_error_on_all() -> None:
    for found in Meeting(2).run(lambda job: merge_across(None, job)):
        assert isinstance(found, InputError)
        assert "got none on any process" in str(found)
    with pytest.raises(InputError, match="at least one image, got 0"):
        calibrate(lambda places: None, 0, plan_of, ALONE)


def test_the_share_that_changes_counts_channels_kept_before_and_removed_now() -> None:
    def plan(*kept: tuple[int, ...]) -> PruningPlan:
        return PruningPlan(tuple(map(SitePlan, SITES, kept)), 0.5, "global")

    before = plan((0, 1, 2, 3), (0, 1))
    assert changed_share(before, before) == 0
    assert changed_share(before, plan((0, 1, 2, 4), (0, 5))) == 2 / 100
    assert changed_share(before, plan((0, 1, 2, 3, 4), (0,))) == 1 / 100  # one site gained what the other lost


# Out of 60 channels: one that changes is above one per cent, none is below.
MOVING = [range(0, 30), range(1, 31), range(2, 32), range(3, 33), range(4, 34)]


@pytest.mark.parametrize(
    ("kept", "auto", "used", "converged"),
    [
        (MOVING, False, 4096, None),
        (MOVING, True, 4096, None),
        ([*MOVING[:3], MOVING[2], MOVING[2]], False, 4096, 2048),
        ([*MOVING[:3], MOVING[2], MOVING[2]], True, 2048, 2048),
        ([MOVING[0], MOVING[0], *MOVING[1:4]], True, 512, 512),
        ([MOVING[0], MOVING[0], *MOVING[1:4]], False, 4096, None),
        ([MOVING[0]] * 5, False, 4096, 512),
    ],
)
def test_auto_stops_where_the_plan_has_converged_and_says_so(
    kept: list[range], auto: bool, used: int, converged: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vbp")
    values = images(4)

    def collect(places: range) -> Statistics | None:
        seen.extend(places)
        statistics = statistics_of(values, range(4))
        assert statistics is not None
        return Statistics(statistics.moments, len(places), "model", "data")

    seen: list[int] = []
    statistics, convergence = calibrate(collect, 4096, scripted(*kept), ALONE, auto=auto)
    assert seen == list(range(used))
    assert statistics.images == used
    assert convergence.converged == converged
    assert ("the images ran out before the plan converged" in caplog.text) == (auto and converged is None)
    assert (f"converged, {4096 - used:,} images are left out" in caplog.text) == (used < 4096)


def test_all_processes_stop_together_whatever_their_own_plans_say() -> None:
    values = images(4)
    own = [scripted(MOVING[0], MOVING[0]), scripted(*MOVING)]

    def work(processes: Processes) -> int:
        statistics = statistics_of(values, range(2))
        return calibrate(lambda places: statistics, 1024, own[processes.rank], processes, auto=True)[0].images

    assert Meeting(2).run(work) == [8, 8]


def test_convergence_is_plain_data_and_readable() -> None:
    convergence = Convergence((Stage(512, None), Stage(1000, 0.0214)))
    assert convergence.to_dict() == {
        "stages": [{"images": 512, "changed": None}, {"images": 1000, "changed": 0.0214}],
        "converged": None,
    }
    assert convergence.table().splitlines() == [
        "    images  channels that changed",
        "       512  -",
        "     1,000  2.1 %",
        "last doubling, 512 -> 1,000 images: 2.1 % of the channels would change; not converged (at most 1.0 %): give "
        "more images",
    ]
    converged = Convergence((*convergence.stages, Stage(2000, CONVERGED_SHARE), Stage(4000, 0.004)))
    assert converged.converged == 2000
    assert converged.table().endswith("0.4 % of the channels would change; converged at 2,000 images")
    alone = Convergence((Stage(9, None),))
    assert alone.converged is None
    assert alone.table().endswith("too few images to say whether the plan has converged; 512 or more would tell")
