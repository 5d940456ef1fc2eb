"""What a run works on: model, sites, images and device, all checked before any work."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from vbp.aiming import find_target, plan_rules
from vbp.checkpoints import read_checkpoint
from vbp.config import RunConfig
from vbp.data import (
    ImageLoader,
    Images,
    Split,
    balanced_subset,
    check_data_path,
    class_folders,
    list_images,
    make_loader,
)
from vbp.distillation import DistillationLoss
from vbp.distributed import Processes, restarts
from vbp.files import check_folder
from vbp.fingerprints import json_fingerprint, model_fingerprint
from vbp.memory import enable_gradient_checkpointing_
from vbp.models import Classifier, load_classifier
from vbp.models.class_names import dataset_class_names
from vbp.planning import check_ratios
from vbp.precision import Precision, move_, set_matmul_precision
from vbp.preprocessing import evaluation_transform
from vbp.resume import check_same_settings, find_checkpoint
from vbp.sites import Site, find_sites
from vbp.statistics import Statistics
from vbp.surgery import check_prunable
from vbp.targets import Target
from vbp.tracking import check_tracking

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint that a run goes on from."""

    path: Path
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What a run works on, checked and ready.

    Attributes:
        rules: Of all plans: what `make_plan` takes besides sites, scores and keep ratio.
        target: The budget.
        data: Fingerprint of the calibration images and their preprocessing.
        given: Statistics from a file, in the place of a calibration pass.
        settings: What must be the same when a checkpoint of this run is taken up again.
        found: The checkpoint that this run goes on from.
    """

    config: RunConfig
    processes: Processes
    device: torch.device
    precision: Precision
    classifier: Classifier
    sites: tuple[Site, ...]
    rules: Mapping[str, Any]
    target: Target
    calibration: Images
    train: Images
    val: ImageLoader
    example: Tensor
    data: str
    given: Statistics | None
    settings: Mapping[str, Any]
    found: Found | None
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("calibration", "planning", "surgery", "finetune", "evaluation"), 0.0)
    )

    @property
    def model(self) -> nn.Module:
        return self.classifier.model

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def prepare(config: RunConfig, processes: Processes, device: torch.device) -> Job:
    """Check everything and load the model; nothing is written."""
    lowest = 1 if config.round_to == "auto" else config.round_to
    check_ratios(config.keep_ratio, config.min_keep_ratio, lowest, config.attn_keep_ratio)
    DistillationLoss(config.kd_alpha, config.kd_beta, config.kd_T)
    precision = Precision.choose(config.amp, device)
    set_matmul_precision(config.matmul_precision)
    check_tracking(config.log_dir)
    check_data_path(config.data_path)
    given = None if config.stats_path is None else Statistics.load(config.stats_path)
    found = _found(config, processes)
    with processes.one_per_node_first():
        classifier = _classifier(config)
        train, val = (list_images(config.data_path, split, classifier.num_classes) for split in get_args(Split))
        classifier = _named(classifier, config.data_path)
    _check_space(config, processes, classifier.model)
    samples = 0 if config.calib_samples == "auto" else config.calib_samples
    calibration = balanced_subset(train, samples, config.seed)
    data = json_fingerprint([calibration.fingerprint(), classifier.preprocessing.to_dict()])
    model = move_(classifier.model, device)
    settings = _settings(config, processes, device, precision, model, train, val)
    processes.check_same("model, images and settings", json_fingerprint(settings))
    if given is not None and config.stats_path is not None:
        given.check_made_for(settings["model"], data, config.stats_path)
    if found is not None:
        check_same_settings(found.state["settings"], settings, found.path)
    example = classifier.example_input().to(device)
    sites = find_sites(model, example, attention=config.bottleneck)
    if given is not None and config.stats_path is not None:
        given.check_holds(sites, config.stats_path)
    check_prunable(model, sites, example)
    rules = plan_rules(config, sites, device, precision)
    target = find_target(config, processes, model, sites, example, precision, rules, planned=found is not None)
    if config.grad_checkpointing:
        enable_gradient_checkpointing_(model)
    val_loader = make_loader(
        balanced_subset(val, config.limit_val, config.seed),
        evaluation_transform(classifier.preprocessing),
        batch_size=config.val_batch_size,
        rank=processes.rank,
        world=processes.world,
        **reading(config),
    )
    return Job(
        config, processes, device, precision, classifier, sites, rules, target, calibration, train, val_loader,
        example, data, given, settings, found,
    )  # fmt: skip


def reading(config: RunConfig) -> dict[str, Any]:
    """Give what all loaders of a run have in common."""
    return {"num_workers": config.num_workers, "prefetch": config.prefetch, "pin_memory": True}


def _found(config: RunConfig, processes: Processes) -> Found | None:
    """Find the checkpoint to go on from: the main process chooses, all read the same."""
    path = None
    if processes.main:
        path = find_checkpoint(
            config.resume, config.save_dir, config.to_dict(), overwrite=config.overwrite, restarted=restarts() > 0
        )
    path = processes.gather(path)[0]
    if path is None:
        return None
    _log.info("going on from %s", path)
    return Found(path, read_checkpoint(path))


def _check_space(config: RunConfig, processes: Processes, model: nn.Module) -> None:
    """See that the disk holds what a run writes at most."""
    if not processes.main:
        return
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    # Best, final and the folder, one more while one of them is replaced. A checkpoint holds weights, two moments, the
    # best weights and perhaps an average, and there are three of them for a moment.
    copies = 4 + (3 * 5 if config.epochs_ft > 0 else 0)
    check_folder(config.save_dir, overwrite=True, needed_bytes=copies * size + 2**24)


def _classifier(config: RunConfig) -> Classifier:
    classifier = load_classifier(
        config.model_name,
        model_type=config.model_type,
        checkpoint=config.checkpoint,
        convnext_checkpoint=config.convnext_checkpoint,
        allow_random_init=config.allow_random_init,
        model_kwargs=config.model_kwargs,
        img_size=config.img_size,
        crop_pct=config.crop_pct,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
    )
    _log.info("model %s: %s; %s", config.model_name, classifier.family, classifier.preprocessing)
    return classifier


def _named(classifier: Classifier, data_path: str) -> Classifier:
    """Name the classes after those of the data, where the weights do not say what they are."""
    if classifier.class_names is not None:
        return classifier
    return replace(classifier, class_names=dataset_class_names(class_folders(data_path), classifier.num_classes))


def _settings(
    config: RunConfig,
    processes: Processes,
    device: torch.device,
    precision: Precision,
    model: nn.Module,
    train: Images,
    val: Images,
) -> dict[str, Any]:
    """Give what decides about the result: the configuration, and what it stands for here."""
    return config.to_dict() | {
        "device": device.type,
        "amp": precision.name,
        "world": processes.world,
        "local_rank": None,  # older launchers give each process its own
        "model": model_fingerprint(model),
        "train": train.fingerprint(),
        "val": val.fingerprint(),
    }
