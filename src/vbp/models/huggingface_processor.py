"""Translate transformers' image processors to `Preprocessing` and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError

from vbp.data.preprocessing import Preprocessing
from vbp.errors import InputError, one_line
from vbp.runtime.sealed import READING_ERRORS

# Those that resize, then perhaps crop the centre, then normalise; the names may end in Fast or Pil.
PLAIN_PROCESSORS = (
    "ViTImageProcessor",
    "DeiTImageProcessor",
    "BeitImageProcessor",
    "BitImageProcessor",
    "CLIPImageProcessor",
)

# From this edge on, the ConvNeXt processor squashes the whole image and crops nothing.
CONVNEXT_SQUASH_EDGE = 384

# What transformers raises for files that it cannot fetch, read or understand; the last one for a value of the wrong
# type in a configuration.
LOADING_ERRORS = (*READING_ERRORS, ArithmeticError, SafetensorError, StrictDataclassError)


def processor_preprocessing(model_name: str, overrides: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing of a folder or hub id, with the user's `overrides` (`None` keeps the model's own).

    Without a readable image processor all values must be given.
    """
    from transformers import AutoImageProcessor

    try:
        auto: Any = AutoImageProcessor  # untyped in transformers
        processor = auto.from_pretrained(model_name, trust_remote_code=False)
        own = _from_processor(processor.to_dict())
    except (*LOADING_ERRORS, ImportError) as error:
        missing = [name for name, value in overrides.items() if value is None]
        if missing:
            raise InputError(
                f"the preprocessing of {model_name} is unknown ({one_line(error)}); add its "
                f"preprocessor_config.json, or give {', '.join(f'--{name}' for name in missing)} too"
            ) from error
        size = overrides["img_size"]
        return Preprocessing(**{**overrides, "img_size": (size, size)})
    return own.override(**overrides)


def processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the `preprocessor_config.json` of a transformers image processor that does the same.

    Raises:
        InputError: None can: the preprocessing pads the border, or takes greyscale.
    """
    height, width = preprocessing.img_size
    crop = preprocessing.crop_mode == "center"
    if len(preprocessing.mean) != 3 or preprocessing.crop_mode == "border" or (crop and height != width):
        raise InputError(
            f"no image processor of transformers does what {preprocessing} says; leave the preprocessing out"
        )
    resized = math.floor(height / preprocessing.crop_pct) if crop else height
    geometry = {
        "image_processor_type": "BitImageProcessor" if crop else "ViTImageProcessor",
        "size": {"shortest_edge": resized} if crop else {"height": height, "width": width},
        **({"do_center_crop": True, "crop_size": {"height": height, "width": width}} if crop else {}),
    }
    return {
        **geometry,
        "do_resize": True,
        "resample": int(Image.Resampling[preprocessing.interpolation.upper()]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _from_processor(values: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing with the same steps as the image processor's.

    Pixels agree with its PIL backend, but for centre crops with an odd margin, which may lie one pixel apart.
    """
    kind = str(values["image_processor_type"]).removesuffix("Fast").removesuffix("Pil")
    if kind == "ConvNextImageProcessor":
        img_size, crop_pct, crop_mode = _convnext_geometry(values)
    elif kind in PLAIN_PROCESSORS:
        img_size, crop_pct, crop_mode = _plain_geometry(values)
    else:
        raise InputError(
            f"image processor must be one of ConvNextImageProcessor, {', '.join(PLAIN_PROCESSORS)}, got {kind[:80]}"
        )
    factor = values.get("rescale_factor", 1 / 255)
    if not values.get("do_resize") or not values.get("do_rescale", True) or not math.isclose(factor, 1 / 255):
        raise InputError(f"{kind} must resize, and rescale by 1/255, got rescale_factor {factor}")
    normalised = values.get("do_normalize", True)
    return Preprocessing(
        img_size=img_size,
        crop_pct=crop_pct,
        interpolation=Image.Resampling(int(values["resample"])).name.lower(),
        mean=tuple(values["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        std=tuple(values["image_std"]) if normalised else (1.0, 1.0, 1.0),
        crop_mode=crop_mode,
    )


def _convnext_geometry(values: Mapping[str, Any]) -> tuple[tuple[int, int], float, str]:
    edge = int(values["size"]["shortest_edge"])
    if edge >= CONVNEXT_SQUASH_EDGE:
        return (edge, edge), 1.0, "squash"
    resized = int(edge / values["crop_pct"])
    return (edge, edge), _crop_share(edge, resized), "center"


def _plain_geometry(values: Mapping[str, Any]) -> tuple[tuple[int, int], float, str]:
    size = values["size"]
    crop = values.get("crop_size") if values.get("do_center_crop") else None
    if size.get("height") and size.get("width"):
        resized, crop_mode = (int(size["height"]), int(size["width"])), "squash"
        img_size = (int(crop["height"]), int(crop["width"])) if crop else resized
    elif size.get("shortest_edge") and crop and crop["height"] == crop["width"]:
        resized, crop_mode = (int(size["shortest_edge"]),) * 2, "center"
        img_size = (int(crop["height"]), int(crop["width"]))
    else:
        raise InputError(f"images must come out in one size, got size {size} and crop {crop}")
    share = _crop_share(img_size[0], resized[0])
    if share > 1 or math.floor(img_size[1] / share) != resized[1]:
        raise InputError(f"the crop must keep the shape of the resized image, got {img_size} from {resized}")
    return img_size, share, crop_mode


def _crop_share(edge: int, resized: int) -> float:
    """Return the share of the resized edge, such that floor(edge / share) gives exactly that edge again."""
    share = edge / resized
    return share if math.floor(edge / share) == resized else math.nextafter(share, 0.0)
