"""What a run works on, all checked before any work: model, sites, images, device, plan rules and budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from vbp.cost.layer_table import LayerTimes
from vbp.cost.layer_timing import measure_layer_times
from vbp.cost.macs import count_macs
from vbp.cost.rounding import recommended_round_to
from vbp.cost.target import Target, neutral_plan
from vbp.data.data_path import check_data_path, class_folders, list_images
from vbp.data.images import Images, Split, balanced_subset
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import evaluation_transform
from vbp.errors import InputError
from vbp.models.class_names import dataset_class_names
from vbp.models.classifier import Classifier
from vbp.models.load import load_classifier
from vbp.pruning.make_plan import check_ratios
from vbp.pruning.surgery import check_prunable
from vbp.recipes.config import RunConfig
from vbp.recipes.resume import check_same_settings, find_checkpoint
from vbp.runtime.files import check_folder
from vbp.runtime.fingerprints import json_fingerprint, model_fingerprint
from vbp.runtime.precision import Precision, move_, set_matmul_precision
from vbp.runtime.processes import Processes, restarts
from vbp.sites.site import Site, find_sites
from vbp.statistics.statistics import Statistics
from vbp.training.checkpoints import read_checkpoint
from vbp.training.losses import DistillationLoss
from vbp.training.memory import enable_gradient_checkpointing_
from vbp.training.tensorboard import check_tracking

_log = logging.getLogger(__name__)


_CPU_LATENCY_MACS = 20_000_000_000


def plan_rules(
    config: RunConfig, sites: Sequence[Site], device: torch.device, precision: Precision
) -> dict[str, Any]:
    """Return what `make_plan` takes besides sites, scores, keep ratio and scope.

    Args:
        config: What is asked for.
        sites: From `find_sites`.
        device: Where the model runs, and will run.
        precision: Of its forward pass.
    """
    round_to = config.round_to
    if round_to == "auto":
        round_to = recommended_round_to(device, precision.dtype or torch.float32, sites)
        _log.info("round_to %d suits %s in %s", round_to, device.type, precision.dtype or torch.float32)
    return {
        "round_to": round_to,
        "min_keep_ratio": config.min_keep_ratio,
        "attn_keep_ratio": config.attn_keep_ratio,
    }


def find_target(
    config: RunConfig,
    processes: Processes,
    model: nn.Module,
    sites: Sequence[Site],
    example: Tensor,
    precision: Precision,
    rules: Mapping[str, Any],
    *,
    planned: bool = False,
) -> Target:
    """See whether the model can meet the budget; one of time is measured, by the main process for all.

    Where the plan is known already, of a run that goes on, nothing is timed: this device may be busier now, or idler.

    Raises:
        InputError: It cannot, or nothing would be removed.
    """
    budget, times = config.budget, None
    if budget.timed and not planned:
        times = processes.all_gather(
            _layer_times(config, model, sites, example, precision, rules["round_to"]) if processes.is_main else None
        )[0]
    target = Target.of(budget, model, sites, example, times, **rules)
    _check_removes(config, sites, target, rules)
    return target


def _layer_times(
    config: RunConfig, model: nn.Module, sites: Sequence[Site], example: Tensor, precision: Precision, round_to: int
) -> LayerTimes:
    batch = latency_batch(config, model, example)
    _log.info("timing the layers at several widths, batch %d", len(batch))
    times = measure_layer_times(model, sites, batch, precision=precision, round_to=round_to)
    _log.info("the dense model takes %.2f ms for a batch of %d", times.dense_ms, len(batch))
    return times


def latency_batch(config: RunConfig, model: nn.Module, example: Tensor) -> Tensor:
    """Return the batch to time: an evaluation batch on a GPU; on a CPU as many images as take about a second."""
    size = config.val_batch_size
    if config.latency_batch is not None:
        size = config.latency_batch
    elif example.device.type == "cpu":
        size = min(size, 32, max(1, _CPU_LATENCY_MACS // count_macs(model, example)))
    return example.repeat(size, 1, 1, 1)


def _check_removes(config: RunConfig, sites: Sequence[Site], target: Target, rules: Mapping[str, Any]) -> None:
    """Refuse settings under which nothing would go; how many channels go does not depend on their scores."""
    plan = neutral_plan(sites, keep_ratio=target.keep_ratio, **rules)
    asked = min(target.keep_ratio, config.attn_keep_ratio or 1.0)
    if asked < 1 and all(kept == total for kept, total in plan.widths.values()):
        raise InputError(
            f"keep_ratio {target.keep_ratio:g} with round_to {plan.round_to} and min_keep_ratio "
            f"{plan.min_keep_ratio} removes none of {plan.total} channels; lower keep_ratio or round_to"
        )


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
    with processes.local_main_first():
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
    """Return what all loaders of a run have in common."""
    return {"num_workers": config.num_workers, "prefetch": config.prefetch, "pin_memory": True}


def _found(config: RunConfig, processes: Processes) -> Found | None:
    """Find the checkpoint to go on from: the main process chooses, all read the same."""
    path = None
    if processes.is_main:
        path = find_checkpoint(
            config.resume, config.save_dir, config.to_dict(), overwrite=config.overwrite, restarted=restarts() > 0
        )
    path = processes.all_gather(path)[0]
    if path is None:
        return None
    _log.info("going on from %s", path)
    return Found(path, read_checkpoint(path))


def _check_space(config: RunConfig, processes: Processes, model: nn.Module) -> None:
    """See that the disk holds what a run writes at most."""
    if not processes.is_main:
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
    """Return what decides about the result: the configuration, and what it stands for here."""
    return config.to_dict() | {
        "device": device.type,
        "amp": precision.name,
        "world": processes.world,
        "local_rank": None,  # older launchers give each process its own
        "model": model_fingerprint(model),
        "train": train.fingerprint(),
        "val": val.fingerprint(),
    }
