"""Times by width: what a plan would take is the dense time less what each unit saves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vbp import PruningPlan, Site, SitePlan
from vbp.cost.widths import LayerTimes, TimedUnit, TimingConditions

CONDITIONS = TimingConditions("a machine", 1, "float32", (8, 3, 32, 32), "2.15", "abc", 8, "wall")
TIMES = LayerTimes(
    CONDITIONS,
    100.0,
    (TimedUnit(("a",), "a"), TimedUnit(("b",), "a"), TimedUnit(("p", "q"), "p")),
    {"a": ((10, 6.0), (20, 10.0), (40, 30.0)), "p": ((4, 5.0), (8, 9.0))},
)


def plan(a: int, b: int, p: int) -> PruningPlan:
    return PruningPlan(
        (
            SitePlan(Site(("a",), "x", 40), tuple(range(a))),
            SitePlan(Site(("b",), "x", 40), tuple(range(b))),
            SitePlan(Site(("v",), "p", 8, "value"), tuple(range(p))),
            SitePlan(Site(("q",), "", 8, "query_key"), tuple(range(p))),
        ),
        0.5,
        "global",
    )


@pytest.mark.parametrize(
    ("widths", "ms"),
    [
        ((40, 40, 8), 100.0),
        ((20, 40, 8), 80.0),
        ((20, 30, 4), 66.0),  # 20 + 10 between two widths + 4
        ((5, 40, 8), 74.0),  # below the narrowest, on the line of the last two: 4 of 30
        ((1, 40, 1), 100 - 27.6 - 7.0),
    ],
)
def test_each_unit_saves_what_its_curve_says(widths: tuple[int, int, int], ms: float) -> None:
    assert TIMES.predicted_ms(plan(*widths)) == pytest.approx(ms)
    assert TIMES.share(plan(*widths)) == pytest.approx(ms / 100)


def test_no_unit_takes_less_than_no_time() -> None:
    steep = replace(TIMES, curves={**TIMES.curves, "a": ((20, 1.0), (40, 30.0))})
    assert steep.predicted_ms(plan(1, 40, 8)) == 70


def test_what_a_channel_saves_is_the_mean_over_its_curve() -> None:
    saved = TIMES.saved_by_channel()
    assert saved == pytest.approx({"a": 0.8, "b": 0.8, "p": 0.5, "q": 0.5})
