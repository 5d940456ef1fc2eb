"""Resolve a timm model name: the architecture, its complete arguments, the record of its weights."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.models import get_pretrained_cfg, load_model_config_from_hf, split_model_name_tag

from vbp.errors import InputError
from vbp.models.classifier import cannot_fetch, hub_repository
from vbp.models.limits import check_description


@dataclass(frozen=True)
class Architecture:
    """A timm architecture by its name without tag, with the arguments of `create_model`.

    `requested` is the name by which timm finds the pretrained weights, `cfg` its record of them: sizes,
    normalisation, head.
    """

    requested: str
    name: str
    cfg: dict[str, Any]
    arguments: dict[str, Any]


def resolve(
    model_name: str, model_kwargs: Mapping[str, Any], img_size: int | None, *, without_network: bool
) -> Architecture:
    """Return what `model_name` stands for; a hub repository's configuration is fetched, unless `without_network`."""
    kwargs = _plain_arguments(model_kwargs)
    repository = hub_repository(model_name)
    if repository is not None and not without_network:
        requested = f"hf-hub:{repository}"
        try:
            cfg, name, own_arguments = load_model_config_from_hf(repository)
        except OSError as error:
            raise cannot_fetch(model_name, error) from error
        kwargs = {**_plain_arguments(own_arguments or {}), **kwargs}
        check_known(name)
    else:
        requested = model_name if repository is None else repository.partition("@")[0].rpartition("/")[2]
        name = split_model_name_tag(requested)[0]
        check_known(name)
        cfg = _registered_cfg(requested, name)
    arguments = {"in_chans": cfg.get("input_size", (3,))[0], **kwargs}
    if cfg.get("fixed_input_size"):
        size = kwargs.get("img_size")
        if img_size is not None and size not in (None, img_size, [img_size, img_size]):
            raise InputError(f"img_size is given twice: {img_size}, and {size} in the model arguments; give one")
        arguments["img_size"] = img_size or size or list(cfg["input_size"][-2:])
    return Architecture(requested, name, cfg, arguments)


def _plain_arguments(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(model_kwargs), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the model arguments must be numbers, texts, lists and tables, got {dict(model_kwargs)!r} ({error})"
        ) from error
    check_description(plain, "the model arguments")
    return plain


def check_known(name: str) -> None:
    """Stop if timm has no architecture `name` (without tag), and list close names."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        remedy = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names"
        raise InputError(
            f"model name must be a local folder, a Hugging Face id (OWNER/NAME) or a timm model, got {name[:200]!r}; "
            f"{remedy}"
        )


def _registered_cfg(requested: str, name: str) -> dict[str, Any]:
    try:
        cfg: Any = get_pretrained_cfg(requested)
    except RuntimeError as error:
        tags = ", ".join(timm.list_models(f"{name}.*", include_tags=True)) or "none"
        raise InputError(f"unknown tag in the model name {requested!r}; timm has {tags}") from error
    return {} if cfg is None else dict(cfg.to_dict())
