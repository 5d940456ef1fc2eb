"""Prepare a run: model, sites, images, device, plan rules and budget, all checked before any work."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vbp.cost.target import BudgetTarget
from vbp.cost.timing import latency_batch
from vbp.data.data_path import check_data_path, class_folders, list_splits
from vbp.data.images import Images, balanced_subset
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import Preprocessing, evaluation_transform
from vbp.deploy.artifact import PrunedArtifact
from vbp.deploy.open_model import OpenedModel, open_model
from vbp.errors import InputError
from vbp.models.class_names import dataset_class_names
from vbp.models.classifier import Classifier
from vbp.models.split_attention import split_attention_
from vbp.pruning.make_plan import PlanRules, check_ratios
from vbp.pruning.plan import PruningPlan
from vbp.recipes.checks import check_without_labels
from vbp.recipes.config import PruneConfig, RunConfig
from vbp.recipes.options import ModelOptions
from vbp.recipes.planning import find_target, plan_rules, sites_of
from vbp.recipes.resume import check_same_settings, find_checkpoint
from vbp.refit.refits import Refits
from vbp.runtime.files import check_folder
from vbp.runtime.fingerprints import json_fingerprint, model_fingerprint
from vbp.runtime.precision import Precision, move_, set_matmul_precision
from vbp.runtime.processes import Processes, process_group, restarts
from vbp.runtime.session import Session
from vbp.runtime.signals import reading_processes
from vbp.sites.site import Site
from vbp.statistics.evidence import Need, data_fingerprint
from vbp.statistics.images import CalibrationImages, ImageSource, default_views
from vbp.statistics.objective import Objective
from vbp.statistics.statistics import Statistics
from vbp.statistics.text_embeddings import TextEmbeddings
from vbp.training.checkpoints import checked_content, read_checkpoint
from vbp.training.drop_path import check_drop_path
from vbp.training.memory import enable_gradient_checkpointing_
from vbp.training.optim import check_layer_decay
from vbp.training.retrieval import Embeddings, embed
from vbp.training.tensorboard import check_tracking
from vbp.training.tuning import check_tuning_images

_log = logging.getLogger(__name__)

# Every report has these, also where they took no time.
_STAGES = ("calibration", "planning", "surgery", "finetune", "evaluation")


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a run goes on from."""

    path: Path
    state: Mapping[str, Any]


@dataclass(frozen=True)
class PruneJob:
    """A dense model, its sites and calibration images, plan rules and budget, checked and ready to be pruned.

    `given_statistics` stand in the place of a calibration pass.
    """

    config: PruneConfig
    session: Session
    dense: nn.Module
    sites: tuple[Site, ...]
    plan_rules: PlanRules
    target: BudgetTarget
    calibration: ImageSource
    example: Tensor
    latency_batch: int
    given_statistics: Statistics | None
    objective: Objective

    @property
    def latency_images(self) -> Tensor:
        """Return the batch that is timed."""
        return self.example.repeat(self.latency_batch, 1, 1, 1)


@dataclass(frozen=True)
class Job(PruneJob):
    """Model, data and settings of a run, checked and ready; private to the recipes.

    `settings` must be the same when a checkpoint of this run is taken up again. The model may be a pruned one, which
    is the dense model of this run; then `artifact` is what it was read from. Without labels, or for a model that is
    no classifier, models are compared with `original`, the dense model unless another is named.
    """

    config: RunConfig
    calibration: CalibrationImages
    classifier: Classifier
    artifact: PrunedArtifact | None
    train: Images
    val: ImageLoader
    settings: Mapping[str, Any]
    resumed: Resumed | None
    labelled: bool = True
    original: nn.Module | None = None

    @cached_property
    def original_embeddings(self) -> Embeddings:
        """Return what the original model makes of the validation images, read once."""
        return self.embeddings(self.original or self.dense, "embedding")

    def embeddings(self, model: nn.Module, label: str) -> Embeddings:
        """Return what a model makes of the validation images; the same on every process."""
        session = self.session
        return embed(
            model, self.objective, session.progress(self.val, label), session.device,
            precision=session.precision, processes=session.processes,
        )  # fmt: skip

    def plans_with(self, plan: PruningPlan) -> tuple[PruningPlan, ...]:
        """Return the plans from the first dense model on, without one that removes nothing from a pruned model."""
        earlier = () if self.artifact is None else self.artifact.plans
        removes = any(kept < total for kept, total in plan.widths.values())
        return (*earlier, plan) if removes or not earlier else earlier


