"""The whole story: a trained classifier and its data in, a pruned, fine-tuned, reported one out."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vbp.artifacts import installed_versions, save_pruned
from vbp.config import RunConfig
from vbp.cost import count_macs, count_parameters, format_count, format_plan, measure_latency_ms, plan_cost
from vbp.data import ImageLoader, make_loader
from vbp.distillation import DistillationLoss
from vbp.evaluation import evaluate
from vbp.files import clear_folder, write_bytes, write_json
from vbp.finetune import Trainer
from vbp.job import Job, evaluation_loader, plan_of, prepare
from vbp.plan import PruningPlan
from vbp.preprocessing import training_transform
from vbp.ranking import variance_scores
from vbp.report import Measured, RunReport
from vbp.run_log import run_log
from vbp.statistics import Statistics, collect_statistics
from vbp.surgery import prune_

_log = logging.getLogger(__name__)

LOG, CONFIG, STATISTICS, PLAN = "vbp_imagenet.log", "config.json", "statistics.safetensors", "plan.json"
METRICS, BEST, FINAL, SUMMARY = "metrics.jsonl", "vbp_best.pth", "vbp_final.pth", "summary.json"
_CPU_LATENCY_MACS = 20_000_000_000
_FILES = (LOG, CONFIG, STATISTICS, PLAN, METRICS, BEST, FINAL, SUMMARY)


def run(config: RunConfig) -> RunReport:
    """Prune a classifier, fine-tune it, and leave log, checkpoints and report in `config.save_dir`.

    Everything that the configuration names is checked before any work is done and before anything is written.

    Raises:
        InputError: Something in the configuration or behind its paths is wrong.
        OutputError: A file could not be written; those before it are whole.

    Source: VBP paper (arXiv 2507.12988), section 3.
    """
    with run_log() as log:
        job = prepare(config)
        clear_folder(config.save_dir, _FILES)
        log.open(config.save_dir / LOG)
        write_json(config.save_dir / CONFIG, config.to_dict())
        torch.manual_seed(config.seed)

        base = _measure(job, job.model)
        _log.info("dense: %s", _figures(base))
        statistics = _statistics(job)
        plan = _plan(job, statistics)
        dense = copy.deepcopy(job.model)
        uncompensated = _uncompensated(job, plan)
        with job.timed("surgery"):
            prune_(job.model, plan, statistics.means if config.compensation == "mean" else None)
        pruned = _measure(job, job.model)
        _log.info("pruned: %s", _figures(pruned))
        batch = _latency_batch(job)
        latency = measure_latency_ms({"base": dense, "pruned": job.model}, batch)
        base = replace(base, latency_ms=latency["base"])
        pruned = replace(pruned, latency_ms=latency["pruned"], epoch=0)
        teacher = dense if config.use_kd else None
        del dense  # without distillation its memory is wanted for training
        best, final = _finetune(job, plan, teacher, pruned)
        report = _report(job, plan, statistics, len(batch), base, pruned, best, final, uncompensated)
        write_json(config.save_dir / SUMMARY, report.to_dict())
        _log.info("results in %s\n%s", config.save_dir, report.table())
    return report


def _bar(loader: ImageLoader, label: str) -> Any:
    return tqdm(loader, desc=label, unit="batch", leave=False, disable=None, dynamic_ncols=True)


def _measure(job: Job, model: nn.Module) -> Measured:
    with job.timed("evaluation"):
        accuracy = evaluate(model, _bar(job.val, "evaluation"), job.device)
    return Measured(accuracy.top1, accuracy.top5, count_macs(model, job.example), count_parameters(model))


def _figures(model: Measured) -> str:
    return (
        f"top-1 {model.top1:.2f} %, top-5 {model.top5:.2f} %, {format_count(model.macs)} MACs, "
        f"{format_count(model.params)} parameters"
    )


def _statistics(job: Job) -> Statistics:
    statistics = job.given
    if statistics is None:
        loader = evaluation_loader(job.classifier, job.calibration, job.config)
        with job.timed("calibration"):
            statistics = collect_statistics(
                job.model, job.sites, _bar(loader, "statistics"), device=job.device, data=job.data
            )
    statistics.save(job.config.save_dir / STATISTICS)
    _log.info("statistics of %d sites over %d images", len(job.sites), statistics.images)
    return statistics


def _plan(job: Job, statistics: Statistics) -> PruningPlan:
    config = job.config
    with job.timed("planning"):
        plan = plan_of(config, job.sites, variance_scores(statistics, norm_per_layer=config.norm_per_layer))
    plan.save(config.save_dir / PLAN)
    _log.info("%s", format_plan(plan, plan_cost(job.model, plan, job.example)))
    return plan


def _uncompensated(job: Job, plan: PruningPlan) -> Measured | None:
    if not job.config.compare_uncompensated:
        return None
    model = copy.deepcopy(job.model)
    prune_(model, plan)
    measured = _measure(job, model)
    _log.info("pruned without compensation: %s", _figures(measured))
    return measured


def _latency_batch(job: Job) -> Tensor:
    """Give the batch to time: an evaluation batch on a GPU; on a CPU as many images as take about a second."""
    size = job.config.val_batch_size
    if job.device.type == "cpu":
        size = min(size, 32, max(1, _CPU_LATENCY_MACS // count_macs(job.model, job.example)))
    return job.example.repeat(size, 1, 1, 1)


def _finetune(job: Job, plan: PruningPlan, teacher: nn.Module | None, pruned: Measured) -> tuple[Measured, Measured]:
    """Fine-tune and keep the best and the last checkpoint; the pruned model counts as epoch 0."""
    config, preprocessing = job.config, job.classifier.preprocessing
    best = final = pruned
    rows: list[dict[str, Any]] = [{"epoch": 0, "top1": pruned.top1, "top5": pruned.top5}]
    _write_rows(job, rows)
    _save(job, BEST, plan, best)
    if config.epochs_ft > 0:
        loader = make_loader(
            job.train,
            training_transform(preprocessing, hflip=config.hflip, scale=config.crop_scale),
            batch_size=config.train_batch_size,
            num_workers=config.num_workers,
            shuffle=True,
            seed=config.seed,
            pin_memory=True,
        )
        trainer = Trainer.of(
            job.model,
            steps=config.epochs_ft * len(loader),
            learning_rate=config.lr_ft,
            device=job.device,
            teacher=teacher,
            loss=DistillationLoss(config.kd_alpha, config.kd_beta, config.kd_T),
        )
    for epoch in range(1, config.epochs_ft + 1):
        with job.timed("finetune"):
            result = trainer.train_epoch(loader, epoch, partial(_bar, label=f"epoch {epoch}/{config.epochs_ft}"))
        final = replace(_measure(job, job.model), epoch=epoch)
        _log.info("epoch %d/%d: loss %.4f; %s", epoch, config.epochs_ft, result.loss, _figures(final))
        rows.append({
            "epoch": epoch, "top1": final.top1, "top5": final.top5, "train_loss": result.loss,
            "train_top1": result.top1, "lr": result.learning_rate, "images": result.images,
            "seconds": result.seconds,
        })  # fmt: skip
        _write_rows(job, rows)
        if final.top1 > best.top1:
            best = final
            _save(job, BEST, plan, best)
    _save(job, FINAL, plan, final)
    return best, final


def _write_rows(job: Job, rows: list[dict[str, Any]]) -> None:
    write_bytes(job.config.save_dir / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _save(job: Job, name: str, plan: PruningPlan, measured: Measured) -> None:
    save_pruned(
        job.model,
        job.config.save_dir / name,
        plans=plan,
        source=job.classifier.source,
        preprocessing=job.classifier.preprocessing,
        metrics={"epoch": measured.epoch, "top1": measured.top1, "top5": measured.top5},
    )


def _report(
    job: Job,
    plan: PruningPlan,
    statistics: Statistics,
    latency_batch: int,
    base: Measured,
    pruned: Measured,
    best: Measured,
    final: Measured,
    uncompensated: Measured | None,
) -> RunReport:
    folder: Path = job.config.save_dir
    images = len(job.val.images) - len(job.val.unreadable)
    return RunReport(
        base=base,
        pruned=pruned,
        best=best,
        final=final,
        uncompensated=uncompensated,
        keep_ratio=plan.kept / plan.total if plan.total else 1.0,
        sites=plan.widths,
        seconds=job.seconds,
        images={"calibration": statistics.images, "val": images},
        latency_batch=latency_batch,
        device=str(job.device),
        versions=installed_versions(),
        config=job.config.to_dict(),
        files={name: str(folder / name) for name in _FILES},
    )
