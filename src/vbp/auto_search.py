"""The search of `auto` on a job: what does not depend on the size is done once for all sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from vbp.auto import AutoPlan, auto_plan, sensitivity_eliminations
from vbp.divergence import HeldBack
from vbp.elimination import Elimination
from vbp.evidence import held_back
from vbp.fingerprints import json_fingerprint
from vbp.job import Job
from vbp.measuring import counted
from vbp.refit import RIDGE
from vbp.statistics import Statistics


class AutoSearch:
    """Searches plans of several sizes for the job's model as it is; floor and rounding are those of the job.

    All processes make it and call it alike.
    """

    def __init__(self, job: Job, statistics: Statistics, *, ridge: float = RIDGE) -> None:
        """Take what is known; the work begins with the first plan.

        Args:
            job: Whose dense model is pruned, on copies.
            statistics: Of all processes, with covariances and sensitivities.
            ridge: Of the refit that will follow.
        """
        self._job, self._statistics, self._ridge = job, statistics, ridge

    @cached_property
    def _orders(self) -> Mapping[str, Elimination]:
        return sensitivity_eliminations(self._job.model, self._job.sites, self._statistics, ridge=self._ridge)

    @cached_property
    def _held_back(self) -> HeldBack:
        return held_back(self._job, self._job.model)

    def plan(self, keep_ratio: float) -> AutoPlan:
        """Search the plan that keeps this share.

        Raises:
            InputError: Statistics are missing or unfit, or the processes do not find the same.
        """
        job = self._job
        with job.timed("search"), counted(job, f"auto, keep {keep_ratio:g}", "plan") as tell:
            found = auto_plan(
                job.model,
                job.sites,
                self._statistics,
                self._held_back,
                keep_ratio=keep_ratio,
                equal_widths=job.config.equal_widths,
                ridge=self._ridge,
                orders=self._orders,
                progress=tell,
                **job.rules,
            )
        job.processes.check_same("plan", json_fingerprint(found.plan.to_dict()))
        return found