@contextmanager
def open_session(config: RunConfig) -> Iterator[Session]:
    """Join the processes of the job, and choose device and precision."""
    with process_group(config.device, config.timeout_minutes) as (processes, device), reading_processes():
        if config.processes not in (1, processes.world):
            raise InputError(
                f"processes must be left out, or as many as torchrun started, got {config.processes} in a job of "
                f"{processes.world}; the commands start them, a call of vbp.run does not"
            )
        yield Session(processes, device, Precision.choose(config.amp, device), dict.fromkeys(_STAGES, 0.0))


def prepare(config: RunConfig, session: Session, needs: Collection[Need] = ()) -> Job:
    """Check everything and load the model; nothing is written.

    Statistics from a file must hold what is needed of them.
    """
    processes, device = session.processes, session.device
    lowest = 1 if config.round_to == "auto" else config.round_to
    check_ratios(config.keep_ratio, config.min_keep_ratio, lowest, config.attn_keep_ratio)
    set_matmul_precision(config.matmul_precision)
    check_tracking(config.log_dir)
    check_data_path(config.data_path)
    text = None if config.text_embeddings is None else TextEmbeddings.load(config.text_embeddings)
    given = None if config.stats_path is None else Statistics.load(config.stats_path)
    resumed = _resumed(config, processes)
    with processes.local_main_first():
        opened = _open(config)
        classifier = opened.classifier
        classifies = classifier.num_classes > 0 and config.objective in ("auto", "logits")
        count, names = classifier.num_classes if classifies else 0, classifier.class_names
        train, val, labelled = list_splits(config.data_path, count, names)
        if not labelled:
            check_without_labels(config, needs, classifies=classifies)
        if names is None and labelled:  # then they are those of the data
            names = dataset_class_names(class_folders(config.data_path, count), count)
            classifier = replace(classifier, class_names=names)
    _check_space(config, processes, classifier.model)
    calibration = calibration_images(config, session, train, classifier.preprocessing)
    if config.tune != "off":
        check_tuning_images(len(calibration))
    model = move_(classifier.model, device)
    if config.bottleneck or config.shares_budget:
        split_attention_(model)
    settings = _settings(config, session, model, train, val)
    processes.check_same("model, images and settings", json_fingerprint(settings))
    if resumed is not None:
        with checked_content(resumed.path):
            saved = dict(resumed.state["settings"])
        check_same_settings(saved, settings, resumed.path)
    example = classifier.example_input().to(device)
    objective = Objective.choose(model, example, calibration, config.objective, text)
    _log.info("%s", objective.sentence())
    sites = sites_of(config, model, example)
    if given is not None and config.stats_path is not None:
        given.check_made_for(settings["model"], data_fingerprint(calibration, objective), config.stats_path)
        given.check_holds(
            sites, config.stats_path, covariance="covariance" in needs, sensitivity="sensitivity" in needs
        )
    check_drop_path(config.drop_path, model)
    check_layer_decay(config.layer_decay, model)
    rules = plan_rules(config, session, sites)
    batch = latency_batch(model, example, at_most=config.val_batch_size, size=config.latency_batch)
    target = find_target(config, session, model, sites, example, batch, rules, planned=resumed is not None)
    if config.grad_checkpointing:
        enable_gradient_checkpointing_(model)
    val_loader = make_loader(
        balanced_subset(val, config.limit_val, config.seed),
        evaluation_transform(classifier.preprocessing),
        batch_size=config.val_batch_size,
        **loader_options(config, processes),
    )
    return Job(
        config, session, model, sites, rules, target, calibration, example, batch, given, objective,
        classifier, opened.artifact, train, val_loader, settings, resumed, labelled,
    )  # fmt: skip


