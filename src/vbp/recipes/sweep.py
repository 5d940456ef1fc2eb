"""The job of `vbp sweep`: many prunings of one dense model, ratios x criteria x compensations, in one table."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch import nn

from vbp.cost.timing import LatencyComparison
from vbp.deploy.artifact import installed_versions
from vbp.errors import InputError, one_line
from vbp.pruning.auto import AutoSearch
from vbp.pruning.convergence import merge_across
from vbp.pruning.criteria import criterion_scores
from vbp.pruning.make_plan import PlanRules, check_ratios
from vbp.pruning.plan import PlanChoice, PruningPlan
from vbp.pruning.surgery import prune_
from vbp.recipes.checks import check_labelled, check_sweep, sweep_needs
from vbp.recipes.folder import ASKED, BEGUN, asked, begin_anew, clear_halves, own_folder
from vbp.recipes.measure import compare_latency, measure, measure_dense
from vbp.recipes.options import Role, fields_with
from vbp.recipes.setup import Job, make_refits, open_session, prepare
from vbp.recipes.sweep_config import SweepConfig
from vbp.refit.refits import Refits
from vbp.report.published import points_of
from vbp.report.run_report import STATISTICS, Measured
from vbp.report.style import render
from vbp.report.sweep_figure import draw_sweep
from vbp.report.sweep_report import Setting, SweepReport, SweepRow
from vbp.runtime.decode import read_json, to_json
from vbp.runtime.files import check_folder, clear_folder, text_bytes, write_bytes, write_json
from vbp.runtime.fingerprints import json_fingerprint
from vbp.runtime.log_file import RunLog, log_lines, run_log
from vbp.sites.site import Site
from vbp.statistics.evidence import FROM_STATISTICS, Evidence, EvidenceReader, Need, evidence_bytes
from vbp.statistics.statistics import Statistics

_log = logging.getLogger(__name__)

# The scope is the setting's own.
_RULES: Final = PlanRules()


def sweep(
    model: nn.Module,
    sites: Sequence[Site],
    evidence: Evidence,
    settings: Sequence[Setting],
    measure: Callable[[nn.Module], Measured],
    *,
    latency: Callable[[nn.Module], LatencyComparison] | None = None,
    rules: PlanRules = _RULES,
    dense: Measured | None = None,
    known: Collection[SweepRow] = (),
    planners: Mapping[str, Callable[[Setting], PlanChoice]] | None = None,
    after_surgery: Callable[[nn.Module, PruningPlan, Setting], object] | None = None,
    on_row: Callable[[SweepReport], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> SweepReport:
    """Prune a copy of the dense model by each setting in turn, and measure it.

    One copy exists at a time, beside those of a planner; scores are computed once for a criterion. `evidence` must
    hold what `sweep_needs` says of the settings that are not among the `known` rows, which are not measured again.
    `latency` times a pruned model beside the dense one. `planners` make the plans of criteria that
    need more than scores (`auto`). `after_surgery` changes a pruned model.
    `on_row` is called with all that is known, after the dense model and after each row.
    """
    for setting in settings:
        check_ratios(setting.keep_ratio, rules.min_keep_ratio, rules.round_to)
    if dense is None:
        dense = measure(model)
    rows = {row.setting: row for row in known}
    asked = dict.fromkeys([*settings, *rows])

    def report() -> SweepReport:
        assert dense is not None
        return SweepReport(dense, tuple(rows[setting] for setting in asked if setting in rows), about or {})

    missing = [setting for setting in settings if setting not in rows]
    by_scores = _planner(model, sites, evidence, rules)
    if missing and on_row is not None:
        on_row(report())
    for number, setting in enumerate(missing, 1):
        planned = (planners or {}).get(setting.criterion, by_scores)(setting)
        choice = planned.compensated_by(setting.compensation)
        plan, pruned = choice.plan, copy.deepcopy(model)
        prune_(pruned, plan, choice.means, choice.covariances, ridge=evidence.ridge)
        if after_surgery is not None:
            after_surgery(pruned, plan, setting)
        timed = None if latency is None else latency(pruned)
        measured = measure(pruned)
        rows[setting] = SweepRow(setting, plan.kept, plan.total, measured, timed)
        _log.info(
            "%d of %d: %s, kept %.3f: top-1 %s %%", number, len(missing), setting.method,
            plan.kept / plan.total if plan.total else 1.0, measured.top1_text,
        )  # fmt: skip
        del pruned
        if on_row is not None:
            on_row(report())
    return report()


def _planner(
    model: nn.Module, sites: Sequence[Site], evidence: Evidence, rules: PlanRules
) -> Callable[[Setting], PlanChoice]:
    """Return a function that makes plans from scores, which are computed once for a criterion."""
    scores = functools.cache(lambda criterion: criterion_scores(criterion, model, sites, evidence))
    statistics = evidence.statistics

    def plan(setting: Setting) -> PlanChoice:
        made = replace(rules, scope=setting.scope).plan(sites, scores(setting.criterion), setting.keep_ratio)
        if statistics is None:
            return PlanChoice(made, None, None)
        return PlanChoice(made, statistics.means, statistics.covariances)

    return plan


LOG, JSON, CSV, SVG, PNG = "vbp_sweep.log", "sweep.json", "sweep.csv", "sweep.svg", "sweep.png"
_FORMAT: Final = "vbp-sweep/2"


def run_sweep(config: SweepConfig) -> SweepReport:
    """Prune a model in many ways, and leave table, figure, statistics and log in `config.save_dir`.

    A sweep that was stopped goes on where it was, and one that is asked for more measures only that. Under torchrun
    each process calls it; all do their share, one writes, and all return the same report.
    """
    check_sweep(config)
    with (
        run_log() as log,
        open_session(config.run_config()) as session,
        own_folder(
            config.save_dir,
            config.data_path,
            session.processes,
            functools.partial(_way_on, config),
            to_json(config) if config.overwrite else None,
        ),
    ):
        processes = session.processes
        progress = processes.from_main(functools.partial(read_progress, config))
        job = prepare(config.run_config(), session, sweep_needs(config.settings))
        check_labelled("a sweep compares accuracies", job.labelled)
        settings = deciding_settings(config, job)
        check_may_go_on(progress, settings, config.save_dir)
        refits = make_refits(job)
        dense = (None if progress is None else progress.dense) or measure_dense(job)  # before anything else is done
        _open(config, job, log, settings, fresh=progress is None or progress.begun)
        processes.barrier()  # an error of another process is to find the log
        report = _sweep(config, job, refits, dense, () if progress is None else progress.rows, settings)
        if processes.is_main:
            _write(config, report, settings)
        _log.info("results in %s", config.save_dir)
        log_lines(_log, report.table())
    return report


def _sweep(
    config: SweepConfig,
    job: Job,
    refits: Refits | None,
    dense: Measured,
    known: Sequence[SweepRow],
    settings: Mapping[str, Any],
) -> SweepReport:
    done = {row.setting for row in known}
    missing = [setting for setting in config.settings if setting not in done]
    if known:
        _log.info("%d of %d models were measured before", len(config.settings) - len(missing), len(config.settings))

    def keep(report: SweepReport) -> None:
        if job.session.processes.is_main:
            write_state(config.save_dir, settings, report.to_dict())

    evidence = _evidence(config, job, sweep_needs(missing))
    planners: dict[str, Callable[[Setting], PlanChoice]] = {}
    if evidence.statistics is not None:
        seen = job.sites, evidence.statistics, job.calibration, job.plan_rules
        auto = AutoSearch(job.dense, *seen, ridge=evidence.ridge)
        planners["auto"] = lambda setting: auto.plan(setting.keep_ratio)
    return sweep(
        job.dense,
        job.sites,
        evidence,
        config.settings,
        functools.partial(measure, job),
        latency=functools.partial(compare_latency, job) if config.latency else None,
        rules=job.plan_rules,
        dense=dense,
        known=known,
        planners=planners,
        after_surgery=None if refits is None else functools.partial(_refit_, refits),
        on_row=keep,
        about={
            "model_name": config.model_name,
            "device": job.session.device.type,
            "processes": job.session.processes.world,
            "calibration_images": len(job.calibration),
            "versions": installed_versions(),
        },
    )


def _refit_(refits: Refits, pruned: nn.Module, plan: PruningPlan, setting: Setting) -> None:
    """Refit what belongs to the compensation: without the refit BatchNorms alone."""
    if setting.compensation == "refit":
        refits.refit_(pruned, plan=plan)
    else:
        refits.refit_(pruned, ["batchnorm"], plan=plan)


def _evidence(config: SweepConfig, job: Job, needs: frozenset[Need]) -> Evidence:
    """Collect what is needed, in one reading of the calibration images."""
    statistics = _given(config, job, needs) if needs & FROM_STATISTICS else None
    missing = needs - FROM_STATISTICS if statistics is not None else needs
    if not missing:
        return Evidence(statistics, None, config.seed, config.ridge)
    processes = job.session.processes
    with job.session.timed("calibration"):
        reader = EvidenceReader(
            job.dense, job.sites, job.calibration, missing, covariance_tokens=config.covariance_tokens
        )
        share = reader.read(range(len(job.calibration)))
        if missing & FROM_STATISTICS:
            statistics = merge_across(share, processes)
            if processes.is_main:
                statistics.save(config.save_dir / STATISTICS)
        gradients = reader.gradients()
    return Evidence(statistics, gradients, config.seed, config.ridge)


def _given(config: SweepConfig, job: Job, needs: frozenset[Need]) -> Statistics | None:
    """Return statistics that were given, or those of an earlier attempt if they hold all that is needed now."""
    processes = job.session.processes
    if job.given_statistics is not None:
        if processes.is_main:
            job.given_statistics.save(config.save_dir / STATISTICS)
        return job.given_statistics
    path = config.save_dir / STATISTICS
    # As the main process finds it: the folder may not be on every node.
    if not processes.from_main(path.is_file):
        return None
    statistics = processes.from_main(functools.partial(Statistics.load, path))
    statistics.check_made_for(job.settings["model"], job.calibration.fingerprint, path)
    for need, held in (("covariance", statistics.covariances), ("sensitivity", statistics.sensitivities)):
        if need in needs and not held:
            _log.info("%s does not hold the %s; the statistics are collected again", path, need)
            return None
    _log.info("statistics of %d images from %s", statistics.images, path)
    return statistics


def _open(config: SweepConfig, job: Job, log: RunLog, settings: Mapping[str, Any], *, fresh: bool) -> None:
    """Begin to write: from here on the folder is this sweep's."""
    if not job.session.processes.is_main:
        return
    folder = config.save_dir
    needed = evidence_bytes(job.dense, job.sites, sweep_needs(config.settings))
    check_folder(folder, overwrite=True, needed_bytes=sum(needed.values()) + 2**24)
    clear_halves(folder)
    if fresh:
        clear = functools.partial(clear_folder, folder, (LOG, JSON, CSV, SVG, PNG, STATISTICS))
        begin_anew(folder, JSON, _state(settings, {"dense": None, "rows": []}), clear)
    else:
        clear_folder(folder, (ASKED,))
    log.open(folder / LOG, append=not fresh)


