"""Load classifiers of transformers from a local folder or the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vbp.errors import InputError, one_line, some_of
from vbp.models.class_names import huggingface_class_names
from vbp.models.classifier import Classifier, Family, ModelSource, cannot_fetch, check_family
from vbp.models.huggingface_processor import LOADING_ERRORS, processor_preprocessing
from vbp.models.limits import ANY, Limits, bounded_construction, check_description
from vbp.models.weights import describe_mismatch
from vbp.runtime.choices import ModelType
from vbp.runtime.decode import read_json
from vbp.runtime.files import is_regular
from vbp.runtime.sealed import READING_ERRORS, check_plain

_log = logging.getLogger(__name__)

FAMILIES: dict[str, Family] = {
    "vit": "vit",
    "deit": "vit",
    "convnext": "convnext",
    "convnextv2": "convnext",
    "swin": "swin",
    "swinv2": "swin",
}

# Saved with some backbones, but no part of a classifier's weights.
HARMLESS = ("pooler.", "relative_position_index", "relative_coords_table", "position_ids")

# The image tower of each model of images and text, and what its weights are saved with.
_TOWERS = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel"}
_OTHERS = (*HARMLESS, "text_model.", "text_projection.", "logit_scale", "logit_bias")

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_huggingface(
    model_name: str, allow_random_init: bool, overrides: Mapping[str, Any], model_type: ModelType
) -> Classifier:
    """Load a transformers classifier; its family is checked before any weight is read or fetched."""
    config = _config(model_name)
    family = FAMILIES.get(config.model_type, "other")
    check_family(model_name, model_type, family)
    preprocessing = processor_preprocessing(model_name, overrides)
    folder = Path(model_name)
    # Whoever allows random weights wants a head.
    headless = "" if allow_random_init else headless_class(config)
    if folder.is_dir() and not any((folder / name).is_file() for name in WEIGHT_FILES):
        if not allow_random_init:
            raise InputError(
                f"the folder {model_name} holds no weights, one of {', '.join(WEIGHT_FILES)} is needed; "
                "--allow_random_init starts from random weights"
            )
        _log.warning("%s starts from random weights: the folder holds none", model_name)
        model = _from_config(config)
    else:
        if folder.is_dir():  # transformers would build what its files do not hold, too
            held = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
            with torch.device("meta"):
                _build(config, headless, Limits(elements=held + 2**22))
        model = _with_weights(model_name, headless, allow_random_init)
    source = ModelSource("transformers", type(model).__name__, _arguments(model))
    if headless:
        _log.info("%s has no head: it returns features", model_name)
        return Classifier(model.eval(), source, preprocessing, 0, family)
    names = huggingface_class_names(source.arguments)
    return Classifier(model.eval(), source, preprocessing, int(config.num_labels), family, names)


def build_huggingface(source: ModelSource, limits: Limits) -> nn.Module:
    """Build the untrained architecture of `source`, in evaluation mode and float32, within limits."""
    check_description(source.arguments, f"the configuration of {source.name}")
    from transformers import CONFIG_MAPPING  # slow to import, and not needed for timm's models

    try:
        # Where one configuration has several classifiers (DeiT), transformers asks the architectures which is meant.
        arguments = {**source.arguments, "architectures": [source.name]}
        config = CONFIG_MAPPING[source.arguments["model_type"]].from_dict(arguments)
    except (*LOADING_ERRORS, ImportError) as error:
        raise InputError(
            f"transformers cannot read the configuration of {source.name}: {one_line(error)}; install the "
            f"version that it was saved with ({source.arguments.get('transformers_version', 'unknown')})"
        ) from error
    model = _build(config, "" if source.has_head else source.name, limits)
    if type(model).__name__ != source.name:
        raise InputError(f"the configuration must be that of a {source.name}, got a {type(model).__name__}")
    return model.eval()


def _config(model_name: str) -> Any:
    from transformers import AutoConfig, PreTrainedConfig

    folder = Path(model_name)
    if folder.is_dir():
        _check_folder(folder)
    try:
        values, _ = PreTrainedConfig.get_config_dict(model_name)
    except LOADING_ERRORS as error:
        raise _cannot_load(model_name, error) from error
    if values.get("model_type") == "timm_wrapper":
        raise InputError(f"{model_name} is a timm model, give it as hf-hub:{model_name}")
    check_description(values, f"the configuration of {model_name}")
    try:
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise _cannot_load(model_name, error) from error
    return config


def _check_folder(folder: Path) -> None:
    for entry in folder.iterdir():  # transformers opens what is there
        if entry.exists() and not (is_regular(entry) or entry.is_dir()):
            raise InputError(f"a local model folder must hold files and folders alone, got {entry}; remove it")
    file = folder / "config.json"
    if not is_regular(file):
        raise InputError(
            f"a local model folder must hold config.json as save_pretrained writes it, got {folder} without one"
        )
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no readable JSON ({one_line(error)}); save the model again") from error
    _check_files(folder)
    if isinstance(values, dict) and "model_type" not in values and "architecture" in values:
        raise InputError(
            f"{folder} holds a timm model, and only folders of transformers are read; give --model_name "
            f"{values['architecture']} --checkpoint {folder / 'model.safetensors'}"
        )


def _check_files(folder: Path) -> None:
    """Refuse files that transformers would read with far more memory than they have bytes, or that name others."""
    for file in (path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors", ".json")):
        try:
            if not file.is_file():
                raise ValueError("it is no file")
            if file.match("pytorch_model*.bin"):
                check_plain(file)
            elif file.suffix == ".json":
                values = read_json(file)
                shards = values.get("weight_map") if isinstance(values, dict) else None
                named = set(shards.values()) if isinstance(shards, dict) else set()
                strays = [repr(name) for name in named if not re.fullmatch(r"\w[\w.-]*\.[a-z]\w+", str(name))]
                if strays:
                    raise ValueError(f"it names files elsewhere: {some_of(strays)}")
        except READING_ERRORS as error:
            raise InputError(f"{file} cannot be read ({one_line(error)}); save the model again") from error


def _cannot_load(model_name: str, error: BaseException) -> InputError:
    if Path(model_name).is_dir():
        return InputError(
            f"transformers cannot load an image classifier from the folder {model_name}: {one_line(error)}; "
            "save it again by save_pretrained, or fetch its files again"
        )
    return cannot_fetch(model_name, error)


def headless_class(config: Any) -> str:
    """Return the class of the image tower or backbone that was saved; nothing for a model with a head."""
    saved = next(iter(config.architectures or ()), "")
    name = _TOWERS.get(saved, saved)
    return name if re.fullmatch(r"[A-Za-z0-9]+Model(WithProjection)?", name) else ""


def _build(config: Any, headless: str, limits: Limits) -> nn.Module:
    """Build the untrained classifier of a configuration, or the model without a head of this class."""
    if not headless:
        return _from_config(config, limits)
    kind = _class_of(headless)
    try:
        with bounded_construction(limits):
            model: nn.Module = kind(_tower_config(kind, config)).float()
    except (*LOADING_ERRORS, MemoryError, ArithmeticError) as error:
        raise InputError(f"transformers cannot build a {headless}: {one_line(error)}") from error
    return model


def _class_of(name: str) -> Any:
    import transformers

    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(f"transformers {transformers.__version__} has no model {name}; install the version that has")
    if kind.main_input_name != "pixel_values":
        raise InputError(f"a model must take images alone, got a {name}; save its image tower by itself")
    return kind


def _tower_config(kind: Any, config: Any) -> Any:
    """Return the configuration of an image tower, which may be a part of that of a model of images and text."""
    return config if isinstance(config, kind.config_class) else config.vision_config


def _from_config(config: Any, limits: Limits = ANY) -> nn.Module:
    from transformers import AutoModelForImageClassification

    try:
        auto: Any = AutoModelForImageClassification  # untyped in transformers
        with bounded_construction(limits):
            model: nn.Module = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (*LOADING_ERRORS, MemoryError, ArithmeticError) as error:
        raise InputError(f"transformers cannot load an image classifier: {one_line(error)}") from error
    return model


def _with_weights(model_name: str, headless: str, allow_random_init: bool) -> nn.Module:
    from transformers import AutoModelForImageClassification

    kind: Any = _class_of(headless) if headless else AutoModelForImageClassification
    try:
        model, info = kind.from_pretrained(
            model_name,
            dtype=torch.float32,
            **({} if headless else {"trust_remote_code": False}),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all are listed, below
        )
    except LOADING_ERRORS as error:
        raise _cannot_load(model_name, error) from error
    _check_complete(model_name, model, info, allow_random_init, _OTHERS if headless else HARMLESS)
    loaded: nn.Module = model
    return loaded


def _check_complete(
    model_name: str, model: Any, info: Mapping[str, Any], allow_random_init: bool, harmless: Sequence[str]
) -> None:
    shapes = sorted(info["mismatched_keys"])
    missing = sorted(set(info["missing_keys"]) - {name for name, *_ in shapes})
    unexpected = sorted(name for name in info["unexpected_keys"] if not any(part in name for part in harmless))
    random = [*missing, *(name for name, *_ in shapes)]
    if not random and not unexpected:
        return
    head_only = not any(name.startswith(f"{model.base_model_prefix}.") for name in random)
    fault = describe_mismatch(missing, unexpected, shapes)
    if head_only and not unexpected and allow_random_init:
        _log.warning("the head of %s starts from random weights: %s", model_name, fault)
        return
    remedy = (
        "--allow_random_init leaves the head at random" if head_only and not unexpected else "save the model again"
    )
    raise InputError(f"the weights of {model_name} do not fit {type(model).__name__}: {fault}; {remedy}")


def _arguments(model: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)  # where it was read from is no part of the architecture
    # Left out by transformers, but it decides the last bits of the logits.
    values["attn_implementation"] = model.config._attn_implementation
    values["architectures"] = [type(model).__name__]
    return values
