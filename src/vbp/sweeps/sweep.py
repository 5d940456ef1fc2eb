"""The job of `vbp sweep`: many prunings of one dense model, ratios x criteria x compensations, in one table."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Final

from torch import nn

from vbp.deploy.artifact import installed_versions
from vbp.pruning.auto import AutoSearch
from vbp.pruning.convergence import merge_across
from vbp.pruning.plan import PlanChoice
from vbp.recipes.finetune import check_memory
from vbp.recipes.folder import ASKED, begin_anew, clear_halves, own_folder
from vbp.recipes.measure import measure_dense
from vbp.recipes.run import teacher_of
from vbp.recipes.setup import Job, calibration_images, make_refits, open_session, prepare
from vbp.refit.refits import Refits
from vbp.runtime.decode import to_json
from vbp.runtime.files import check_folder, clear_folder
from vbp.runtime.log_file import RunLog, log_lines, run_log
from vbp.runtime.processes import Processes
from vbp.statistics.evidence import FROM_STATISTICS, Evidence, EvidenceReader, Need, evidence_bytes
from vbp.statistics.statistics import Statistics
from vbp.sweeps.checks import Share, check_sweep, share_of, sweep_needs
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.merge import RESULTS, merged, write_results
from vbp.sweeps.points import clear_killed, clear_passing, clear_points, has_begun, measure_point, taken
from vbp.sweeps.pruner import Pruner
from vbp.sweeps.report import SweepReport
from vbp.sweeps.rows import Point, Setting
from vbp.sweeps.state import (
    JSON,
    LOG,
    POINTS,
    SweepState,
    check_may_go_on,
    deciding_settings,
    read_progress,
    read_row,
    read_rows,
    read_state,
    shared_state,
    statistics_file,
    write_row,
    write_state,
)

_log = logging.getLogger(__name__)
_SPARE_BYTES: Final = 2**24


def run_sweep(config: SweepConfig) -> SweepReport:
    """Prune a model in many ways, and leave table, figures, page, statistics and log in `config.save_dir`.

    A sweep that was stopped goes on where it was, and one that is asked for more measures only that. With
    `config.point` only a share of the points is measured, beside other jobs on the same folder. Under torchrun each
    process calls it; all do their share, one writes, and all return the same report.
    """
    check_sweep(config)
    share = share_of(config)
    with run_log() as log, open_session(config.run_config()) as session, _own(config, share, session.processes):
        processes = session.processes
        progress = processes.from_main(functools.partial(read_progress, config))
        config = processes.from_main(functools.partial(_without_own_statistics, config, progress))
        job = prepare(config.run_config(), session, sweep_needs(config.settings))
        settings = deciding_settings(config, job)
        check_may_go_on(progress, settings, config.save_dir)
        refits = make_refits(job)
        teacher = teacher_of(job) if job.config.use_kd else None
        dense = measure_dense(job) if progress is None else progress.dense  # before anything else is done
        state = SweepState(settings, dense, config.points, _about(config, job))
        fresh = progress is None or progress.begun
        state = processes.from_main(functools.partial(_open, config, share, job, log, state, fresh=fresh))
        _check_memory(config, job)
        points = config.points if share is None else share.take(config.points)
        if share is not None and share.number == 0:
            _collect_for_all(config, job)
        _measure_all(config, job, state, points, refits, teacher)
        if share is not None:
            report = processes.from_main(functools.partial(merged, config.save_dir))
            _tell(config, share, report, points)
            return report
        report = processes.from_main(functools.partial(write_results, config.save_dir))
        _log.info("results in %s", config.save_dir)
        log_lines(_log, report.table())
    return report


def _own(config: SweepConfig, share: Share | None, processes: Processes) -> AbstractContextManager[None]:
    """Hold the folder: alone, or beside the jobs of other points."""
    return own_folder(
        config.save_dir,
        config.data_path,
        processes,
        functools.partial(_way_on, config),
        to_json(config) if config.overwrite else None,
        shared=share is not None and share.number > 0,
    )


def _way_on(config: SweepConfig) -> str:
    return f"the same command{' without --overwrite' if config.overwrite else ''} goes on where it was"


def _without_own_statistics(config: SweepConfig, progress: SweepState | None) -> SweepConfig:
    """Return the configuration without a path to what the sweep has collected itself: that is read in any case."""
    given, own = config.stats_path, statistics_file(config, config.seed)
    if given is None or progress is None or progress.settings.get("statistics") != "collected":
        return config
    is_own = given.exists() and own.exists() and given.samefile(own)
    return replace(config, stats_path=None) if is_own else config


def _about(config: SweepConfig, job: Job) -> dict[str, object]:
    return {
        "model_name": config.model_name,
        "device": job.session.device.type,
        "processes": job.session.processes.world,
        "calibration_images": len(job.calibration),
        "epochs_ft": config.epochs_ft,
        "versions": installed_versions(),
    }


def _open(
    config: SweepConfig, share: Share | None, job: Job, log: RunLog, state: SweepState, *, fresh: bool
) -> SweepState:
    """Begin to write: from here on the folder is this sweep's. The main process does it for all."""
    folder = config.save_dir
    check_folder(folder, overwrite=True, needed_bytes=_needed_bytes(config, job))
    if share is not None and share.number:
        # Beside other jobs: nothing is removed, and one of them may have been here first.
        with shared_state(folder):
            state = _joined(folder, state)
        (folder / POINTS).mkdir(exist_ok=True)
        log.open(folder / POINTS / f"{share.number}-of-{share.of}.log", append=True)
        return state
    clear_halves(folder)
    if fresh:
        begin_anew(folder, JSON, state.to_dict({}), functools.partial(_clear, folder))
    else:
        state = _joined(folder, state)
        clear_folder(folder, (ASKED,))
    log.open(folder / LOG, append=not fresh)
    return state


