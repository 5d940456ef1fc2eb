"""Text embeddings with which a contrastive model compares images: read from a file, one row for each text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vbp.errors import InputError, one_line
from vbp.runtime.files import is_regular
from vbp.runtime.fingerprints import text_fingerprint

# The factor of CLIP and its successors after training.
SCALE: Final = 100.0
_NAME, _SCALE = "text_embeddings", "logit_scale"


@dataclass(frozen=True)
class TextEmbeddings:
    """Hold one row for each text, of length 1, and the factor of the cosine."""

    rows: Float[Tensor, "texts channels"]
    scale: float = SCALE

    def __post_init__(self) -> None:
        """Check the values, and bring the rows to length 1."""
        rows = self.rows.detach().cpu().float()
        if rows.ndim != 2 or len(rows) < 2 or not bool(rows.isfinite().all()) or not bool(rows.any(1).all()):
            raise InputError(
                "text embeddings must be at least two rows of finite numbers, none of zeros alone, got shape "
                f"{list(rows.shape)}; save one row for each text"
            )
        if not 0 < self.scale < float("inf"):
            raise InputError(f"{_SCALE} must be above 0 and finite, got {self.scale}; 100 is usual")
        object.__setattr__(self, "rows", F.normalize(rows, dim=1))

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def load(path: Path | str) -> TextEmbeddings:
        """Read a `.safetensors` file or an array of NumPy, `.npy`.

        The first holds `text_embeddings`, or one matrix of another name, and `logit_scale` if the factor is not 100;
        the factor itself, not its logarithm.

        Raises:
            InputError: The file is missing, damaged or something else.
        """
        path = Path(path)
        if not is_regular(path):
            raise InputError(f"text_embeddings must be an existing file, got {path}; check --text_embeddings")
        try:
            if path.suffix == ".npy":
                return TextEmbeddings(torch.from_numpy(np.load(path, allow_pickle=False)))
            if path.suffix == ".safetensors":
                return _from_tensors(load_file(path))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise InputError(f"{path} holds no readable embeddings ({one_line(error)}); save it again") from error
        raise InputError(f"text_embeddings must end in .safetensors or .npy, got {path}; save it as one of these")

    @property
    def fingerprint(self) -> str:
        """Return a fingerprint of the rows and the factor."""
        return text_fingerprint([str(self.scale), str(tuple(self.rows.shape)), self.rows.numpy().tobytes().hex()])

    def similarities(self, images: Float[Tensor, "images channels"]) -> Float[Tensor, "images texts"]:
        """Return the factor times the cosine of images and texts: logits of the texts."""
        return self.scale * F.normalize(images, dim=1) @ self.rows.to(images).T


def _from_tensors(tensors: Mapping[str, Tensor]) -> TextEmbeddings:
    matrices = [name for name, value in tensors.items() if value.ndim == 2]
    name = _NAME if _NAME in tensors else matrices[0] if len(matrices) == 1 else ""
    if not name:
        raise InputError(
            f"one matrix must be there, or one named {_NAME}, got {', '.join(sorted(tensors)) or 'nothing'}; save it "
            "under that name"
        )
    scale = tensors.get(_SCALE)
    if scale is not None and scale.numel() != 1:
        raise InputError(f"{_SCALE} must be one number, got shape {list(scale.shape)}; save the factor alone")
    return TextEmbeddings(tensors[name], SCALE if scale is None else float(scale))