def calibration_images(
    config: RunConfig, session: Session, train: Images, preprocessing: Preprocessing
) -> CalibrationImages:
    """Return the training images from which statistics and refits are computed, chosen by the seed."""
    samples = 0 if config.calib_samples == "auto" else config.calib_samples
    return CalibrationImages(
        balanced_subset(train, samples, config.seed),
        preprocessing,
        session,
        seed=config.seed,
        batch_size=config.val_batch_size,
        num_workers=config.num_workers,
        prefetch=config.prefetch,
        hflip=config.hflip,
        crop_scale=config.crop_scale,
        max_pixels=config.max_pixels,
        views=config.calib_views,
    )


def make_refits(job: PruneJob) -> Refits | None:
    """Return what is refitted after surgery; without the refit at most BatchNorms, None where nothing is."""
    config, known = job.config, (job.dense, job.sites, job.example, job.calibration)
    if config.compensation != "refit":
        off: dict[str, Any] = dict.fromkeys(("kernels", "producers", "stream", "head"), "off")
        refits = Refits(*known, **off, batchnorm=config.batchnorm, objective=job.objective)
        return refits if refits.wanted else None
    views = config.refit_views
    if views == "auto":
        views = default_views(job.session.device) if isinstance(job.calibration, CalibrationImages) else 1
    return Refits(
        *known, kernels=config.refit_kernels, producers=config.refit_producers, stream=config.refit_stream,
        head=config.refit_head, batchnorm=config.batchnorm, views=views, keep_apart=config.tune != "off",
        objective=job.objective,
    )  # fmt: skip


def loader_options(config: RunConfig, processes: Processes) -> dict[str, Any]:
    """Return what the loaders of a run have in common."""
    share = {"rank": processes.rank, "world": processes.world}
    reading = {"num_workers": config.num_workers, "prefetch": config.prefetch, "max_pixels": config.max_pixels}
    return share | reading | {"pin_memory": True}


def _resumed(config: RunConfig, processes: Processes) -> Resumed | None:
    """Find the checkpoint to go on from: the main process chooses, all read the same."""
    find = partial(find_checkpoint, config.resume, config.save_dir, config.to_dict(), overwrite=config.overwrite)
    path = processes.from_main(partial(find, restarted=restarts() > 0))
    if path is None:
        return None
    _log.info("going on from %s", path)
    return Resumed(path, read_checkpoint(path))


def _check_space(config: RunConfig, processes: Processes, model: nn.Module) -> None:
    """Check that the disk has space for the most that a run writes."""
    if not processes.is_main:
        return
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    # Best, final and the folder, one more while one of them is replaced. A checkpoint holds weights, two moments, the
    # best weights and perhaps an average, and there are three of them for a moment.
    copies = 4 + (3 * 5 if config.epochs_ft > 0 else 0) + (3 * 6 if config.tune != "off" else 0)
    check_folder(config.save_dir, overwrite=True, needed_bytes=copies * size + 2**24)


def _open(config: RunConfig) -> OpenedModel:
    options = {field.name: getattr(config, field.name) for field in fields(ModelOptions)}
    del options["data_path"], options["allow_bad_dense"]
    name = options.pop("model_name")
    opened = open_model(name, **options)
    _log.info("model %s: %s; %s", name, opened.classifier.family, opened.classifier.preprocessing)
    if opened.plans:
        _log.info("it is pruned already: it is the dense model of this run, and shares are of the channels it has")
    return opened


def _settings(config: RunConfig, session: Session, model: nn.Module, train: Images, val: Images) -> dict[str, Any]:
    """Return what decides about the result: the configuration, and what it stands for here."""
    settings = config.to_dict() | {
        "device": session.device.type,
        "amp": session.precision.name,
        "world": session.processes.world,
        "local_rank": None,  # older launchers give each process its own
        "model": model_fingerprint(model),
        "train": train.fingerprint(),
        "val": val.fingerprint(),
    }
    if config.tune != "off":
        settings["tuning_amp"] = Precision.for_tuning(config.amp, session.device).name
    return settings
