"""The job of `vbp sweep`: many prunings of one dense model, ratios x criteria x compensations, in one table."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from vbp.deploy.artifact import installed_versions
from vbp.errors import InputError
from vbp.method.covariance import ChannelCovariance
from vbp.pruning.auto import AutoSearch
from vbp.pruning.convergence import merge_across
from vbp.pruning.criteria import criterion_scores
from vbp.pruning.make_plan import check_ratios, make_plan
from vbp.pruning.plan import PruningPlan
from vbp.pruning.surgery import prune_
from vbp.recipes.measure import latencies, measure
from vbp.recipes.setup import Job, prepare
from vbp.recipes.sweep_config import SweepConfig, check_sweep, sweep_needs
from vbp.recipes.sweep_state import JSON, Begun, check_may_go_on, deciding_settings, read_begun, write_state
from vbp.refit.refits import AfterSurgery, check_refits
from vbp.report.published import PublishedPoint
from vbp.report.run_report import Measured
from vbp.report.style import render
from vbp.report.sweep_figure import draw_sweep
from vbp.report.sweep_report import Compensation, Setting, SweepReport, SweepRow
from vbp.runtime.files import check_folder, clear_folder, write_bytes
from vbp.runtime.log_file import RunLog, run_log
from vbp.runtime.processes import process_group
from vbp.sites.site import Site
from vbp.statistics.evidence import FROM_STATISTICS, Evidence, EvidenceReader, Need, check_given, evidence_bytes
from vbp.statistics.statistics import Statistics

_log = logging.getLogger(__name__)


class Planned(Protocol):
    """A plan, and what surgery takes with it."""

    @property
    def plan(self) -> PruningPlan:
        """What stays."""

    @property
    def means(self) -> Mapping[str, Tensor] | None:
        """For the mean shift and the refit."""

    @property
    def covariances(self) -> Mapping[str, ChannelCovariance] | None:
        """For the refit."""


@dataclass(frozen=True)
class _FromScores:
    plan: PruningPlan
    means: Mapping[str, Tensor] | None
    covariances: Mapping[str, ChannelCovariance] | None


def sweep(
    model: nn.Module,
    sites: Sequence[Site],
    evidence: Evidence,
    settings: Sequence[Setting],
    measure: Callable[[nn.Module], Measured],
    *,
    latency: Callable[[nn.Module], tuple[float, float]] | None = None,
    round_to: int = 1,
    min_keep_ratio: float = 0.02,
    dense: Measured | None = None,
    known: Collection[SweepRow] = (),
    planners: Mapping[str, Callable[[Setting], Planned]] | None = None,
    after_refit: Callable[[nn.Module], object] | None = None,
    on_row: Callable[[SweepReport], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> SweepReport:
    """Prune a copy of the dense model by each setting in turn, and measure it.

    One copy exists at a time, beside those of a planner, and scores are computed once for a criterion.

    Args:
        model: The dense model; left as it was.
        sites: From `find_sites`.
        evidence: Must hold what `sweep_needs` says of the settings that are not known.
        settings: From `settings_of`.
        measure: Gives accuracy and size of a model.
        latency: Gives the milliseconds of the dense model and of a pruned one, measured in turns.
        round_to: As for `make_plan`.
        min_keep_ratio: As for `make_plan`.
        dense: The dense model's figures, where they are known.
        known: Rows of an earlier sweep with the same evidence and numbers, which are not measured again.
        planners: Criterion -> what makes its plans, for criteria that decide more than scores can say: `auto`.
        after_refit: What else is done to a pruned model whose compensation is the refit, in place.
        on_row: Called with all that is known after the dense model and after each row.
        about: For the report.

    Returns:
        The dense model, and a row for each setting and for whatever else was known.

    Raises:
        InputError: The evidence lacks something, or a number is out of range.
    """
    for setting in settings:
        check_ratios(setting.keep_ratio, min_keep_ratio, round_to)
    if dense is None:
        dense = measure(model)
    rows = {row.setting: row for row in known}
    asked = dict.fromkeys([*settings, *rows])

    def report() -> SweepReport:
        assert dense is not None
        return SweepReport(dense, tuple(rows[setting] for setting in asked if setting in rows), about or {})

    missing = [setting for setting in settings if setting not in rows]
    planner = _Planner(model, sites, evidence, round_to, min_keep_ratio, planners or {})
    for number, setting in enumerate(missing):
        if on_row is not None and number == 0:
            on_row(report())
        planned = planner.plan(setting)
        plan = planned.plan
        pruned = _pruned(model, planned, setting.compensation, evidence.ridge)
        if after_refit is not None and setting.compensation == "refit":
            after_refit(pruned)
        times = (None, None) if latency is None else latency(pruned)
        measured = measure(pruned)
        rows[setting] = SweepRow(setting, plan.kept, plan.total, replace(measured, latency_ms=times[1]), times[0])
        _log.info(
            "%d of %d: %s, kept %.3f: top-1 %.2f %%", number + 1, len(missing), setting.method,
            plan.kept / plan.total if plan.total else 1.0, measured.top1,
        )  # fmt: skip
        del pruned
        if on_row is not None:
            on_row(report())
    return report()


class _Planner:
    """Makes the plans; the scores of a criterion once."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        evidence: Evidence,
        round_to: int,
        min_keep_ratio: float,
        planners: Mapping[str, Callable[[Setting], Planned]],
    ) -> None:
        self._model, self._sites, self._evidence, self._planners = model, sites, evidence, planners
        self._round_to, self._min_keep_ratio = round_to, min_keep_ratio
        self._scores: dict[str, dict[str, Tensor]] = {}

    def plan(self, setting: Setting) -> Planned:
        criterion, statistics = setting.criterion, self._evidence.statistics
        if criterion in self._planners:
            return self._planners[criterion](setting)
        if criterion not in self._scores:
            self._scores[criterion] = criterion_scores(criterion, self._model, self._sites, self._evidence)
        plan = make_plan(
            self._sites, self._scores[criterion], keep_ratio=setting.keep_ratio, scope=setting.scope,
            round_to=self._round_to, min_keep_ratio=self._min_keep_ratio,
        )  # fmt: skip
        if statistics is None:
            return _FromScores(plan, None, None)
        return _FromScores(plan, statistics.means, statistics.covariances)


