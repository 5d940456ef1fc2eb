"""List and read images of a Hugging Face dataset, from the hub or from a local folder of parquet files."""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vbp.data.images import SPLITS
from vbp.data.labels import ClassNames, check_labels, head_labels
from vbp.errors import InputError, one_line
from vbp.runtime.files import open_regular
from vbp.runtime.fingerprints import text_fingerprint

_log = logging.getLogger(__name__)
_SPLIT_NAMES = {"train": "train", "val": "validation"}


@dataclass(frozen=True, eq=False)
class HuggingFaceImages:
    """Some rows of one split of a dataset, with their labels; `reader` is timm's."""

    root: str
    reader: Any
    rows: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return the dataset, its split and the row."""
        return f"{self.root} row {self.rows[index]}"

    def read(self, index: int) -> BinaryIO:
        """Return the image as the dataset stores it: in the row itself, or in a file that the row names."""
        stored = self.reader.dataset[self.rows[index]][self.reader.image_key] or {}
        if stored.get("bytes"):
            return io.BytesIO(stored["bytes"])
        if stored.get("path"):
            return open_regular(Path(stored["path"]))
        raise OSError("the row holds no image")

    def select(self, indices: Sequence[int]) -> HuggingFaceImages:
        """Return the rows at these places, in this order."""
        return dataclasses.replace(
            self, rows=tuple(self.rows[i] for i in indices), labels=tuple(self.labels[i] for i in indices)
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 over the label, the file name and the size of each image, in order."""
        import pyarrow.compute

        # Arrow keeps names and sizes apart from the images' bytes, which are not touched.
        paths: list[str] = []
        sizes: list[int] = []
        for chunk in self.reader.dataset.data.column(self.reader.image_key).chunks:
            paths += (path or "" for path in pyarrow.compute.struct_field(chunk, "path").to_pylist())
            lengths = pyarrow.compute.binary_length(pyarrow.compute.struct_field(chunk, "bytes"))
            sizes += (size or 0 for size in lengths.to_pylist())
        stored = zip(self.rows, self.labels, strict=True)
        return text_fingerprint(f"{label}\0{paths[row]}\0{sizes[row]}\0" for row, label in stored)


def list_rows(
    place: str, options: Mapping[str, str], split: str, num_classes: int, own: ClassNames | None = None
) -> HuggingFaceImages:
    """List the rows of a split of a dataset on the hub or in a local folder.

    Options name its splits and columns where they are not `train`, `validation`, `image` and `label`; `own` names the
    model's classes. For a model of no classes no column of labels is needed.
    """
    # Slow to import, and installed only with the extra `data`.
    import datasets

    name, split_name = _dataset_name(place), options.get(split, _SPLIT_NAMES[split])
    image, label = options.get("image", "image"), options.get("label", "label")
    root = f"hfds/{place} ({split_name})"
    with _clear_errors(place):
        features = datasets.load_dataset(name, split=split_name).features
        for option, column in (("image", image), ("label", label))[: 2 if num_classes else 1]:
            if column not in features:
                raise InputError(
                    f"the {option} column of {root} must be one of {', '.join(features)}, got {column}; "
                    f"name it with ?{option}="
                )
        if not isinstance(features[image], datasets.Image):
            raise InputError(f"column {image} of {root} must hold images, got {features[image]}; use ?image=")
        # From here, and not from timm.data: without `datasets` that module prints and fails.
        from timm.data.readers.reader_hfds import ReaderHfds

        reader = ReaderHfds(name, split=split_name, input_key=image, target_key=label if num_classes else image)
        # Images in other columns would be decoded too, in any format.
        reader.dataset = reader.dataset.select_columns([image, label] if num_classes else [image])
    labels = _labels(reader, label, num_classes, root, own) if num_classes else (0,) * len(reader.dataset)
    images = HuggingFaceImages(root, reader, tuple(range(len(labels))), labels)
    if not labels:
        raise InputError(f"{root} must hold images, got none")
    check_labels(labels, max(1, num_classes), images.name)
    return images


def check_dataset(place: str, options: Mapping[str, str]) -> None:
    """Stop unless a dataset can be reached and, as far as its description lists them, has both splits."""
    import datasets

    name = _dataset_name(place)
    with _clear_errors(place):
        builder = datasets.load_dataset_builder(name)
    splits = sorted(map(str, builder.info.splits or builder.config.data_files or ()))
    for split in SPLITS:
        split_name = options.get(split, _SPLIT_NAMES[split])
        # A split may be a part or a sum: train[:10%], train+test.
        parts = [part.partition("[")[0] for part in split_name.split("+")]
        if splits and not set(parts) <= {*splits, "all"}:
            raise InputError(
                f"{split} of hfds/{place} must be one of its splits ({', '.join(splits)}), got {split_name}; "
                f"name it with ?{split}="
            )


def _dataset_name(place: str) -> str:
    if Path(place).is_dir():
        return place
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(place)
    except HFValidationError as error:
        raise InputError(
            "hfds/ must be followed by a folder that exists or by OWNER/NAME on the Hugging Face hub, got "
            f"{place[:200]!r}: {one_line(error)}"
        ) from error
    return place


@contextmanager
def _clear_errors(place: str) -> Iterator[None]:
    # Errors of the network are OSErrors, of damaged files of Arrow ValueErrors.
    from datasets.exceptions import DatasetsError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, DatasetsError) as error:
        # The library's own texts may fill a screen.
        text = " ".join(str(error).split())
        where = "is a folder" if Path(place).is_dir() else "is no folder here, so it was looked for on the hub"
        raise InputError(
            f"the dataset hfds/{place} must be readable, got {type(error).__name__}: {text} ({place} {where}); "
            "check its name, the network, the access to it (hf auth login) and its files"
        ) from error


def _labels(reader: Any, column: str, num_classes: int, root: str, own: ClassNames | None) -> tuple[int, ...]:
    stored = reader.dataset.data.column(column)
    values = stored.to_numpy() if stored.null_count == 0 else np.empty(0, dtype=object)
    if not np.issubdtype(values.dtype, np.integer):
        got = f"{stored.null_count} empty ones" if stored.null_count else str(stored.type)
        raise InputError(f"column {column} of {root} must hold whole numbers as labels, got {got}; use ?label=")
    names = getattr(reader.dataset.features[column], "names", None)
    if names is None:
        return tuple(values.tolist())
    head = head_labels(names, num_classes, root, own)
    # -1 marks images without a label; it must not count from the end.
    return tuple(head[value] if 0 <= value < len(head) else value for value in values.tolist())
