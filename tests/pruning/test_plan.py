"""A plan keeps the count that was asked for, to the channel, and always the best channels of a site."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbp import InputError, PruningPlan, Site, SitePlan, make_plan

SCOPES = ("global", "per_layer")


def sites_of(widths: Sequence[int]) -> tuple[Site, ...]:
    """Return sites of these widths, named so that their order is not the alphabet's."""
    names = [f"{chr(ord('z') - index)}.fc" for index in range(len(widths))]
    return tuple(Site((f"{name}1",), f"{name}2", width) for name, width in zip(names, widths, strict=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `make_plan`; ratios are whole percents, so that floors are known exactly."""

    widths: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    keep_percent: int
    floor_percent: int
    scope: str
    round_to: int = 1

    @property
    def sites(self) -> tuple[Site, ...]:
        return sites_of(self.widths)

    @property
    def scores(self) -> dict[str, Tensor]:
        return {
            site.name: torch.tensor(value, dtype=torch.float64)
            for site, value in zip(self.sites, self.values, strict=True)
        }

    @property
    def keep_ratio(self) -> float:
        return self.keep_percent / 100

    @property
    def target(self) -> int:
        return round(sum(self.widths) * self.keep_ratio)

    @property
    def floors(self) -> list[int]:
        return [max(1, math.ceil(Fraction(width * self.floor_percent, 100))) for width in self.widths]

    @property
    def reachable(self) -> list[set[int]]:
        """Return the widths that each site may get: all of it, or a multiple of `round_to` not below its floor."""
        return [
            {width, *(count for count in range(self.round_to, width, self.round_to) if count >= floor)}
            for width, floor in zip(self.widths, self.floors, strict=True)
        ]

    def plan(self) -> PruningPlan:
        return make_plan(
            self.sites,
            self.scores,
            keep_ratio=self.keep_ratio,
            scope=self.scope,  # type: ignore[arg-type]
            round_to=self.round_to,
            min_keep_ratio=self.floor_percent / 100,
        )


SCORES = (0.0, 0.0, -0.0, 0.25, 1.0, 1.0, 1.0, 3.5, -2.0, 1e-300, 0.1, 1e6)
"""Few values, so that ties abound inside a site and between sites."""


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    width: st.SearchStrategy[int] | None = None,
    round_to: Sequence[int] = (1,),
    most_sites: int = 4,
) -> Case:
    """Draw arguments; each byte of one string chooses a score, which is quick to draw."""
    width = st.integers(1, 12) if width is None else width
    widths = draw(st.lists(width, min_size=1, max_size=most_sites))
    chosen = iter(draw(st.binary(min_size=sum(widths), max_size=sum(widths))))
    values = tuple(tuple(SCORES[next(chosen) % len(SCORES)] for _ in range(number)) for number in widths)
    keep = draw(st.integers(1, 100))
    floor = draw(st.sampled_from([0, 2, keep]) | st.integers(0, keep))
    return Case(
        tuple(widths), values, keep, min(floor, keep), draw(st.sampled_from(SCOPES)), draw(st.sampled_from(round_to))
    )


def flat(widths: tuple[int, ...], keep_percent: int, floor_percent: int, scope: str, round_to: int) -> Case:
    """Return a case whose scores are all equal."""
    values = tuple((0.0,) * width for width in widths)
    return Case(widths, values, keep_percent, floor_percent, scope, round_to)


def naive_global(case: Case) -> list[list[int]]:
    """Drop the lowest of all channels, one after the other, passing over sites at their floor."""
    kept = [list(range(width)) for width in case.widths]
    queue = sorted(
        (score, site, index) for site, values in enumerate(case.values) for index, score in enumerate(values)
    )
    for _, site, index in queue:
        if sum(map(len, kept)) > case.target and len(kept[site]) > case.floors[site]:
            kept[site].remove(index)
    return kept


@given(cases())
@example(flat((100,), 7, 7, "global", 1))  # 0.07 * 100 is a little more than 7 in binary fractions
@settings(deadline=None, max_examples=25)
def test_the_count_is_exact_unless_floors_are_higher(case: Case) -> None:
    plan = case.plan()
    assert plan.kept == max(case.target, sum(case.floors))
    assert (plan.total, plan.requested) == (sum(case.widths), case.target)


@given(cases())
@settings(deadline=None, max_examples=25)
def test_global_ranking_equals_the_naive_one(case: Case) -> None:
    case = dataclasses.replace(case, scope="global")
    assert [list(entry.keep) for entry in case.plan().sites] == naive_global(case)


@given(cases(round_to=(1, 2, 3, 8)))
@example(flat((10, 20), 90, 90, "global", 8))
@example(flat((10, 20), 90, 90, "per_layer", 8))
@settings(deadline=None, max_examples=25)
def test_no_site_falls_below_its_floor_or_to_nothing(case: Case) -> None:
    for entry, floor in zip(case.plan().sites, case.floors, strict=True):
        assert len(entry.keep) >= floor


@given(cases(round_to=(1, 2, 3, 8)))
@settings(deadline=None, max_examples=25)
def test_widths_are_multiples_or_whole(case: Case) -> None:
    for entry in case.plan().sites:
        kept, hidden = len(entry.keep), entry.site.hidden
        assert kept == hidden or (kept % case.round_to == 0 and hidden >= case.round_to)


@given(cases(round_to=(1, 2, 3, 8)))
@settings(deadline=None, max_examples=25)
def test_a_site_keeps_its_best_channels(case: Case) -> None:
    for entry, values in zip(case.plan().sites, case.values, strict=True):
        goes_first = sorted(range(entry.site.hidden), key=lambda index: (values[index], index))
        assert sorted(goes_first[len(goes_first) - len(entry.keep) :]) == list(entry.keep)
        assert sorted(entry.keep + entry.removed) == list(range(entry.site.hidden))


def distance_to_nearest(case: Case) -> int:
    """Find by enumeration how far the nearest reachable total is from the count asked for."""
    return min(abs(sum(counts) - case.target) for counts in product(*case.reachable))


@given(cases(width=st.integers(1, 4).map(lambda number: 4 * number) | st.integers(1, 3), round_to=(4,), most_sites=4))
@settings(deadline=None, max_examples=25)
def test_rounding_gives_the_nearest_total_where_it_divides_the_widths(case: Case) -> None:
    # Widths from 1 to 3 are narrower than the step and stay whole.
    assert abs(case.plan().kept - case.target) == distance_to_nearest(case)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("widths", "round_to"), [((16,), 8), ((16, 3, 8), 4), ((15, 30), 5)])
def test_rounding_gives_the_nearest_total_at_every_ratio(widths: tuple[int, ...], round_to: int, scope: str) -> None:
    for percent in range(1, 101, 2):
        case = flat(widths, percent, 0, scope, round_to)
        assert abs(case.plan().kept - case.target) == distance_to_nearest(case), percent


@given(cases(width=st.sampled_from([2, 4, 6, 8]), round_to=(2,)))
@settings(deadline=None, max_examples=25)
def test_global_rounding_removes_the_least_that_whole_steps_can(case: Case) -> None:
    case = dataclasses.replace(case, scope="global")
    plan = case.plan()
    ordered = [sorted(values) for values in case.values]
    least = min(
        math.fsum(math.fsum(values[: len(values) - count]) for values, count in zip(ordered, counts, strict=True))
        for counts in product(*case.reachable)
        if sum(counts) == plan.kept
    )
    removed = math.fsum(case.values[site][index] for site, entry in enumerate(plan.sites) for index in entry.removed)
    assert removed == pytest.approx(least, rel=1e-12)


@given(cases(width=st.integers(1, 13), round_to=(2, 3, 5)))
@example(flat((10, 10), 90, 2, "global", 8))
@settings(deadline=None, max_examples=25)
def test_global_rounding_gives_the_nearest_total_at_any_width(case: Case) -> None:
    case = dataclasses.replace(case, scope="global")
    assert abs(case.plan().kept - case.target) == distance_to_nearest(case)


@given(cases(width=st.integers(1, 13), round_to=(2, 3, 5)))
@example(flat((10, 10), 90, 2, "per_layer", 8))
@settings(deadline=None, max_examples=25)
def test_per_layer_rounding_gives_the_nearest_total_at_any_width(case: Case) -> None:
    case = dataclasses.replace(case, scope="per_layer")
    assert abs(case.plan().kept - case.target) == distance_to_nearest(case)


@given(cases(width=st.integers(1, 8).map(lambda number: 6 * number), round_to=(1, 2, 3, 6)))
@settings(deadline=None, max_examples=25)
def test_per_layer_keeps_the_same_share_to_within_one_step(case: Case) -> None:
    quotas = [width * case.keep_ratio for width in case.widths]
    # Where a floor, rounded up, lies above a site's own share, other sites make up for it.
    for quota, floor in zip(quotas, case.floors, strict=True):
        assume(math.ceil(floor / case.round_to) * case.round_to <= quota)
    plan = dataclasses.replace(case, scope="per_layer").plan()
    for entry, quota in zip(plan.sites, quotas, strict=True):
        assert abs(len(entry.keep) - quota) < case.round_to


@given(cases())
@settings(deadline=None, max_examples=25)
def test_per_layer_counts_depend_on_no_score(case: Case) -> None:
    case = dataclasses.replace(case, scope="per_layer")
    equal = flat(case.widths, case.keep_percent, case.floor_percent, case.scope, case.round_to)
    assert case.plan().widths == equal.plan().widths


@given(cases(round_to=(1, 2, 3, 8)))
@settings(deadline=None, max_examples=50)
def test_equal_widths_round_each_site_by_itself(case: Case) -> None:
    plan = dataclasses.replace(case, scope="equal").plan()
    for entry, width, reachable in zip(plan.sites, case.widths, case.reachable, strict=True):
        quota = Fraction(width * case.keep_percent, 100)
        nearest = min(abs(count - quota) for count in reachable)
        # 0.15 * 10 may be a little more or less than 1.5: of two counts as near, either is right here.
        assert abs(len(entry.keep) - quota) == nearest
    kept = dict(zip(case.widths, (len(entry.keep) for entry in plan.sites), strict=True))
    assert [len(entry.keep) for entry in plan.sites] == [kept[width] for width in case.widths]
    assert plan.requested == case.target
    best = [sorted(case.scores[entry.site.name].tolist())[-len(entry.keep) :] for entry in plan.sites]
    for entry, expected in zip(plan.sites, best, strict=True):
        assert sorted(case.scores[entry.site.name][list(entry.keep)].tolist()) == expected


@given(cases(round_to=(1, 2, 3, 8)))
@settings(deadline=None, max_examples=25)
def test_keeping_everything_keeps_everything(case: Case) -> None:
    plan = dataclasses.replace(case, keep_percent=100).plan()
    assert all(entry.keep == tuple(range(entry.site.hidden)) for entry in plan.sites)


@given(cases(round_to=(1, 3)))
@settings(deadline=None, max_examples=25)
def test_the_same_input_gives_the_same_plan_and_stays_as_it_was(case: Case) -> None:
    sites, scores = list(case.sites), case.scores
    before = {name: score.clone() for name, score in scores.items()}
    arguments: dict[str, Any] = {
        "keep_ratio": case.keep_ratio,
        "scope": case.scope,
        "round_to": case.round_to,
        "min_keep_ratio": case.floor_percent / 100,
    }
    first = make_plan(sites, scores, **arguments)
    # The order in which the scores lie in their mapping is no part of the input.
    assert make_plan(sites, dict(reversed(scores.items())), **arguments) == first == case.plan()
    assert sites == list(case.sites)
    assert list(scores) == list(before)
    assert all(torch.equal(scores[name], before[name]) for name in before)


def test_ties_go_by_site_then_by_index() -> None:
    sites = sites_of([3, 3])
    scores = {site.name: torch.zeros(3) for site in sites}
    plan = make_plan(sites, scores, keep_ratio=2 / 3, min_keep_ratio=0)
    assert [entry.removed for entry in plan.sites] == [(0, 1), ()]
    # Four channels to remove, but the first site must keep one.
    plan = make_plan(sites, scores, keep_ratio=1 / 3, min_keep_ratio=0)
    assert [entry.removed for entry in plan.sites] == [(0, 1), (0, 1)]
    # An odd channel of a per-layer plan goes to the first of equal sites.
    plan = make_plan(sites, scores, keep_ratio=0.5, scope="per_layer")
    assert [entry.keep for entry in plan.sites] == [(1, 2), (2,)]


def test_scores_of_any_precision_and_with_gradients_are_read() -> None:
    (site,) = sites_of([4])
    values = [3.0, 1.0, 2.0, 0.0]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        score = torch.tensor(values, dtype=dtype, requires_grad=True)
        assert make_plan([site], {site.name: score}, keep_ratio=0.5).sites[0].keep == (0, 2)


GOOD: dict[str, Any] = {"keep_ratio": 0.5, "scope": "global", "round_to": 1, "min_keep_ratio": 0.02}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"keep_ratio": 1.3}, r"keep_ratio must be in \(0, 1\], got 1.3"),
        ({"keep_ratio": -0.1}, r"keep_ratio must be in \(0, 1\], got -0.1"),
        ({"keep_ratio": math.nan}, r"keep_ratio must be in \(0, 1\], got nan"),
        ({"min_keep_ratio": -0.1}, r"min_keep_ratio must be in \[0, 1\], got -0.1"),
        ({"min_keep_ratio": 1.1}, r"min_keep_ratio must be in \[0, 1\], got 1.1"),
        ({"min_keep_ratio": math.nan}, r"min_keep_ratio must be in \[0, 1\], got nan"),
        ({"min_keep_ratio": 0.6}, "min_keep_ratio must not exceed keep_ratio, got 0.6 > 0.5"),
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"round_to": -8}, "round_to must be at least 1, got -8"),
        ({"scope": "local"}, "scope .*local"),
    ],
)
def test_a_number_out_of_range_is_named(changed: dict[str, Any], message: str) -> None:
    sites = sites_of([4])
    with pytest.raises(InputError, match=message):
        make_plan(sites, {sites[0].name: torch.arange(4.0)}, **GOOD | changed)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (None, "scores must hold every site, got none for z.fc1"),
        (torch.zeros(3), r"scores of z.fc1 must be 4 finite numbers, got shape \(3,\)"),
        (torch.zeros(1, 4), r"scores of z.fc1 must be 4 finite numbers, got shape \(1, 4\)"),
        (torch.tensor([0.0, math.nan, 1.0, 2.0]), r"got shape \(4,\), 1 not finite"),
        (torch.tensor([0.0, math.inf, -math.inf, 2.0]), r"got shape \(4,\), 2 not finite"),
    ],
)
def test_scores_that_do_not_fit_are_named(score: Tensor | None, message: str) -> None:
    sites = sites_of([4])
    with pytest.raises(InputError, match=message):
        make_plan(sites, {} if score is None else {sites[0].name: score}, **GOOD)


@given(cases(round_to=(1, 3)))
@settings(deadline=None, max_examples=25)
def test_json_gives_the_same_plan_back(case: Case) -> None:
    plan = case.plan()
    text = json.dumps(plan.to_dict())
    assert PruningPlan.from_dict(json.loads(text)) == plan
    assert json.dumps(PruningPlan.from_dict(json.loads(text)).to_dict()) == text


def small_plan() -> PruningPlan:
    """Return a plan of two sites, one of them with two producers."""
    sites = (SitePlan(Site(("up", "gate"), "down", 4), (1, 3)), SitePlan(Site(("fc1",), "fc2", 3), (0, 1, 2)))
    return PruningPlan(sites, 0.7, "per_layer", 2, 0.1)


def test_a_saved_plan_loads_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    small_plan().save(path)
    assert PruningPlan.load(path) == small_plan()
    assert json.loads(path.read_text())["sites"][0]["keep"] == [1, 3]


def test_a_plan_knows_its_figures() -> None:
    plan = small_plan()
    assert (plan.total, plan.kept, plan.requested) == (7, 5, 5)
    assert plan.widths == {"up": (2, 4), "fc1": (3, 3)}
    assert [entry.removed for entry in plan.sites] == [(0, 2), ()]


def _set(*path: Any, to: Any) -> Callable[[Any], Any]:
    """Return a change of one value deep inside the data of a plan."""

    def change(data: Any) -> Any:
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        return data

    return change


DAMAGE: dict[str, Callable[[Any], Any]] = {
    "empty object": lambda data: {},
    "other format": _set("format", to="vbp-plan/0"),
    **{
        f"without {key}": lambda data, key=key: {name: value for name, value in data.items() if name != key}
        for key in ("sites", "keep_ratio", "scope", "round_to", "min_keep_ratio")
    },
    "sites null": _set("sites", to=None),
    "site null": _set("sites", 0, to=None),
    "site without consumer": _set("sites", 0, "site", to={"producers": ["up"], "hidden": 4}),
    "hidden null": _set("sites", 0, "site", "hidden", to=None),
    "hidden text": _set("sites", 0, "site", "hidden", to="4"),
    "keep empty": _set("sites", 0, "keep", to=[]),
    "keep unsorted": _set("sites", 0, "keep", to=[3, 1]),
    "keep twice": _set("sites", 0, "keep", to=[1, 1]),
    "keep below 0": _set("sites", 0, "keep", to=[-1, 3]),
    "keep too high": _set("sites", 0, "keep", to=[1, 4]),
    "keep text": _set("sites", 0, "keep", to=["1", "3"]),
    "keep nested": _set("sites", 0, "keep", to=[[1], [3]]),
    # What follows reads without a type error, and would only surface in the middle of the surgery.
    "keep fractions": _set("sites", 0, "keep", to=[0.5, 1.5]),
    "producers text": _set("sites", 0, "site", "producers", to="up"),
    "producers empty": _set("sites", 0, "site", "producers", to=[]),
    "consumer null": _set("sites", 0, "site", "consumer", to=None),
    "keep_ratio text": _set("keep_ratio", to="0.7"),
    "scope unknown": _set("scope", to="local"),
    # Kin to reports of files whose numbers take all memory: an array for each head, a list of all removed channels.
    "heads without end": lambda data: _set("sites", 0, "site", "heads", to=2 * 10**9)(
        _set("sites", 0, "site", "hidden", to=2 * 10**9)(data)
    ),
    "hidden without end": _set("sites", 0, "site", "hidden", to=2 * 10**9),
    "a head without channels": lambda data: _set("sites", 0, "site", "heads", to=2)(
        _set("sites", 0, "keep", to=[0, 1])(data)
    ),
    "offset below 0": _set("sites", 0, "site", "offsets", to=[-1]),
    "offset without end": _set("sites", 0, "site", "offsets", to=[2 * 10**9]),
    "site twice": lambda data: data | {"sites": [data["sites"][0], data["sites"][0]]},
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_plan_is_refused(damage: str, tmp_path: Path) -> None:
    data = DAMAGE[damage](small_plan().to_dict())
    with pytest.raises(InputError, match=r"plan .*; make .* again"):
        PruningPlan.from_dict(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"plan\.json is no readable plan"):
        PruningPlan.load(path)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"plan"'])
def test_json_that_is_no_object_is_no_plan(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"plan\.json is no readable plan"):
        PruningPlan.load(path)


@pytest.mark.parametrize("content", [None, b"", b'{"format": "vbp-plan/1", "si', b"\xff\xfe\x00", b"not json"])
def test_a_file_that_is_no_plan_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json is no readable plan .*make the plan again"):
        PruningPlan.load(path)