def _joined(folder: Path, state: SweepState) -> SweepState:
    """Write what this job asks for into the state of the sweep that is there, or begin a new one."""
    if (folder / JSON).is_file():
        there = read_state(folder / JSON)
        check_may_go_on(there, state.settings, folder)
        state = there.with_points(state.asked)
        if state.asked == there.asked:
            return state
    write_state(folder, state, read_rows(folder, state))
    return state


def _clear(folder: Path) -> None:
    """Remove the results of another sweep."""
    clear_folder(folder, (LOG, JSON, *RESULTS, *(file.name for file in folder.glob("statistics*.safetensors"))))
    clear_points(folder)


def _needed_bytes(config: SweepConfig, job: Job) -> int:
    """Return what statistics, the weights of all points and the checkpoints of one take on the disk, at most."""
    evidence = evidence_bytes(job.dense, job.sites, sweep_needs(config.settings))
    needed = config.seeds * sum(evidence.values()) + _SPARE_BYTES
    if config.epochs_ft > 0:
        weights = sum(value.numel() * value.element_size() for value in job.dense.state_dict().values())
        needed += (len(config.points) + 3 * 5 + 2) * weights
    return needed


def _check_memory(config: SweepConfig, job: Job) -> None:
    """On a GPU, take a step with the largest model that will be fine-tuned."""
    largest = replace(job.target, keep_ratio=max(config.keep_ratios))
    check_memory(replace(job, target=largest))


def _seeded(config: SweepConfig, job: Job, seed: int) -> Job:
    """Return the job with another seed: of calibration images, unless their statistics were given, and of the rest.

    The validation images stay those of the first seed, so that all rows are measured on the same.
    """
    if seed == config.seed:
        return job
    settings = replace(job.config, seed=seed)
    chosen = job.config if job.given_statistics is not None else settings
    calibration = calibration_images(chosen, job.session, job.train, job.classifier.preprocessing)
    return replace(job, config=settings, calibration=replace(calibration, seed=seed))


