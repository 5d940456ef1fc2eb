"""What a run works on: model, sites, images and device, all checked before any work."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vbp.config import RunConfig, check_config
from vbp.data import ImageList, ImageLoader, balanced_subset, list_images, make_loader
from vbp.distillation import DistillationLoss
from vbp.distributed import check_single_process
from vbp.errors import InputError
from vbp.files import check_folder
from vbp.fingerprints import json_fingerprint, model_fingerprint
from vbp.models import Classifier, load_classifier
from vbp.plan import PruningPlan
from vbp.planning import check_ratios, make_plan
from vbp.preprocessing import evaluation_transform
from vbp.sites import Site, find_sites
from vbp.statistics import Statistics
from vbp.surgery import check_prunable

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a run works on, checked and ready."""

    config: RunConfig
    device: torch.device
    classifier: Classifier
    sites: tuple[Site, ...]
    calibration: ImageList
    train: ImageList
    val: ImageLoader
    example: Tensor
    data: str  # fingerprint of the calibration images and their preprocessing
    given: Statistics | None
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
        self.seconds[stage] += time.perf_counter() - start


def prepare(config: RunConfig) -> Job:
    """Check everything and load the model; nothing is written."""
    check_config(config)
    check_ratios(config.keep_ratio, config.min_keep_ratio, config.round_to, config.attn_keep_ratio)
    DistillationLoss(config.kd_alpha, config.kd_beta, config.kd_T)
    check_single_process()
    device = _device(config.device)
    _check_data_path(config.data_path)
    given = None if config.stats_path is None else Statistics.load(config.stats_path)
    check_folder(config.save_dir, overwrite=config.overwrite, needed_bytes=0)
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
    size = sum(value.numel() * value.element_size() for value in classifier.model.state_dict().values())
    # Two checkpoints, one more while one of them is replaced, and the small files.
    check_folder(config.save_dir, overwrite=config.overwrite, needed_bytes=3 * size + 2**24)
    train = list_images(config.data_path, "train", classifier.num_classes)
    val = list_images(config.data_path, "val", classifier.num_classes)
    calibration = balanced_subset(train, config.calib_samples, config.seed)
    data = json_fingerprint([calibration.fingerprint(), classifier.preprocessing.to_dict()])
    if given is not None and config.stats_path is not None:
        given.check_made_for(model_fingerprint(classifier.model), data, config.stats_path)
    model = classifier.model.to(device)
    example = classifier.example_input().to(device)
    sites = find_sites(model, example, attention=config.bottleneck)
    if given is not None and config.stats_path is not None:
        given.check_holds(sites, config.stats_path)
    check_prunable(model, sites, example)
    _check_removes(config, sites)
    val_loader = evaluation_loader(classifier, balanced_subset(val, config.limit_val, config.seed), config)
    return Job(config, device, classifier, sites, calibration, train, val_loader, example, data, given)


def _check_data_path(data_path: Path) -> None:
    """Find out before a model is loaded whether there are images; a list of samples needs no folder beside it."""
    for split in ("train", "val"):
        if not (data_path / split).is_dir() and not (data_path / f"{split}_samples.pkl").is_file():
            missing = data_path / split if data_path.is_dir() else data_path
            raise InputError(f"data_path must hold train/<class>/ and val/<class>/, got no folder {missing}")


def plan_of(config: RunConfig, sites: Sequence[Site], scores: Mapping[str, Tensor]) -> PruningPlan:
    """Make the plan that a configuration asks for."""
    return make_plan(
        sites,
        scores,
        keep_ratio=config.keep_ratio,
        scope="global" if config.global_pruning else "per_layer",
        round_to=config.round_to,
        min_keep_ratio=config.min_keep_ratio,
        attn_keep_ratio=config.attn_keep_ratio,
    )


def _check_removes(config: RunConfig, sites: Sequence[Site]) -> None:
    """Refuse settings under which nothing would go; how many channels go does not depend on their scores."""
    plan = plan_of(config, sites, {site.name: torch.zeros(site.hidden) for site in sites})
    asked = min(config.keep_ratio, config.attn_keep_ratio or 1.0)
    if asked < 1 and all(kept == total for kept, total in plan.widths.values()):
        raise InputError(
            f"keep_ratio {config.keep_ratio} with round_to {config.round_to} and min_keep_ratio "
            f"{config.min_keep_ratio} removes none of {plan.total} channels; lower keep_ratio or round_to"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N and present, got {name!r} ({error})") from error
    return device


def evaluation_loader(classifier: Classifier, images: ImageList, config: RunConfig) -> ImageLoader:
    return make_loader(
        images,
        evaluation_transform(classifier.preprocessing),
        batch_size=config.val_batch_size,
        num_workers=config.num_workers,
        pin_memory=True,
    )