def _pruned(model: nn.Module, planned: Planned, compensation: Compensation, ridge: float) -> nn.Module:
    if compensation != "none" and planned.means is None:
        raise InputError(f"compensation {compensation} needs statistics, got none; collect them")
    if compensation == "refit" and planned.covariances is None:
        raise InputError("compensation refit needs covariances, got none; collect statistics with covariance=True")
    pruned = copy.deepcopy(model)
    prune_(
        pruned,
        planned.plan,
        None if compensation == "none" else planned.means,
        planned.covariances if compensation == "refit" else None,
        ridge=ridge,
    )
    return pruned


LOG, CSV, SVG, PNG = "vbp_sweep.log", "sweep.csv", "sweep.svg", "sweep.png"


STATISTICS: Final = "statistics.safetensors"


def run_sweep(config: SweepConfig, references: Sequence[PublishedPoint] = ()) -> SweepReport:
    """Prune a model in many ways, and leave table, figure, statistics and log in `config.save_dir`.

    A sweep that was stopped goes on where it was, and one that is asked for more measures only that. Under torchrun
    each process calls it; all do their share, one writes, and all return the same report.

    Args:
        config: What to do.
        references: Published points of this model, for the figure.

    Raises:
        InputError: Something in the configuration or behind its paths is wrong, or `save_dir` holds something else.
        OutputError: A file could not be written; those before it are whole.
        PeerError: Another process of the job failed.
    """
    check_sweep(config)
    with run_log() as log, process_group(config.device, config.timeout_minutes) as (processes, device):
        begun = processes.gather(read_begun(config) if processes.main else None)[0]
        job = prepare(config.run_config(), processes, device)
        settings = deciding_settings(config, job)
        check_may_go_on(begun, settings, config.save_dir)
        check_given(job, sweep_needs(config.settings))
        check_refits(job)
        _open(config, job, log, settings, fresh=begun is None)
        report = _sweep(config, job, begun, settings)
        if processes.main:
            _write(config.save_dir, report, settings, references)
        _log.info("results in %s\n%s", config.save_dir, report.table())
    return report