def _measure_all(
    config: SweepConfig,
    job: Job,
    state: SweepState,
    points: Sequence[Point],
    refits: Refits | None,
    teacher: nn.Module | None,
) -> None:
    """Measure the points that are not measured yet, seed by seed, unless another job is doing it."""
    folder, processes = config.save_dir, job.session.processes

    def is_done(point: Point) -> bool:
        return read_row(folder, state, point.name) is not None

    missing = processes.from_main(lambda: [point for point in points if not is_done(point)])
    if processes.is_main:
        for point in {*points} - {*missing}:
            clear_killed(folder, point)
    if len(missing) < len(points):
        _log.info("%d of %d models were measured before", len(points) - len(missing), len(points))
    for seed in dict.fromkeys(point.seed for point in missing):
        todo = [point for point in missing if point.seed == seed]
        seeded = _seeded(config, job, seed)
        new = processes.from_main(functools.partial(_not_begun, folder, todo))
        pruner = _pruner(
            config,
            seeded,
            sweep_needs({point.setting for point in new}),
            refits if seeded is job else make_refits(seeded),
        )
        for point in todo:
            with taken(folder, point, processes) as free:
                if not free:
                    _log.warning("%s is left out: another job is at it", point.name)
                    continue
                if processes.from_main(functools.partial(is_done, point)):
                    continue  # by another job, since this one began
                row = measure_point(config, seeded, pruner, state.dense, point, teacher)
                if processes.is_main:
                    write_row(folder, state, row)
                    clear_passing(folder, point)
                place = f"{missing.index(point) + 1} of {len(missing)}"
                _log.info("%s: %s", place, row.sentence)


def _not_begun(folder: Path, points: Iterable[Point]) -> list[Point]:
    return [point for point in points if not has_begun(folder, point)]


def _pruner(config: SweepConfig, job: Job, needs: frozenset[Need], refits: Refits | None) -> Pruner:
    """Return what prunes by the settings of one seed."""
    evidence = _evidence(config, job, needs)
    planners: dict[str, Callable[[Setting], PlanChoice]] = {}
    if evidence.statistics is not None:
        seen = job.sites, evidence.statistics, job.calibration, job.plan_rules
        auto = AutoSearch(job.dense, *seen, ridge=evidence.ridge)
        planners["auto"] = lambda setting: auto.plan(setting.keep_ratio)
    return Pruner(job.dense, job.sites, evidence, job.plan_rules, planners, refits)


def _collect_for_all(config: SweepConfig, job: Job) -> None:
    """Collect the statistics that all points of all seeds share."""
    needs = sweep_needs(config.settings) & FROM_STATISTICS
    for seed in range(config.seed, config.seed + config.seeds):
        _evidence(config, _seeded(config, job, seed), needs)


def _evidence(config: SweepConfig, job: Job, needs: frozenset[Need]) -> Evidence:
    """Collect what is needed, in one reading of the calibration images."""
    seed, statistics = job.config.seed, _known_statistics(config, job, needs) if needs & FROM_STATISTICS else None
    if config.point is not None and needs & FROM_STATISTICS:
        needs |= sweep_needs(config.settings) & FROM_STATISTICS  # the other points read them, too
    missing = needs - FROM_STATISTICS if statistics is not None else needs
    if not missing:
        return Evidence(statistics, None, seed, config.ridge)
    processes = job.session.processes
    with job.session.timed("calibration"):
        reader = EvidenceReader(
            job.dense, job.sites, job.calibration, missing, covariance_tokens=config.covariance_tokens
        )
        share = reader.read(range(len(job.calibration)))
        if missing & FROM_STATISTICS:
            statistics = merge_across(share, processes)
            if processes.is_main:
                statistics.save(statistics_file(config, seed))
        gradients = reader.gradients()
    return Evidence(statistics, gradients, seed, config.ridge)


def _known_statistics(config: SweepConfig, job: Job, needs: frozenset[Need]) -> Statistics | None:
    """Return statistics that were given, or those of an earlier attempt if they hold all that is needed now."""
    processes, path = job.session.processes, statistics_file(config, job.config.seed)
    if job.given_statistics is not None:
        first = statistics_file(config, config.seed)
        if processes.is_main and not first.exists():
            job.given_statistics.save(first)
        return job.given_statistics
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


def _tell(config: SweepConfig, share: Share, report: SweepReport, points: Sequence[Point]) -> None:
    """Log what a share of the points has left."""
    if share.number == 0:
        _log.info("dense model and statistics of %d points are in %s", len(config.points), config.save_dir)
    own = [row for row in report.rows if row.point in points]
    log_lines(_log, replace(report, rows=tuple(own), missing=()).table())
    _log.info("%d of %d points are measured: vbp sweep %s merges them", len(report.rows),
              len(report.rows) + len(report.missing), config.save_dir)  # fmt: skip
