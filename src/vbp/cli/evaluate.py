"""The jobs of `vbp eval` and `vbp predict`: accuracy on labelled images, and the classes of single files."""

from __future__ import annotations

import logging

import torch
from torch import nn

from vbp.cli.options import EvalConfig, PredictConfig
from vbp.data.data_path import check_data_path, list_images
from vbp.data.decoding import read_image
from vbp.data.images import balanced_subset
from vbp.data.loader import make_loader
from vbp.data.preprocessing import evaluation_transform
from vbp.deploy.open_model import is_pruned, open_dense, open_model
from vbp.errors import InputError
from vbp.models.classifier import Classifier, check_has_head
from vbp.report.evaluation import EvaluationReport, Prediction, Predictions
from vbp.runtime.files import write_json
from vbp.runtime.forward import logits_of
from vbp.runtime.precision import Precision, move_
from vbp.runtime.processes import Processes, device_of
from vbp.runtime.session import Session
from vbp.training.evaluate import compare_predictions, evaluate

_log = logging.getLogger(__name__)


def run_eval(config: EvalConfig) -> EvaluationReport:
    """Measure the accuracy of a model, pruned or not, and where it agrees with its dense model."""
    if config.output is not None and not config.output.parent.is_dir():
        raise InputError(f"output must lie in an existing folder, got {config.output}; create {config.output.parent}")
    device = device_of(config.device, Processes())
    check_data_path(config.data_path)
    opened = open_model(config.model, checkpoint=config.checkpoint)
    classifier = opened.classifier
    check_has_head(classifier, "vbp eval")
    dense = None if config.dense is None else _dense(config, classifier)
    images = list_images(config.data_path, "val", classifier.num_classes, classifier.class_names)
    loader = make_loader(
        balanced_subset(images, config.limit_val, config.seed),
        evaluation_transform(classifier.preprocessing),
        batch_size=config.val_batch_size,
        num_workers=config.num_workers,
        max_pixels=config.max_pixels,
    )
    session = Session(device=device, precision=Precision.choose(config.amp, device))
    batches, model = session.progress(loader, "evaluation"), move_(classifier.model, device)
    if dense is None:
        accuracy = evaluate(model, batches, device, precision=session.precision)
        report = EvaluationReport(config.model, accuracy, class_names=classifier.class_names)
    else:
        own, accuracy, agreement = compare_predictions(
            move_(dense, device), model, batches, device, precision=session.precision
        )
        report = EvaluationReport(config.model, accuracy, own, agreement, classifier.class_names)
    if config.output is not None:
        write_json(config.output, report.to_dict())
    return report


def _dense(config: EvalConfig, pruned: Classifier) -> nn.Module:
    """Load the dense model of a comparison, which takes the same images."""
    if config.dense == "auto" and not is_pruned(config.model):
        raise InputError(f"dense auto is for pruned models, got {config.model}; name the model to compare it with")
    dense = open_dense(config.model) if config.dense == "auto" else open_model(str(config.dense)).classifier
    if dense.preprocessing != pruned.preprocessing:
        raise InputError(
            f"both models must take the same images, got {dense.preprocessing} and {pruned.preprocessing}; evaluate "
            "each by itself"
        )
    return dense.model


def run_predict(config: PredictConfig) -> Predictions:
    """Return the most likely classes of image files."""
    if config.top < 1:
        raise InputError(f"top must be at least 1, got {config.top}; 5 is usual")
    classifier = open_model(config.model, checkpoint=config.checkpoint).classifier
    check_has_head(classifier, "vbp predict")
    transform = evaluation_transform(classifier.preprocessing)
    names = classifier.class_names
    if names is None:
        _log.warning("%s does not say what its classes are called; they are numbers", config.model)
        names = tuple(map(str, range(classifier.num_classes)))
    predictions = []
    for path in config.images:
        pixels = transform(read_image(path, config.max_pixels))[None]
        with torch.inference_mode():
            shares = logits_of(classifier.model(pixels))[0].softmax(0)
        best = shares.topk(min(config.top, len(shares)))
        predictions.append(
            Prediction(str(path), tuple(names[place] for place in best.indices.tolist()), tuple(best.values.tolist()))
        )
    return Predictions(tuple(predictions))
