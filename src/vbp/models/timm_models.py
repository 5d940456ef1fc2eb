"""Load classifiers of timm: weights from the hub, from a file, or from Facebook's ConvNeXt files."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.data.config import resolve_data_config
from timm.models import model_entrypoint
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vbp.data.preprocessing import Preprocessing
from vbp.errors import InputError, one_line
from vbp.models.class_names import timm_class_names
from vbp.models.classifier import Classifier, Family, ModelSource, cannot_fetch, check_family
from vbp.models.limits import ANY, Limits, bounded_construction, check_description, check_timm_arguments
from vbp.models.timm_names import Architecture, check_known, resolve
from vbp.models.weights import Conversion, StateDict, WeightFile, convert, load_strictly_, read_weights, readings
from vbp.runtime.choices import ModelType

_log = logging.getLogger(__name__)

FAMILIES: dict[Family, tuple[type[nn.Module], ...]] = {
    "vit": (VisionTransformer,),  # DeiT is one, distilled or not
    "convnext": (ConvNeXt,),
    "swin": (SwinTransformer, SwinTransformerV2, SwinTransformerV2Cr),
}

IMAGENET_22K_CLASSES = 21841

# What a constructor raises for arguments that it cannot use.
BUILDING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    MemoryError,
)


def load_timm(
    model_name: str,
    file: WeightFile | None,
    allow_random_init: bool,
    model_kwargs: Mapping[str, Any],
    overrides: Mapping[str, Any],
    model_type: ModelType,
) -> Classifier:
    """Load a timm classifier; its family is checked before any weight is read or fetched."""
    without_network = file is not None or allow_random_init
    tagged = _with_facebook_tag(model_name, file.path) if file is not None and file.facebook else model_name
    architecture = resolve(tagged, model_kwargs, overrides["img_size"], without_network=without_network)
    preprocessing = _preprocessing(architecture).override(**overrides)
    model = _build(architecture.name, architecture.arguments)
    check_timm_arguments(architecture.name, architecture.arguments)  # what is built here is built again from a file
    family = family_of_timm(model)
    check_family(model_name, model_type, family)
    if file is not None:
        model, architecture = _from_file(model, architecture, file, fixed="num_classes" in model_kwargs)
    elif allow_random_init:
        _log.warning("%s starts from random weights: nothing was loaded", architecture.name)
    else:
        model = _from_hub(model, architecture)
    num_classes = int(getattr(model, "num_classes", 0))
    if num_classes < 1:
        _log.info("%s has no head: it returns features", tagged)
    source = ModelSource("timm", architecture.name, {**architecture.arguments, "num_classes": num_classes})
    # A file may hold another 1,000 classes than ImageNet's; only weights that timm itself fetched are known.
    fetched = file is None and not allow_random_init
    names = timm_class_names(architecture.cfg, num_classes) if fetched and num_classes else None
    return Classifier(model.eval(), source, preprocessing, num_classes, family, names)


def family_of_timm(model: nn.Module) -> Family:
    """Return the family of a timm model, by its class."""
    return next((name for name, classes in FAMILIES.items() if isinstance(model, classes)), "other")


def build_timm(source: ModelSource, limits: Limits) -> nn.Module:
    """Build the untrained architecture of `source`, in evaluation mode, if it is within the limits."""
    check_known(source.name)
    check_timm_arguments(source.name, source.arguments)
    check_description(source.arguments, f"the arguments of {source.name}")
    return _build(source.name, source.arguments, limits).eval()


def _preprocessing(architecture: Architecture) -> Preprocessing:
    resolve_config: Any = resolve_data_config  # untyped in timm
    config = resolve_config(pretrained_cfg=architecture.cfg or {"input_size": (3, 224, 224)})
    height, width = config["input_size"][-2:]
    size = architecture.arguments.get("img_size", [height, width])
    return Preprocessing(
        img_size=(size, size) if isinstance(size, int) else tuple(size),
        crop_pct=float(config["crop_pct"]),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_mode=config["crop_mode"],
    )


def _build(name: str, arguments: Mapping[str, Any], limits: Limits = ANY) -> nn.Module:
    try:
        with bounded_construction(limits):
            model: nn.Module = timm.create_model(name, **arguments)
    except BUILDING_ERRORS as error:
        raise InputError(
            f"timm cannot build {name} from {dict(arguments)}: {one_line(error)}; check the model arguments "
            "and img_size"
        ) from error
    return model


def _from_hub(model: nn.Module, architecture: Architecture) -> nn.Module:
    own, wanted = architecture.cfg.get("num_classes"), getattr(model, "num_classes", None)
    if own != wanted and wanted != 0:
        # timm would leave out the pretrained head and say nothing.
        raise InputError(
            f"the pretrained weights of {architecture.requested} are for {own} classes, got num_classes "
            f"{wanted} in the model arguments: the head would be random; give --checkpoint FILE with a fitting "
            "head"
        )
    try:
        pretrained: nn.Module = timm.create_model(architecture.requested, pretrained=True, **architecture.arguments)
    except OSError as error:
        raise cannot_fetch(architecture.requested, error) from error
    except (RuntimeError, SafetensorError) as error:
        raise InputError(
            f"the pretrained weights of {architecture.requested} could not be loaded: {one_line(error)}; leave "
            "out the model arguments, choose another tag, or give --checkpoint FILE"
        ) from error
    return pretrained


def _from_file(
    model: nn.Module, architecture: Architecture, file: WeightFile, *, fixed: bool
) -> tuple[nn.Module, Architecture]:
    """Load the file under its names, or without a prefix that all of them share, whichever fits."""
    refused: dict[str, InputError] = {}
    for prefix, weights in readings(read_weights(file.path)):
        try:
            return _loaded(model, architecture, file, weights, fixed=fixed)
        except InputError as error:
            refused[prefix] = error
    first, *others = refused
    also = f"; nor do they fit without {', '.join(map(repr, others))}" if others else ""
    raise InputError(f"{refused[first]}{also}") from refused[first]


def _loaded(
    model: nn.Module, architecture: Architecture, file: WeightFile, weights: StateDict, *, fixed: bool
) -> tuple[nn.Module, Architecture]:
    """Load weights; their head decides the number of classes unless the model arguments do (`fixed`)."""
    if file.facebook:
        _check_facebook_layout(model, architecture.name, weights, file.path)
    conversion = _conversion(architecture.name)
    converted = convert(weights, conversion, model, file.path)
    if getattr(model, "num_classes", None) == 0:
        converted = _without_head(converted, model, architecture.cfg)
    rows = _head_rows(converted, architecture.cfg)
    if not fixed and rows is not None and rows != getattr(model, "num_classes", rows):
        _log.info("%s has a head of %d classes; the model is built with it", file.path, rows)
        architecture = replace(architecture, arguments={**architecture.arguments, "num_classes": rows})
        model = _build(architecture.name, architecture.arguments)
        converted = convert(weights, conversion, model, file.path)
    load_strictly_(model, converted, file.path)
    return model, architecture


def _conversion(name: str) -> Conversion | None:
    """Return the conversion that timm has for older and foreign files, and for another image size."""
    module = sys.modules[model_entrypoint(name).__module__]
    conversion = getattr(module, "checkpoint_filter_fn", None)
    if conversion is None:
        return None
    if "adapt_layer_scale" in inspect.signature(conversion).parameters:
        conversion = partial(conversion, adapt_layer_scale=True)  # as timm does for DeiT III
    result: Conversion = conversion
    return result


def _without_head(weights: StateDict, model: nn.Module, cfg: Mapping[str, Any]) -> StateDict:
    """Return the weights but for those of the head, which a model without one has no place for."""
    names = cfg.get("classifier") or "head"
    heads = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    own = model.state_dict()
    return {name: value for name, value in weights.items() if name in own or not name.startswith(heads)}


def _head_rows(weights: StateDict, cfg: Mapping[str, Any]) -> int | None:
    names = cfg.get("classifier") or "head"
    weight = weights.get(f"{names if isinstance(names, str) else names[0]}.weight")
    return None if weight is None or weight.ndim < 2 else int(weight.shape[0])


def _with_facebook_tag(model_name: str, path: Path) -> str:
    """Return the tag that holds the preprocessing of a Facebook file.

    The official names contain the training data (`22k_1k` or `1k`) and the size (`224` or `384`). At 224 both
    tags prepare images alike, so that a renamed file is not worse off. A tag in the model name stays.
    """
    if "." in model_name:
        return model_name
    check_known(model_name)
    size = "_384" if "384" in path.stem else ""
    tags = [f"fb_in22k_ft_in1k{size}", f"fb_in1k{size}", "fb_in22k_ft_in1k"]
    if "22k" not in path.stem:
        tags.insert(0, f"fb_in1k{size}")
    known = timm.list_models(f"{model_name}.*", include_tags=True)
    for tag in tags:
        if f"{model_name}.{tag}" in known:
            _log.info("%s is prepared as timm's %s.%s", path, model_name, tag)
            return f"{model_name}.{tag}"
    raise InputError(
        "--convnext_checkpoint takes Facebook's files for convnext_tiny, convnext_small, convnext_base and "
        f"convnext_large, got the model name {model_name!r}; give other weights by --checkpoint"
    )


def _check_facebook_layout(model: nn.Module, name: str, weights: StateDict, path: Path) -> None:
    """Stop if a file cannot be one of Facebook's ConvNeXt classifiers for ImageNet-1k or a fine-tuned one."""
    if not isinstance(model, ConvNeXt):
        raise InputError(f"--convnext_checkpoint needs a ConvNeXt, got {name}; use --checkpoint")
    if not any(key.startswith("downsample_layers.") for key in weights):
        raise InputError(
            f"{path} is not in the layout of Facebook's ConvNeXt files (no downsample_layers.*); give a file "
            "in timm's layout by --checkpoint"
        )
    head = weights.get("head.weight")
    if head is not None and head.shape[0] == IMAGENET_22K_CLASSES:
        raise InputError(
            f"{path} has the head of ImageNet-22k ({IMAGENET_22K_CLASSES} classes), which is not fine-tuned "
            "for ImageNet-1k; use the 22k_1k or the 1k file"
        )
