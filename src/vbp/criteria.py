"""What a criterion's name stands for: what it must know, and the score of every channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.baselines import lamp_scores, magnitude_scores, random_scores, snip_scores, taylor_scores
from vbp.elimination import strictly_rising
from vbp.errors import InputError
from vbp.ranking import eliminations, output_variance_scores, variance_scores
from vbp.refit import RIDGE
from vbp.sites import Site
from vbp.statistics import Statistics

Criterion = Literal[
    "auto", "variance", "output_variance", "elimination", "random", "l1", "l2", "lamp", "taylor", "snip"
]  # fmt: skip
# What has to be collected from calibration images: moments, also covariance or sensitivity, gradients with labels.
Need = Literal["statistics", "covariance", "sensitivity", "gradients"]
Scores = dict[str, Float[Tensor, "hidden"]]


@dataclass(frozen=True)
class Evidence:
    """What is known of a dense model.

    Attributes:
        statistics: With covariances and sensitivities where a criterion or the refit needs them.
        gradients: From `collect_gradients`.
        seed: Of the random criterion.
        ridge: As in the refit that will follow.
    """

    statistics: Statistics | None = None
    gradients: Mapping[str, Tensor] | None = None
    seed: int = 0
    ridge: float = RIDGE


def needs_of(criteria: Iterable[str]) -> frozenset[Need]:
    """Give what must be collected for some criteria.

    Raises:
        InputError: A name is unknown.
    """
    return frozenset(need for name in criteria for need in _rule(name).needs)


def criterion_scores(criterion: str, model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    """Score the channels of every site; larger stays.

    `variance`, `output_variance`: their functions in `vbp.ranking`; global as they are.
    `elimination`: inside a site the order in which channels go if the rest is refitted after each; across sites
    the counts of `output_variance`.
    `random`, `l1`, `l2`, `lamp`, `taylor`, `snip`: their functions in `vbp.baselines`, which say what is ranked
    globally. They judge query/key channels by their weights, too; those above take the rule of `variance_scores`.
    `auto` has no scores: it makes plans, `vbp.auto.auto_plan`.

    Args:
        criterion: A name of `Criterion`.
        model: The dense model.
        sites: From `find_sites`.
        evidence: Must hold what `needs_of` says.

    Returns:
        Site name -> score of each channel, on the CPU.

    Raises:
        InputError: The name is unknown or that of no score, or something that it needs is missing.
    """
    rule = _rule(criterion)
    if rule.scores is None:
        raise InputError(
            f"criterion {criterion} makes plans, not scores, got a request for scores; call vbp.auto.auto_plan, or "
            "choose another criterion"
        )
    held: dict[Need, object] = {
        "statistics": evidence.statistics,
        "covariance": evidence.statistics is not None and evidence.statistics.covariances,
        "sensitivity": evidence.statistics is not None and evidence.statistics.sensitivities,
        "gradients": evidence.gradients,
    }
    if missing := sorted(need for need in rule.needs if not held[need]):
        raise InputError(
            f"criterion {criterion} needs {' and '.join(missing)}, got none; collect statistics "
            "(covariance=True where it needs the covariance) or gradients"
        )
    return {name: score.cpu() for name, score in rule.scores(model, sites, evidence).items()}


@dataclass(frozen=True)
class _Rule:
    """A criterion: what it needs, and how it scores; None if it makes plans without."""

    needs: frozenset[Need]
    scores: Callable[[nn.Module, Sequence[Site], Evidence], Scores] | None


def _rule(name: str) -> _Rule:
    if name not in _RULES:
        raise InputError(f"criterion must be one of {', '.join(_RULES)}, got {name!r}")
    return _RULES[name]


def _variance(model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    return variance_scores(_statistics(evidence))


def _output_variance(model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    return output_variance_scores(model, sites, _statistics(evidence))


def _elimination(model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    """Deal the scores of the output's variance out again within each site, in the order of elimination."""
    statistics = _statistics(evidence)
    scores = output_variance_scores(model, sites, statistics)
    for name, found in eliminations(model, sites, statistics, ridge=evidence.ridge).items():
        dealt = torch.empty_like(scores[name], dtype=torch.float64)
        dealt[found.order] = strictly_rising(scores[name].double().sort().values)
        scores[name] = dealt
    return scores


def _random(model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    return random_scores(sites, seed=evidence.seed)


def _l1(model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    return magnitude_scores(model, sites, power=1)


def _l2(model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    return magnitude_scores(model, sites, power=2)


def _lamp(model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    return lamp_scores(model, sites)


def _taylor(model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    return taylor_scores(model, sites, _gradients(evidence))


def _snip(model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    return snip_scores(model, sites, _gradients(evidence))


def _statistics(evidence: Evidence) -> Statistics:
    assert evidence.statistics is not None
    return evidence.statistics


def _gradients(evidence: Evidence) -> Mapping[str, Tensor]:
    assert evidence.gradients is not None
    return evidence.gradients


_RULES: Final[Mapping[str, _Rule]] = {
    "auto": _Rule(frozenset({"statistics", "covariance", "sensitivity"}), None),
    "variance": _Rule(frozenset({"statistics"}), _variance),
    "output_variance": _Rule(frozenset({"statistics"}), _output_variance),
    "elimination": _Rule(frozenset({"statistics", "covariance"}), _elimination),
    "random": _Rule(frozenset(), _random),
    "l1": _Rule(frozenset(), _l1),
    "l2": _Rule(frozenset(), _l2),
    "lamp": _Rule(frozenset(), _lamp),
    "taylor": _Rule(frozenset({"gradients"}), _taylor),
    "snip": _Rule(frozenset({"gradients"}), _snip),
}