def _write(config: SweepConfig, report: SweepReport, settings: Mapping[str, Any]) -> None:
    folder = config.save_dir
    write_state(folder, settings, report.to_dict())
    write_bytes(folder / CSV, text_bytes(report.csv()))
    svg, png = render(draw_sweep(report, points_of(config.model_name)), "sweep")
    write_bytes(folder / SVG, svg)
    write_bytes(folder / PNG, png)


@dataclass(frozen=True)
class SweepProgress:
    """Settings and rows of an earlier attempt; `begun` where it ended while it removed the results of another one."""

    settings: Mapping[str, Any]
    dense: Measured | None
    rows: tuple[SweepRow, ...]
    begun: bool = False


def deciding_settings(config: SweepConfig, job: Job) -> dict[str, Any]:
    """Return what must be the same for rows of two attempts to stand in one table; plain JSON data."""
    given, session = job.given_statistics, job.session
    facts = {
        "model": job.settings["model"],
        "calibration": job.calibration.fingerprint,
        "val": json_fingerprint([job.settings["val"], job.classifier.preprocessing.to_dict()]),
        "statistics": "collected" if given is None else json_fingerprint(given.identity()),
        "device": session.device.type,
        "amp": session.precision.name,
        "processes": session.processes.world,
    }
    # Model and images are compared by their contents.
    return facts | {name: to_json(getattr(config, name)) for name in fields_with(SweepConfig, Role.RESULT)}


