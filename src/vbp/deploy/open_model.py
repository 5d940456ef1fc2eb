"""Open a model by its name, pruned or not, and the dense one that a pruned model was made from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vbp.deploy.artifact import PrunedArtifact, load_pruned, read_artifact
from vbp.deploy.artifact_files import ARTIFACT, MANIFEST, RUN_CONFIG, model_in
from vbp.deploy.hub import is_reference
from vbp.errors import InputError, one_line
from vbp.models.classifier import Classifier, check_family, check_takes_images
from vbp.models.load import family_of, load_classifier
from vbp.pruning.plan import PruningPlan
from vbp.runtime.choices import ModelType
from vbp.runtime.decode import read_json
from vbp.runtime.forward import logits_of

# What says how images are prepared; all else describes weights, which a pruned model has.
_PREPROCESSING: Final = ("img_size", "crop_pct", "interpolation", "mean", "std")


@dataclass(frozen=True)
class OpenedModel:
    """A classifier, and the artefact that it was read from; None for a dense model."""

    classifier: Classifier
    artifact: PrunedArtifact | None = None

    @property
    def plans(self) -> tuple[PruningPlan, ...]:
        """Return the plans by which it was pruned."""
        return () if self.artifact is None else self.artifact.plans


def is_pruned(name: str) -> bool:
    """Return whether this means a pruned model: a folder or file that vbp wrote, or `hf://USER/REPO`."""
    place = Path(name)
    return is_reference(name) or place.suffix == ".pth" or (place.is_dir() and (model_in(place) / MANIFEST).is_file())


def open_model(name: str, *, model_type: ModelType = "auto", **options: Any) -> OpenedModel:
    """Open a pruned model that vbp saved, or the folder of a run, or else what `load_classifier` takes.

    `options` are those of `load_classifier`; of them a pruned model takes the preprocessing alone.

    Raises:
        InputError: As `load_classifier` and `load_pruned`; or options that a pruned model has no use for.
    """
    if not is_pruned(name):
        return OpenedModel(load_classifier(name, model_type=model_type, **options))
    if idle := [option for option, value in options.items() if value and option not in _PREPROCESSING]:
        raise InputError(
            f"{', '.join(idle)} are for dense models, got them with the pruned model {name}, which has its own "
            "weights; leave them out"
        )
    artifact = read_artifact(name)
    if artifact.source is None or artifact.preprocessing is None:
        raise InputError(
            f"{name} does not say how its dense model is built or which images it takes; load it in Python: "
            "vbp.load_pruned(path, model=fresh_dense_model)"
        )
    # In float32, as all classifiers are.
    model = load_pruned(name).float()
    given = {option: value for option, value in options.items() if option in _PREPROCESSING}
    preprocessing, family = artifact.preprocessing.override(**given), family_of(model, artifact.source)
    check_family(name, model_type, family)
    classes = 0
    if artifact.source.has_head:
        classes = logits_of(model(artifact.preprocessing.example_input())).shape[1]
    classifier = Classifier(model, artifact.source, preprocessing, classes, family, artifact.class_names)
    check_takes_images(classifier)
    return OpenedModel(classifier, artifact)


def open_dense(name: str) -> Classifier:
    """Load the dense model that a pruned one was made from, with its weights.

    The settings of the run say which that was: those beside the pruned model, or else those in it.

    Raises:
        InputError: It is not known, or cannot be loaded.
    """
    options = _made_from(name)
    dense = str(options.pop("model_name"))
    if is_pruned(dense):
        return open_dense(dense)  # it was pruned twice
    if options.get("allow_random_init") and not (options.get("checkpoint") or options.get("convnext_checkpoint")):
        raise InputError(
            f"the run of {name} began with random weights of {dense}, which are not kept; name a dense model"
        )
    return load_classifier(dense, **options)


def _made_from(name: str) -> dict[str, Any]:
    """Return the arguments of `load_classifier` for the model that a run began with."""
    known = inspect.signature(load_classifier).parameters
    if not is_reference(name):
        place = model_in(Path(name))
        run = place.parent if place.name == ARTIFACT or place.is_file() else place
        if (run / RUN_CONFIG).is_file():
            try:
                values = read_json(run / RUN_CONFIG)
                return {key: values[key] for key in known if key in values} | {"model_name": values["model_name"]}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{run / RUN_CONFIG} cannot be read ({one_line(error)}); name a dense model"
                ) from error
    settings = read_artifact(name).settings or {}
    if "model_name" not in settings:
        raise InputError(
            f"{name} does not say which dense model it was made from; name one, as a timm or Hugging Face name"
        )
    return {"model_name": settings["model_name"]}
