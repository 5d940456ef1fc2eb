"""The job of `vbp sweep`: one dense model and its data in, a table, a CSV and a figure of many prunings out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from vbp.after_surgery import AfterSurgery, check_refits
from vbp.artifacts import installed_versions
from vbp.auto_search import AutoSearch
from vbp.calibration import merge_across
from vbp.criteria import Evidence, Need
from vbp.distributed import process_group
from vbp.evidence import FROM_STATISTICS, EvidenceReader, check_given, evidence_bytes
from vbp.files import check_folder, clear_folder, write_bytes
from vbp.job import Job, prepare
from vbp.measuring import latencies, measure
from vbp.run_log import RunLog, run_log
from vbp.statistics import Statistics
from vbp.sweep import Planned, sweep, sweep_needs
from vbp.sweep_config import SweepConfig, check_sweep
from vbp.sweep_figure import ReferencePoint, draw_sweep, render_sweep
from vbp.sweep_report import Setting, SweepReport
from vbp.sweep_state import JSON, Begun, check_may_go_on, deciding_settings, read_begun, write_state

_log = logging.getLogger(__name__)

LOG, CSV, SVG, PNG = "vbp_sweep.log", "sweep.csv", "sweep.svg", "sweep.png"
STATISTICS: Final = "statistics.safetensors"


def run_sweep(config: SweepConfig, references: Sequence[ReferencePoint] = ()) -> SweepReport:
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
    """Give what makes plans, for the criteria that have no scores."""
    if evidence.statistics is None:
        return {}
    search = AutoSearch(job, evidence.statistics, ridge=evidence.ridge)
    return {"auto": lambda setting: search.plan(setting.keep_ratio)}


def _after_refit(job: Job, missing: Collection[Setting]) -> Callable[[torch.nn.Module], object] | None:
    """Give what else is refitted to the dense model's answers, if some model is to be refitted at all."""
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
    folder: Path, report: SweepReport, settings: Mapping[str, Any], references: Sequence[ReferencePoint]
) -> None:
    write_state(folder, settings, report.to_dict())
    write_bytes(folder / CSV, report.csv().encode())
    svg, png = render_sweep(draw_sweep(report, references))
    write_bytes(folder / SVG, svg)
    write_bytes(folder / PNG, png)
