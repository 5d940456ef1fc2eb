"""The job of `vbp inspect`: what can be pruned in a model or artefact, and what it costs."""

from __future__ import annotations

from pathlib import Path

import torch

from vbp.cli.options import InspectConfig
from vbp.cost.inspection import Inspection, inspect_model
from vbp.deploy.artifact import load_pruned, read_artifact
from vbp.deploy.artifact_files import MANIFEST
from vbp.deploy.hub import is_reference
from vbp.errors import InputError
from vbp.models.load import load_classifier


def run_inspect(config: InspectConfig) -> Inspection:
    """Return the sites of a model or artefact, and what they cost."""
    place = Path(config.model)
    if not (is_reference(config.model) or place.suffix == ".pth" or (place / MANIFEST).is_file()):
        classifier = load_classifier(config.model, allow_random_init=True)
        return inspect_model(
            classifier.model, classifier.example_input(), attention=config.attention, convolutions=config.convolutions
        )
    artifact = read_artifact(config.model)
    if artifact.preprocessing is None:
        raise InputError(
            f"{config.model} does not say which images it takes; inspect it in Python: vbp.inspect_model"
        )
    image = torch.zeros(1, len(artifact.preprocessing.mean), *artifact.preprocessing.img_size)
    return inspect_model(
        load_pruned(config.model),
        image,
        attention=config.attention,
        convolutions=config.convolutions,
        plans=artifact.plans,
    )
