"""A plan that was chosen, and what surgery takes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from vbp.errors import InputError
from vbp.method.covariance import ChannelCovariance
from vbp.pruning.plan import PruningPlan
from vbp.runtime.choices import Compensation
from vbp.runtime.tables import text_table


@dataclass(frozen=True)
class Candidate:
    """Hold a plan that was tried: mean KL(dense || pruned) on the held-out images, in nats; channels kept by site."""

    name: str
    divergence: float
    widths: Mapping[str, int]


@dataclass(frozen=True)
class PlanChoice:
    """Hold a plan, and what surgery takes with it.

    Attributes:
        plan: What stays.
        means: For the mean shift and the refit; None without compensation.
        covariances: For the refit: its metric; None without.
        tried: The candidates of the criterion auto, in the order in which they were tried.
        plan_for: Keep ratio -> plan, by the same scores and scope: other sizes without a search, for a budget that is
            not counted in channels.

    Example:
        >>> vbp.auto_plan(model, sites, statistics, reference, keep_ratio=0.5).plan.kept
        128
    """

    plan: PruningPlan
    means: Mapping[str, Tensor] | None
    covariances: Mapping[str, ChannelCovariance] | None
    tried: tuple[Candidate, ...] = ()
    plan_for: Callable[[float], PruningPlan] | None = None

    def compensated_by(self, compensation: Compensation) -> PlanChoice:
        """Return the choice with what a compensation takes, and nothing else.

        Raises:
            InputError: What it takes is not there.
        """
        if compensation != "none" and self.means is None:
            raise InputError(f"compensation {compensation} needs statistics, got none; collect them")
        if compensation == "refit" and self.covariances is None:
            raise InputError(
                "compensation refit needs covariances, got none; collect statistics with covariance=True"
            )
        return replace(
            self,
            means=None if compensation == "none" else self.means,
            covariances=self.covariances if compensation == "refit" else None,
        )

    def table(self) -> str:
        """Return the candidates as lines of text."""
        rows = [(one.name, f"{one.divergence:.4f}") for one in self.tried]
        return text_table([("candidate", "KL on held-out images"), *rows])