def _sweep(config: SweepConfig, job: Job, begun: Begun | None, settings: Mapping[str, Any]) -> SweepReport:
    known = () if begun is None else begun.rows
    done = {row.setting for row in known}
    missing = [setting for setting in config.settings if setting not in done]
    if known:
        _log.info("%d of %d models were measured before", len(config.settings) - len(missing), len(config.settings))

    def keep(report: SweepReport) -> None:
        if job.processes.main:
            write_state(config.save_dir, settings, report.to_dict())

    def timed(pruned: torch.nn.Module) -> tuple[float, float]:
        found, _ = latencies(job, {"dense": job.model, "pruned": pruned})
        return found["dense"], found["pruned"]

    evidence = _evidence(config, job, sweep_needs(missing))
    return sweep(
        job.model,
        job.sites,
        evidence,
        config.settings,
        lambda model: measure(job, model),
        latency=timed if config.latency else None,
        round_to=job.rules["round_to"],
        min_keep_ratio=config.min_keep_ratio,
        dense=None if begun is None else begun.dense,
        known=known,
        planners=_planners(job, evidence),
        after_refit=_after_refit(job, missing),
        on_row=keep,
        about={
            "model_name": config.model_name,
            "device": job.device.type,
            "processes": job.processes.world,
            "calibration_images": len(job.calibration),
            "versions": installed_versions(),
        },
    )


def _evidence(config: SweepConfig, job: Job, needs: frozenset[Need]) -> Evidence:
    """Collect what is needed, in one reading of the calibration images."""
    statistics = _given(config, job, needs) if needs & FROM_STATISTICS else None
    missing = needs - FROM_STATISTICS if statistics is not None else needs
    if not missing:
        return Evidence(statistics, None, config.seed, config.ridge)
    with job.timed("calibration"):
        reader = EvidenceReader(job, missing, covariance_tokens=config.covariance_tokens)
        share = reader.read(range(len(job.calibration)))
        if missing & FROM_STATISTICS:
            statistics = merge_across(share, job.processes)
            if job.processes.main:
                statistics.save(config.save_dir / STATISTICS)
        gradients = reader.gradients()
    return Evidence(statistics, gradients, config.seed, config.ridge)


def _planners(job: Job, evidence: Evidence) -> dict[str, Callable[[Setting], Planned]]:
    """Return what makes plans, for the criteria that have no scores."""
    if evidence.statistics is None:
        return {}
    search = AutoSearch(job, evidence.statistics, ridge=evidence.ridge)
    return {"auto": lambda setting: search.plan(setting.keep_ratio)}


def _after_refit(job: Job, missing: Collection[Setting]) -> Callable[[torch.nn.Module], object] | None:
    """Return what else is refitted to the dense model's answers, if some model is to be refitted at all."""
    if not any(setting.compensation == "refit" for setting in missing):
        return None
    return AfterSurgery(job, job.model).refit_


def _given(config: SweepConfig, job: Job, needs: frozenset[Need]) -> Statistics | None:
    """Read statistics that were given, or that an earlier attempt left with all that is needed now."""
    if job.given is not None:
        if job.processes.main:
            job.given.save(config.save_dir / STATISTICS)
        return job.given
    path = config.save_dir / STATISTICS
    # The main process's word: the folder may not be on every node.
    if not job.processes.gather(path.is_file())[0]:
        return None
    found = job.processes.gather(Statistics.load(path) if job.processes.main else None)[0]
    assert found is not None
    found.check_made_for(job.settings["model"], job.data, path)
    for need, held in (("covariance", found.covariances), ("sensitivity", found.sensitivities)):
        if need in needs and not held:
            _log.info("%s does not hold the %s; the statistics are collected again", path, need)
            return None
    _log.info("statistics of %d images from %s", found.images, path)
    return found


def _open(config: SweepConfig, job: Job, log: RunLog, settings: Mapping[str, Any], *, fresh: bool) -> None:
    """Begin to write: from here on the folder is this sweep's."""
    if not job.processes.main:
        return
    folder = config.save_dir
    needed = evidence_bytes(job, sweep_needs(config.settings))
    check_folder(folder, overwrite=True, needed_bytes=sum(needed.values()) + 2**24)
    if fresh:
        clear_folder(folder, (LOG, JSON, CSV, SVG, PNG, STATISTICS))
        # First, since a sweep that ends at once is known again by it.
        write_state(folder, settings, {"dense": None, "rows": []})
    log.open(folder / LOG, append=not fresh)


def _write(
    folder: Path, report: SweepReport, settings: Mapping[str, Any], references: Sequence[PublishedPoint]
) -> None:
    write_state(folder, settings, report.to_dict())
    write_bytes(folder / CSV, report.csv().encode())
    svg, png = render(draw_sweep(report, references), "sweep")
    write_bytes(folder / SVG, svg)
    write_bytes(folder / PNG, png)
