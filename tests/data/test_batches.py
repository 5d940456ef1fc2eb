"""Shares of ranks and workers: one process without workers is the oracle."""

from __future__ import annotations

import itertools
import logging
import math
import os
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pixels import Pixels, loader, number_and_noise
from torch import Tensor

from vbp.data.loader import PlannedBatches, make_loader
from vbp.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

Batches = list[tuple[Tensor, Tensor]]


def numbers(batches: Batches) -> list[list[int]]:
    return [images[:, 0, 0, 0].int().tolist() for images, _ in batches]


def flat(batches: Iterable[tuple[Tensor, Tensor]]) -> list[int]:
    return list(itertools.chain(*numbers(list(batches))))


def equal(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


def interleaved(shares: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put the shares of one global batch together in the order in which they were dealt out."""
    world, total = len(shares), sum(len(labels) for _, labels in shares)
    images = torch.stack([shares[i % world][0][i // world] for i in range(total)])
    return images, torch.stack([shares[i % world][1][i // world] for i in range(total)])


# --- the plan


plans = {
    "count": st.integers(1, 80),
    "batch_size": st.integers(1, 12),
    "world": st.integers(1, 6),
    "seed": st.integers(0, 2**40),
}


@given(**plans)
@settings(deadline=None)
def test_in_order_the_batches_are_those_of_one_process(count: int, batch_size: int, world: int, seed: int) -> None:
    one = list(PlannedBatches(count, batch_size, shuffle=False, seed=seed))
    assert [index for batch in one for _, index in batch] == list(range(count))
    assert all(len(batch) == batch_size for batch in one[:-1])
    for rank in range(world):
        share = PlannedBatches(count, batch_size, shuffle=False, seed=seed, rank=rank, world=world)
        assert list(share) == one[rank::world]
        assert len(share) == len(one[rank::world])


@given(**plans, epoch=st.integers(0, 3))
@settings(deadline=None)
def test_shuffled_the_shares_are_one_batch_dealt_out(
    count: int, batch_size: int, world: int, seed: int, epoch: int
) -> None:
    together = PlannedBatches(count, batch_size * world, shuffle=True, seed=seed)
    shares = [
        PlannedBatches(count, batch_size, shuffle=True, seed=seed, rank=rank, world=world) for rank in range(world)
    ]
    for planned in (together, *shares):
        planned.epoch = epoch
    one = list(together)
    assert sorted(key for batch in one for key in batch) == [(epoch, index) for index in range(count)]
    if len(one[-1]) < world:
        del one[-1]
    dealt = [list(share) for share in shares]
    assert {len(share) for share in shares} == {len(batches) for batches in dealt} == {len(one)}
    for step, batch in enumerate(one):
        assert [share[step] for share in dealt] == [batch[rank::world] for rank in range(world)]
        assert all(share.global_size(step) == len(batch) for share in shares)
    with pytest.raises(InputError, match=f"got {len(one)}"):
        shares[0].global_size(len(one))


@given(**plans, shuffle=st.booleans(), data=st.data())
@settings(deadline=None)
def test_a_start_leaves_out_the_batches_before_it(
    count: int, batch_size: int, world: int, seed: int, shuffle: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world - 1))
    planned = PlannedBatches(count, batch_size, shuffle=shuffle, seed=seed, rank=rank, world=world)
    whole = list(planned)
    planned.start = data.draw(st.integers(0, len(planned)))
    assert list(planned) == whole[planned.start :]
    assert len(planned) == len(whole)


def test_the_order_of_one_process_stays_what_it_was() -> None:
    # Recorded with version 0.1.0: an order that changes makes every published figure another one.
    planned = PlannedBatches(10, 4, shuffle=True, seed=3)
    planned.epoch = 2
    assert [[index for _, index in batch] for batch in planned] == [[2, 7, 4, 8], [0, 1, 3, 9], [5, 6]]


# --- the loader


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_image_comes_once_in_order(world: int, workers: int) -> None:
    images = Pixels(17)
    one = list(loader(images, shuffle=False))
    shares = [list(loader(images, shuffle=False, workers=workers, rank=rank, world=world)) for rank in range(world)]
    for rank, share in enumerate(shares):
        assert equal(share, one[rank::world])
    assert sorted(flat(itertools.chain(*shares))) == list(range(17))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("count", "world"), [(17, 1), (17, 2), (18, 2), (17, 3), (17, 5), (31, 5)])
def test_shuffled_shares_make_up_the_batches_of_one_process(count: int, world: int, workers: int) -> None:
    images = Pixels(count, bad=frozenset([count - 1]))
    single = loader(images, 3 * world)
    ranks = [loader(images, workers=workers, rank=rank, world=world) for rank in range(world)]
    for epoch in (0, 1):
        for each in (single, *ranks):
            each.set_epoch(epoch)
        one = [batch for batch in single if len(batch[1]) >= world]
        shares = [list(each) for each in ranks]
        assert [len(each) for each in ranks] == [math.ceil((count - world + 1) / (3 * world))] * world
        assert equal([interleaved(step) for step in zip(*shares, strict=True)], one)
        assert [ranks[0].global_size(step) for step in range(len(one))] == [len(labels) for _, labels in one]


def test_a_rank_without_a_batch_gives_nothing() -> None:
    shares = [loader(Pixels(5), shuffle=False, rank=rank, world=4) for rank in range(4)]
    assert [len(each) for each in shares] == [1, 1, 0, 0]
    assert [flat(each) for each in shares] == [[0, 1, 2], [3, 4], [], []]
    assert list(loader(Pixels(5), shuffle=False, workers=1, rank=3, world=4)) == []


def test_a_share_may_be_unreadable_but_not_the_whole_list() -> None:
    # The last batch is a single bad image: one process would go on, so the process that has it does.
    assert list(loader(Pixels(10, bad=frozenset([9])), shuffle=False, rank=3, world=4)) == []
    images = Pixels(4, bad=frozenset(range(4)))
    for shuffle in (False, True):
        everything = make_loader(
            images, number_and_noise, batch_size=4, num_workers=0, shuffle=shuffle, max_unreadable=1.0, world=2
        )
        with pytest.raises(InputError, match="no image of memory could be read: pixel"):
            list(everything)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_epoch_goes_on_where_it_stopped(shuffle: bool, workers: int) -> None:
    images = Pixels(17)
    each = loader(images, shuffle=shuffle, workers=workers, rank=1, world=2)
    each.set_epoch(2)
    whole = list(each)
    images.read_so_far.clear()
    each.set_epoch(2, start=2)
    rest = list(each)
    assert equal(rest, whole[2:])
    assert len(rest) > 0
    if workers == 0:
        assert images.read_so_far == flat(rest)
    each.set_epoch(2, start=len(each))
    assert list(each) == []
    each.set_epoch(2)
    assert equal(list(each), whole)
    for start in (-1, len(each) + 1):
        with pytest.raises(InputError, match=f"start must be .* from 0 to {len(each)}, got {start}"):
            each.set_epoch(2, start=start)


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_an_unreadable_image_is_replaced_by_the_next(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    count, bad = 40, {5, 6, 39}
    each = loader(Pixels(count, bad=frozenset(bad)), 4, workers=workers)
    whole = loader(Pixels(count), 4)
    stand_in = {5: 7, 6: 7, 39: 0}
    for epoch in range(2):
        for loaded in (each, whole):
            loaded.set_epoch(epoch)
        batches = list(each)
        expected = [[stand_in.get(number, number) for number in batch] for batch in numbers(list(whole))]
        assert numbers(batches) == expected
        # Its label and its noise are its own: it is one and the same image wherever it stands.
        labels = [labels.tolist() for _, labels in batches]
        assert labels == [[number % 7 for number in batch] for batch in expected]
        by_number = {tuple(image.flatten().tolist()) for images, _ in batches for image in images}
        assert len(by_number) == count - len(bad)
    assert set(each.unreadable) == {f"pixel {index}" for index in bad}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert Counter(warnings) == {
        f"cannot read the image pixel {index} (OSError: bad sector); the next readable one takes its place": 1
        for index in bad
    }


def test_shuffled_too_many_unreadable_images_stop_the_run() -> None:
    with pytest.raises(InputError, match="at most 4 of 40 images may be unreadable, got 5 so far"):
        list(loader(Pixels(40, bad=frozenset(range(10, 15)))))


def test_no_worker_outlives_a_killed_process() -> None:
    """Workers inherit the pipe's writing end: the reading end tells when the last of them has gone."""
    script = (
        "import time, torch.utils.data._utils.worker as worker; from pixels import Pixels, loader\n"
        "worker.MP_STATUS_CHECK_INTERVAL = 0.5\n"
        "for _ in loader(Pixels(40), 1, workers=2):\n    print('started', flush=True); time.sleep(60)"
    )
    reading, writing = os.pipe()
    # A process of its own: a fork of this one would inherit the locks of whatever threads earlier tests left.
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1] / "support", env=os.environ | {"OMP_NUM_THREADS": "1"}, pass_fds=(writing,),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.kill()
        process.wait()
        # A worker looks for its parent every half second.
        assert select.select([reading], [], [], 30)[0], "a worker still runs"
        assert os.read(reading, 1) == b""
    finally:
        os.close(reading)
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize(("use", "status"), [("list(all)", 0), ("next(iter(all))", 0), ("next(begun); 1 / 0", 1)])
def test_a_program_ends_while_processes_read_for_it(use: str, status: int) -> None:
    script = f"from pixels import Pixels, loader\nall = loader(Pixels(8), 1, workers=2)\nbegun = iter(all)\n{use}"
    ended = subprocess.run(
        [sys.executable, "-c", script], check=False, timeout=120, capture_output=True, text=True,
        cwd=Path(__file__).parents[1] / "support", env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == status
    assert ("ZeroDivisionError" in ended.stderr) == (status == 1)


def test_no_more_processes_read_than_there_are_cores_and_it_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    expected = flat(loader(Pixels(9), workers=0))
    for _ in range(2):
        assert flat(loader(Pixels(9), workers=61)) == expected
    assert caplog.messages == ["num_workers 61 is more than the cores here: 2 for each process of the job"]
    # Two processes of a job share the cores.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert flat(loader(Pixels(9), workers=2)) == expected
    assert caplog.messages[1:] == ["num_workers 2 is more than the cores here: 1 for each process of the job"]
