"""What a criterion's name stands for: what it must know, and the score of every channel.

The lower a score, the sooner the channel goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.elimination import Elimination, eliminate, strictly_rising
from vbp.method.ridge import RIDGE, as_matrix
from vbp.method.scores import mean_normalised
from vbp.pruning.baselines import lamp_scores, magnitude_scores, random_scores, snip_scores, taylor_scores
from vbp.pruning.readers import columns, joint_matrix, metric_of, ridge_of
from vbp.sites.site import READ, Site
from vbp.statistics.evidence import Evidence, Need
from vbp.statistics.statistics import KEY, QUERY, Statistics


def variance_scores(statistics: Statistics, *, norm_per_layer: bool = False) -> dict[str, Float[Tensor, "hidden"]]:
    """Score each hidden channel by the variance of its activation, where the consumer reads it.

    A query/key channel adds `q[j] * k[j]` to a logit; it is scored by the product of their mean squares.

    Args:
        statistics: From `collect_statistics`.
        norm_per_layer: Divide the scores of a site by their mean, so that sites of different scale compare.

    Returns:
        Site name -> score of each channel.

    Source: VBP paper, section 3.2.

    Example:
        >>> scores = vbp.variance_scores(statistics)  # site name -> score of each channel
    """
    moments = statistics.moments
    scores = {}
    for name, observed in moments.items():
        if name.endswith(QUERY):
            name = name.removesuffix(QUERY)
            scores[name] = observed.second_moment * moments[name + KEY].second_moment
        elif not name.endswith(KEY) and READ not in name:
            scores[name] = observed.variance
    if norm_per_layer:
        scores = {name: mean_normalised(score) for name, score in scores.items()}
    return scores


def output_variance_scores(
    model: nn.Module, sites: Sequence[Site], statistics: Statistics
) -> dict[str, Float[Tensor, "hidden"]]:
    """Score each channel by the variance that it adds to the consumer's output if taken alone: `var[j] |W[:, j]|^2`.

    Where several layers read it, to the outputs of all of them. A kernel counts at each of its offsets. Query/key
    channels, which no layer reads, are scored as `variance_scores` does.

    Args:
        model: The dense model.
        sites: From `find_sites`.
        statistics: Of this model.

    Example:
        >>> scores = vbp.output_variance_scores(model, sites, statistics)
    """
    scores = variance_scores(statistics)
    for site in sites:
        parts = [
            statistics.moments[reader.key].variance
            * as_matrix(columns(model, reader, site.hidden)).square().sum(0).to(scores[site.name].device)
            for reader in site.readers
        ]
        if parts:
            scores[site.name] = torch.stack(parts).sum(0)
    return scores


def eliminations(
    model: nn.Module, sites: Sequence[Site], statistics: Statistics, *, ridge: float = RIDGE
) -> dict[str, Elimination]:
    """Order the channels of each site as `eliminate` does, on the model's device; query/key sites are left out.

    Raises:
        InputError: A covariance is missing or unfit.
    """
    orders = {}
    for site in sites:
        if not site.consumer:
            continue
        if site.name not in statistics.covariances:
            raise InputError(
                f"elimination needs the covariance of site {site.name}, got none; collect statistics with "
                "covariance=True"
            )
        weight = joint_matrix(model, site, statistics)
        measured = statistics.covariances[site.name].to(weight.device)
        covariance = metric_of(model, site.readers[0], measured.covariance)
        try:
            orders[site.name] = eliminate(
                covariance, weight, ridge=ridge_of(model, site.readers[0], measured, ridge), heads=site.heads
            ).to("cpu")
        except InputError as error:
            raise InputError(f"site {site.name}: {error}") from error
    return orders


Scores = dict[str, Float[Tensor, "hidden"]]


def needs_of(criteria: Iterable[str]) -> frozenset[Need]:
    """Return what must be collected for some criteria.

    Raises:
        InputError: A name is unknown.
    """
    return frozenset(need for name in criteria for need in _rule(name).needs)


def criterion_scores(criterion: str, model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    """Score the channels of every site; larger stays.

    `variance`, `output_variance`: the functions above; global as they are.
    `elimination`: inside a site the order in which channels go if the rest is refitted after each; across sites
    the counts of `output_variance`.
    `random`, `l1`, `l2`, `lamp`, `taylor`, `snip`: their functions in `vbp.pruning.baselines`, which tell what is
    ranked globally. They score query/key channels by their weights, too; those above take the rule of
    `variance_scores`.
    `auto` has no scores: it makes plans, `vbp.auto_plan`.

    Args:
        criterion: A name of `Criterion`.
        model: The dense model.
        sites: From `find_sites`.
        evidence: Must hold what `needs_of` says.

    Returns:
        Site name -> score of each channel, on the CPU.

    Raises:
        InputError: The name is unknown or that of no score, or something that it needs is missing.

    Example:
        >>> scores = vbp.criterion_scores("elimination", model, sites, evidence)
    """
    rule = _rule(criterion)
    if rule.scores is None:
        raise InputError(
            f"criterion {criterion} makes plans, not scores, got a request for scores; call vbp.auto_plan, or "
            "choose another criterion"
        )
    available: dict[Need, object] = {
        "statistics": evidence.statistics,
        "covariance": evidence.statistics is not None and evidence.statistics.covariances,
        "sensitivity": evidence.statistics is not None and evidence.statistics.sensitivities,
        "gradients": evidence.gradients,
    }
    if missing := sorted(need for need in rule.needs if not available[need]):
        raise InputError(
            f"criterion {criterion} needs {' and '.join(missing)}, got none; collect statistics "
            "(covariance=True where it needs the covariance) or gradients"
        )
    return {name: score.cpu() for name, score in rule.scores(model, sites, evidence).items()}


@dataclass(frozen=True)
class _Rule:
    """Hold what a criterion needs, and how it scores; None if it makes plans without."""

    needs: frozenset[Need]
    scores: Callable[[nn.Module, Sequence[Site], Evidence], Scores] | None


def _rule(name: str) -> _Rule:
    if name not in _RULES:
        raise InputError(f"criterion must be one of {', '.join(_RULES)}, got {name!r}")
    return _RULES[name]


def _elimination(model: nn.Module, sites: Sequence[Site], evidence: Evidence) -> Scores:
    """Return the scores of the output's variance, permuted within each site to the order of elimination."""
    statistics = _statistics(evidence)
    scores = output_variance_scores(model, sites, statistics)
    for name, elimination in eliminations(model, sites, statistics, ridge=evidence.ridge).items():
        permuted = torch.empty_like(scores[name], dtype=torch.float64)
        permuted[elimination.order] = strictly_rising(scores[name].double().sort().values)
        scores[name] = permuted
    return scores