def read_progress(config: SweepConfig) -> SweepProgress | None:
    """Read what is in the folder: nothing, or an earlier attempt; on the main process."""
    begun = (config.save_dir / BEGUN).is_file()
    path = config.save_dir / (BEGUN if begun else JSON)
    before = asked(config.save_dir)
    replaces = config.overwrite or (before is not None and before == to_json(replace(config, overwrite=True)))
    if replaces or not path.exists():
        check_folder(config.save_dir, overwrite=replaces, needed_bytes=0)
        return None
    try:
        stored = read_json(path)
        if stored["format"] != _FORMAT:
            raise ValueError(f"format {stored['format']!r} where {_FORMAT} belongs")
        dense = None if stored["dense"] is None else Measured(**stored["dense"])
        return SweepProgress(stored["settings"], dense, tuple(map(SweepRow.from_dict, stored["rows"])), begun)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} must be what an earlier sweep left, got {type(error).__name__}: {one_line(error)}; choose "
            "another --save_dir, or pass --overwrite to begin again"
        ) from error


def check_may_go_on(progress: SweepProgress | None, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse rows that were measured with different settings in one table."""
    if progress is None:
        return
    names = sorted({*progress.settings, *settings})
    different = [
        f"{name} {progress.settings.get(name)!s:.16} there, {settings.get(name)!s:.16} here"
        for name in names
        if progress.settings.get(name) != settings.get(name)
    ]
    if different:
        raise InputError(
            f"a sweep goes on with the settings it began with, got others than in {folder}: {'; '.join(different)}; "
            "choose another --save_dir, or pass --overwrite to begin again"
        )


def write_state(folder: Path, settings: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Write what is known so far."""
    write_json(folder / JSON, _state(settings, report))


def _state(settings: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "settings": dict(settings), **report}


def _way_on(config: SweepConfig) -> str:
    return f"the same command{' without --overwrite' if config.overwrite else ''} goes on where it was"
