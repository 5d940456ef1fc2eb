"""The job of `vbp inspect`: what can be pruned in a model or artefact, and what it costs."""

from __future__ import annotations

from vbp.cli.options import InspectConfig
from vbp.cost.inspection import Inspection, inspect_model
from vbp.deploy.artifact import load_pruned, read_artifact
from vbp.deploy.open_model import is_pruned
from vbp.errors import InputError
from vbp.models.load import load_classifier
from vbp.models.split_attention import split_attention_
from vbp.pruning.plan import PruningPlan


def run_inspect(config: InspectConfig) -> Inspection:
    """Return the sites of a model or artefact, and what they cost."""
    plans: tuple[PruningPlan, ...] = ()
    if not is_pruned(config.model):
        classifier = load_classifier(config.model, allow_random_init=True)
        model, image = classifier.model, classifier.example_input()
    else:
        artifact = read_artifact(config.model)
        if artifact.preprocessing is None:
            raise InputError(
                f"{config.model} does not say which images it takes; inspect it in Python: vbp.inspect_model"
            )
        image = artifact.preprocessing.example_input()
        model, plans = load_pruned(config.model), artifact.plans
    split_attention_(model)  # as a run to a budget does
    return inspect_model(
        model, image, attention=config.attention, convolutions=config.convolutions, include=config.include,
        exclude=config.exclude, plans=plans,
    )  # fmt: skip
