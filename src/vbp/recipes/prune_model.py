"""Prune any model in one call: the same steps as a run, on images that a caller has, with nothing written."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from vbp.cost.budget import Budget
from vbp.cost.macs import PlanCost, count_macs, count_parameters
from vbp.cost.timing import latency_batch
from vbp.errors import InputError
from vbp.models.classifier import Classifier
from vbp.models.split_attention import with_split_attention
from vbp.pruning.make_plan import check_ratios
from vbp.recipes.checks import check_pruning
from vbp.recipes.config import PruneConfig
from vbp.recipes.planning import find_target, plan_rules, sites_of
from vbp.recipes.prune import prune_copy
from vbp.recipes.setup import PruneJob, make_refits
from vbp.report.prune_result import PruneResult
from vbp.runtime.choices import Compensation, Criterion
from vbp.runtime.decode import from_json, to_json
from vbp.runtime.forward import copy_model
from vbp.runtime.precision import Precision
from vbp.runtime.session import Session
from vbp.statistics.batches import check_repeatable, images_for, part_of, pixels_of
from vbp.statistics.images import GivenImages
from vbp.statistics.objective import Objective
from vbp.statistics.stream_target import StreamTarget
from vbp.statistics.text_embeddings import TextEmbeddings
from vbp.training.evaluate import Accuracy, evaluate
from vbp.training.retrieval import Retrieval, compare_embeddings, embed
from vbp.training.tuning import Tuner, TunerSettings, check_tuning_images
from vbp.training.tuning_length import TuningLength
from vbp.training.tuning_report import TuningReport

_log = logging.getLogger(__name__)

# They are of runs: from a file, from images that are prepared in several ways, for the exit code.
_OF_RUNS: Final = ("stats_path", "calib_views", "refit_views", "best_effort")

# Images in the batch by which a GPU is timed, as in a run.
_GPU_BATCH: Final = 128

# What a result takes over from a classifier.
_OF_CLASSIFIERS: Final = ("source", "preprocessing", "class_names")


def prune(
    model: nn.Module | Classifier,
    images: Iterable[Any],
    *,
    keep_ratio: float | None = None,
    target_macs: float | str | None = None,
    target_params: float | str | None = None,
    target_latency_ms: float | None = None,
    target_speedup: float | None = None,
    criterion: Criterion = "auto",
    compensation: Compensation = "refit",
    val: Iterable[Any] | None = None,
    calib_samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> PruneResult:
    """Return a smaller copy of a trained image model; the model itself is left as it was.

    No labels are needed, and nothing is trained unless `tune` asks for it: statistics on a few images say which
    channels go, and what stays is refitted to predict what they contributed. `vbp.run` prunes by the same steps.

    Args:
        model: Any classifier, or a model that returns features, on any device; or what `load_classifier` returned:
            then the result says how its dense model is built, and `load_pruned` needs nothing but the path.
        images: Calibration images, prepared as for evaluation, in batches as `pixels_of` takes them: a list, a
            loader, a generator. Some hundred or more, of all classes and in no order; they are read once, and kept
            in memory.
        keep_ratio: Share of the hidden channels to keep, in (0, 1]; 0.65 unless a target is given.
        target_macs: In its place: MACs of one image, as 0.6 of the dense model's, `60%`, or `0.94G`.
        target_params: In its place: parameters, likewise.
        target_latency_ms: In its place: milliseconds of a batch on the model's device.
        target_speedup: In its place: how many times as fast as the dense model there, above 1.
        criterion: Which channels go.
        compensation: What stands in for them.
        val: Labelled images, in batches: accuracy of both models is measured on them; of a model that returns
            features how alike both see them, and labels are not needed.
        calib_samples: So many images are read, the first ones; 0 takes all.
        seed: Of sampled tokens and of the random criterion.
        progress: Show progress bars in a terminal or notebook.
        **settings: Further ones of `PruneConfig`, as `round_to=8` or `bottleneck=True`. With `tune=8` or `tune="5m"`
            the pruned model is trained so long to predict what the dense one does, without labels.

    Raises:
        InputError: A setting is unknown or out of range, the model cannot meet it, or the images do not fit.

    Example:
        >>> result = vbp.prune(model, [images], keep_ratio=0.5)
        >>> result.plan.kept, result.plan.total
        (128, 256)
        >>> result.save(folder / "pruned")
    """
    budgets = {
        "keep_ratio": keep_ratio,
        "target_macs": target_macs,
        "target_params": target_params,
        "target_latency_ms": target_latency_ms,
        "target_speedup": target_speedup,
    }
    config = _config(budgets, {"criterion": criterion, "compensation": compensation, **settings})
    dense = model.model if isinstance(model, Classifier) else model
    dense = with_split_attention(dense) if config.bottleneck or config.shares_budget else dense
    if val is not None:
        check_repeatable(val)
    job = _prepare(config, dense, _read(images, calib_samples, config), seed, _bars(progress))
    refits = make_refits(job)
    classifies = job.objective.kind == "logits"
    before = _accuracy(job, dense, val if classifies else None, "dense")
    pruned = prune_copy(job, refits)
    pruned.model.eval()
    untuned = _accuracy(job, pruned.model, val if classifies else None, "pruned")
    tuning = _tune(job, pruned.model)
    return PruneResult(
        pruned.model,
        pruned.plan,
        PlanCost(
            (count_macs(dense, job.example), count_macs(pruned.model, job.example)),
            (count_parameters(dense), count_parameters(pruned.model)),
        ),
        pruned.budget,
        pruned.images,
        before,
        _accuracy(job, pruned.model, val if classifies else None, "tuned") if tuning else untuned,
        _retrieval(job, pruned.model, None if classifies else val),
        job.objective.sentence(),
        pruned.choice.tried,
        pruned.refits,
        dict(job.session.seconds),
        {**_changed(config), "calib_samples": calib_samples, "seed": seed},
        untuned_accuracy=untuned if tuning else None,
        tuning=tuning,
        **({name: getattr(model, name) for name in _OF_CLASSIFIERS} if isinstance(model, Classifier) else {}),
    )


def _config(budgets: Mapping[str, Any], settings: Mapping[str, Any]) -> PruneConfig:
    """Return the checked settings of a pruning."""
    allowed = [each.name for each in dataclasses.fields(PruneConfig) if each.name not in (*_OF_RUNS, *budgets)]
    if unknown := sorted(set(settings) - set(allowed)):
        raise InputError(f"prune has no setting {', '.join(unknown)}; allowed are {', '.join(allowed)}")
    budget = {name: value for name, value in budgets.items() if value is not None}
    shares = ("target_macs", "target_params")  # text, as on a command line
    values = {name: str(value) if name in shares else value for name, value in {**budget, **settings}.items()}
    config = from_json(
        PruneConfig, to_json(values), "the settings of prune", "see PruneConfig",
        use_defaults=True, wrong="are wrong: they",
    )  # fmt: skip
    Budget.of(**(budget or {"keep_ratio": config.keep_ratio}))
    lowest = 1 if config.round_to == "auto" else config.round_to
    check_ratios(config.keep_ratio, config.min_keep_ratio, lowest, config.attn_keep_ratio)
    check_pruning(config)
    return config


def _read(images: Iterable[Any], count: int, config: PruneConfig) -> list[Any]:
    """Read the first images, with labels where the criterion needs them."""
    if count < 0:
        raise InputError(f"calib_samples must be at least 0, got {count}; 1000 is usual, 0 takes all")
    left, kept = count or sys.maxsize, list[Any]()
    for batch in [images] if isinstance(images, Tensor) else images:
        kept.append(part_of(batch, 0, left, labels="gradients" in config.needs))
        left -= len(pixels_of(kept[-1]))
        if left <= 0:
            break
    if not sum(len(pixels_of(batch)) for batch in kept):
        raise InputError("images must hold at least one image, got none; give some hundred, in batches")
    return kept


def _prepare(config: PruneConfig, dense: nn.Module, batches: list[Any], seed: int, bars: bool | None) -> PruneJob:
    """Find the sites and check what the model can meet."""
    like = next(images_for(dense, batches))[:1]
    session = Session(device=like.device, bars=bars)
    # Noise: all tokens of a blank image are equal.
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    example = noise.to(like)
    sites = sites_of(config, dense, example)
    rules = plan_rules(config, session, sites)
    batch = latency_batch(dense, example, at_most=_GPU_BATCH, size=config.latency_batch)
    target = find_target(config, session, dense, sites, example, batch, rules)
    given = GivenImages(batches, session, seed)
    if config.tune != "off":
        check_tuning_images(len(given))
    text = None if config.text_embeddings is None else TextEmbeddings.load(config.text_embeddings)
    objective = Objective.choose(dense, like, given, config.objective, text)
    if objective.kind == "features" and "gradients" in config.needs:
        raise InputError(
            f"the criterion {config.criterion} ranks by labels, got a model that is preserved by its features; "
            "choose one that needs none, as auto"
        )
    _log.info("%s", objective.sentence())
    return PruneJob(config, session, dense, sites, rules, target, given, example, batch, None, objective)


def _tune(job: PruneJob, pruned: nn.Module) -> TuningReport | None:
    """Tune a pruned model in place if that is asked for; the dense one stays as it was."""
    length = TuningLength.of(job.config.tune)
    if length is None:
        return None
    images = job.calibration
    precision = Precision.for_tuning("auto", job.session.device)
    with job.session.timed("tune"):
        # A copy teaches: training brings its layout in memory to what suits the device.
        settings = TunerSettings(length)
        dense = copy_model(job.dense)
        stream = StreamTarget.find(dense, pruned, job.sites, job.example, images)
        tuner = Tuner(pruned, dense, images, settings, precision=precision, objective=job.objective, stream=stream)
        return tuner.tune_()


def _accuracy(job: PruneJob, model: nn.Module, val: Iterable[Any] | None, label: str) -> Accuracy | None:
    if val is None:
        return None
    with job.session.timed("evaluation"):
        return evaluate(model, job.session.progress(val, label), job.session.device)


def _retrieval(job: PruneJob, pruned: nn.Module, val: Iterable[Any] | None) -> Retrieval | None:
    if val is None:
        return None
    with job.session.timed("evaluation"):
        both = (
            embed(model, job.objective, job.session.progress(val, label), job.session.device)
            for model, label in ((job.dense, "dense"), (pruned, "pruned"))
        )
        return compare_embeddings(*both)


def _bars(progress: bool) -> bool | None:
    """Return whether a session shows bars: a notebook shows what it is told to, a terminal by itself."""
    if not progress:
        return False
    return True if "ipykernel" in sys.modules else None


def _changed(config: PruneConfig) -> dict[str, Any]:
    """Return what is not as by default, and the method."""
    values = to_json(config)
    return {
        name: value
        for name, value in values.items()
        if name in ("criterion", "compensation") or value != to_json(getattr(PruneConfig, name))
    }
