"""Write the demo's data, scikit-learn's handwritten digits, and describe the small trained ViT for them."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from vbp.data.preprocessing import Preprocessing
from vbp.errors import InputError, OutputError
from vbp.runtime.files import folder_in_use, try_lock

# A ViT in the usual proportions (a head of 32 dimensions, an MLP four times as wide as the embedding): 16 patches,
# 214,218 parameters. It is trained by examples/train_digits_vit.py.
MODEL_NAME: Final = "vit_tiny_patch16_224"

MODEL_KWARGS: Final[Mapping[str, Any]] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 10,
}

# The digits fill their 8 x 8 pixels to the border, so nothing of them may be cropped away in evaluation.
PREPROCESSING: Final = Preprocessing(
    img_size=(32, 32), crop_pct=1.0, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)

# What the weights were trained with, and what fine-tuning has to use: mirrored digits are other characters.
HFLIP: Final = False
CROP_SCALE: Final = (0.7, 1.0)
WEIGHTS: Final = Path(__file__).parent / "assets" / "digits_vit.safetensors"
_STAGING: Final = ".digits."
_WHITE = 16  # the brightest value in scikit-learn's images


def write_digits(folder: Path) -> None:
    """Write the 1,797 digits as `folder/{train,val}/<digit>/NNNN.png`, 8 x 8 grey pixels each.

    `NNNN` is the image's place in scikit-learn's data. Of each digit every second image goes to `val`; since the
    data run writer by writer, both splits know every writer. A complete folder is left alone, and missing or
    damaged images of an incomplete one are written again. A folder with other data in it is refused.
    """
    images = _encode()
    try:
        _check_only_digits(folder, images)
        if not _missing(folder, images) and not list(folder.glob(f"{_STAGING}*")):
            return
        with try_lock(folder) as held:
            if not held:
                raise folder_in_use(folder, "--folder")
            for left_over in folder.glob(f"{_STAGING}*"):
                shutil.rmtree(left_over)
            # An image comes into place by a rename, so that neither a reader nor an interruption finds a part of one.
            with tempfile.TemporaryDirectory(dir=folder, prefix=_STAGING) as staging:
                for path in _missing(folder, images):
                    staged = Path(staging) / "image.png"
                    staged.write_bytes(images[path])
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    staged.replace(folder / path)
    except OSError as error:
        raise OutputError(
            f"the digits could not be written into {folder} ({error}); choose another folder or free some space"
        ) from error


def _missing(folder: Path, images: Mapping[str, bytes]) -> list[str]:
    """Return the images that are not there, or are damaged."""
    return [
        path for path, png in images.items() if not (folder / path).is_file() or (folder / path).read_bytes() != png
    ]


def _encode() -> dict[str, bytes]:
    """Return the PNG of every image by its relative path."""
    digits = load_digits()
    seen: Counter[int] = Counter()
    images: dict[str, bytes] = {}
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        split = "val" if seen[digit] % 2 else "train"
        seen[digit] += 1
        png = io.BytesIO()
        Image.fromarray(np.rint(pixels * (255 / _WHITE)).astype(np.uint8)).save(png, "PNG")
        images[f"{split}/{digit}/{index:04}.png"] = png.getvalue()
    return images


def _check_only_digits(folder: Path, images: Mapping[str, bytes]) -> None:
    """Refuse to mix the digits with other data, which would then be trained on and counted as digits."""
    known = set(images) | {str(Path(path).parent) for path in images}
    for split in ("train", "val"):
        for entry in sorted((folder / split).rglob("[!.]*")):
            if entry.relative_to(folder).as_posix() not in known:
                raise InputError(
                    f"the folder for the digits must be new, empty or hold nothing but them in train and val, "
                    f"got {entry}; choose another folder"
                )