def _statistics(evidence: Evidence) -> Statistics:
    assert evidence.statistics is not None
    return evidence.statistics


def _gradients(evidence: Evidence) -> Mapping[str, Tensor]:
    assert evidence.gradients is not None
    return evidence.gradients


_RULES: Final[Mapping[str, _Rule]] = {
    "auto": _Rule(frozenset({"statistics", "covariance", "sensitivity"}), None),
    "variance": _Rule(frozenset({"statistics"}), lambda model, sites, seen: variance_scores(_statistics(seen))),
    "output_variance": _Rule(
        frozenset({"statistics"}), lambda model, sites, seen: output_variance_scores(model, sites, _statistics(seen))
    ),
    "elimination": _Rule(frozenset({"statistics", "covariance"}), _elimination),
    "random": _Rule(frozenset(), lambda model, sites, seen: random_scores(sites, seed=seen.seed)),
    "l1": _Rule(frozenset(), lambda model, sites, seen: magnitude_scores(model, sites, power=1)),
    "l2": _Rule(frozenset(), lambda model, sites, seen: magnitude_scores(model, sites, power=2)),
    "lamp": _Rule(frozenset(), lambda model, sites, seen: lamp_scores(model, sites)),
    "taylor": _Rule(
        frozenset({"gradients"}), lambda model, sites, seen: taylor_scores(model, sites, _gradients(seen))
    ),
    "snip": _Rule(frozenset({"gradients"}), lambda model, sites, seen: snip_scores(model, sites, _gradients(seen))),
}
