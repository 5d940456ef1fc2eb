"""Publish a pruned model on the Hugging Face hub, with a model card that says what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from vbp.deploy.artifact import PrunedArtifact, read_artifact
from vbp.deploy.artifact_files import MANIFEST, WEIGHTS, model_in, read_manifest, weights_path
from vbp.deploy.hub import publish
from vbp.errors import InputError
from vbp.runtime.files import text_bytes
from vbp.runtime.tables import markdown_table, with_error

CARD = "README.md"
_ACCURACY = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
PAPER = "https://arxiv.org/abs/2507.12988"


def push_to_hub(
    folder: Path | str,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
    message: str = "Upload a pruned model",
) -> str:
    """Upload the folder of a pruned model in one commit; `load_pruned("hf://USER/REPO")` reads it back.

    The weights and `vbp.json` go up, and the folder's own `README.md`, or a model card if it has none; nothing else.

    Args:
        folder: Written by `save_pruned`; checked before anything is sent.
        repository: `USER/REPO`, made if it is not there. The client's own login is used (`hf auth login`, HF_TOKEN).
        private: Make a new repository private.
        revision: A branch that exists; by default the main one.
        base_model: Hub id of the dense model, for the card.
        license: For the card, such as `apache-2.0`.
        dataset: What the accuracy was measured on, for the card, such as `imagenet-1k`.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: The folder is no whole pruned model, or nobody is logged in who may write there.
        OutputError: The hub cannot be reached.

    Example:
        >>> address = vbp.push_to_hub(saved, "me/tiny")  # vbp.load_pruned("hf://me/tiny") reads it back
    """
    place = model_in(Path(folder))
    if not place.is_dir():
        raise InputError(
            f"the hub takes the folder of a pruned model, got {folder}; write one with save_pruned(model, FOLDER)"
        )
    weights, manifest, card = weights_path(place, read_manifest(place)), place / MANIFEST, place / CARD
    links = [file.name for file in (weights, manifest, card) if file.is_symlink()]
    if links:
        raise InputError(f"files for the hub must lie in {place} themselves, got a link: {links[0]}; copy it there")
    artifact = read_artifact(place)
    text: Path | bytes = card
    if not card.is_file():
        facts = {"base_model": base_model, "license": license, "dataset": dataset}
        text = text_bytes(model_card(artifact, repository, **facts))
    content: dict[str, Path | bytes] = {WEIGHTS: weights, MANIFEST: manifest, CARD: text}
    return publish(content, repository, private=private, revision=revision, message=message)


def model_card(
    artifact: PrunedArtifact,
    repository: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
) -> str:
    """Write the page of a model on the hub: what it is, what was measured, how it is loaded.

    Args:
        artifact: Its metrics go into the page: numbers by name, or tables of them (`dense`, `pruned`, ...) by name.
        repository: `USER/REPO`.
        base_model: Hub id of the dense model.
        license: Such as `apache-2.0`.
        dataset: What the accuracy was measured on.

    Example:
        >>> text = vbp.model_card(vbp.read_artifact(saved), "me/tiny", license="apache-2.0")
    """
    name = repository.rpartition("/")[2]
    metrics = artifact.metrics or {}
    results = [
        EvalResult("image-classification", dataset, dataset, key, metrics[key], metric_name=label)
        for key, label in _ACCURACY.items()
        if dataset is not None and _is_number(metrics.get(key))
    ]
    headless = artifact.source is not None and not artifact.source.has_head
    data = ModelCardData(
        base_model=base_model,
        license=license,
        library_name="vbp-pruning",
        pipeline_tag="image-feature-extraction" if headless else "image-classification",
        tags=["pruning", "variance-based-pruning"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    settings = [[f"`{key}`", str(value)] for key, value in (artifact.settings or {}).items()]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = (files("vbp.deploy") / "assets" / "model_card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        data=data.to_yaml(),
        name=name,
        paper=PAPER,
        repository=repository,
        source=artifact.source,
        plans=artifact.plans,
        preprocessing=artifact.preprocessing,
        measured=_measured(metrics),
        settings=markdown_table(["setting", "value"], settings) if settings else "",
        channels=markdown_table(["site", "kept", "of"], _channels(artifact)) if artifact.plans else "",
    )


def _measured(metrics: Mapping[str, Any]) -> list[str]:
    """Return the measured numbers as tables: single ones, and one row for each model that was measured."""
    single = [[key, _text(metrics, key)] for key, value in metrics.items() if _is_number(value)]
    models = {
        key: {inner: number for inner, number in value.items() if _is_number(number)}
        for key, value in metrics.items()
        if isinstance(value, Mapping)
    }
    columns = list(dict.fromkeys(inner for numbers in models.values() for inner in numbers))
    rows = [
        [key, *(_text(numbers, name) if name in numbers else "" for name in columns)]
        for key, numbers in models.items()
        if numbers
    ]
    tables = [(["", "value"], single), (["", *columns], rows)]
    return [markdown_table(heading, rows) for heading, rows in tables if rows]


def _channels(artifact: PrunedArtifact) -> list[list[str]]:
    dense: dict[str, int] = {}
    kept: dict[str, int] = {}
    for plan in artifact.plans:
        for name, (left, total) in plan.widths.items():
            dense.setdefault(name, total)
            kept[name] = left
    return [[f"`{name}`", str(kept[name]), str(total)] for name, total in dense.items()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(numbers: Mapping[str, Any], name: str) -> str:
    """Return one of the numbers of a model, an accuracy with its standard error if the number of images is there."""
    value, images = numbers[name], numbers.get("images")
    if name in _ACCURACY:
        return with_error(value, images if isinstance(images, int) else None)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
