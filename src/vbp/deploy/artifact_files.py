"""Read and write pruned models: a folder of safetensors and readable JSON, or one `.pth` file; neither runs code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from vbp.errors import InputError, OutputError, one_line
from vbp.models.weights import uncompiled, unwrapped_state
from vbp.pruning.plan import PruningPlan
from vbp.runtime.decode import read_json
from vbp.runtime.files import clear_folder, is_regular, read_regular, text_bytes, write_atomically, write_bytes
from vbp.runtime.sealed import READING_ERRORS, load_plain, seal_fault, write_sealed
from vbp.sites.site import Site

FILE_FORMAT, FOLDER_FORMAT = "vbp-pruned/2", "vbp-artifact/2"
MANIFEST, WEIGHTS = "vbp.json", "model.safetensors"

# The folder of a run has the folder of its pruned model in it, and a list of its settings.
ARTIFACT, RUN_CONFIG = "artifact", "config.json"

# Lists of numbers that `json.dumps` spreads over one line each; no text can hold these line breaks.
_NUMBERS = re.compile(r"\[\n\s*(?:-?[\d.e+-]+,\n\s*)*-?[\d.e+-]+\n\s*\]")
State = dict[str, Tensor]


def model_in(place: Path) -> Path:
    """Return the pruned model that a path means: that in the folder of a run, or the folder of one of its files.

    Raises:
        InputError: It is the folder of a run that has not ended.
    """
    if place.name in (MANIFEST, WEIGHTS) and (place.parent / MANIFEST).is_file():
        return place.parent
    if not place.is_dir() or (place / MANIFEST).is_file():
        return place
    if (place / ARTIFACT / MANIFEST).is_file():
        return place / ARTIFACT
    if (place / RUN_CONFIG).is_file() and (models := sorted(place.glob("vbp_*.pth"))):
        raise InputError(
            f"{place} is the folder of a run that has not ended, without {ARTIFACT}; end it with --resume auto, or "
            f"give {models[0]}, its best model so far"
        )
    return place


def plain_state(model: nn.Module | Mapping[str, Any]) -> State:
    """Return the state of a model as contiguous tensors on the CPU that share no memory; tied ones are one object."""
    state: Mapping[str, Any] = unwrapped_state(model.state_dict() if isinstance(model, nn.Module) else model)
    name = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if name is not None:
        raise InputError(
            f"the state of a pruned model must be tensors, got {type(state[name]).__name__} in {name}; drop what is "
            "no tensor from its state dict"
        )
    shared = shared_names(state)
    plain: State = {}
    for name, value in state.items():
        own = value.detach().cpu()
        # A view would carry the whole storage that it is cut from into the file.
        plain[name] = plain[shared[name]] if name in shared else own.clone(memory_format=torch.contiguous_format)
    return plain


def unwrapped_plan(plan: PruningPlan, state: State) -> PruningPlan:
    """Return a plan that names the layers of `plain_state`, whatever wrapped the model when its sites were found."""

    def own(name: str) -> str:
        name = uncompiled(name)
        while name.startswith("module.") and not any(key == name or key.startswith(f"{name}.") for key in state):
            name = name.removeprefix("module.")
        return name

    def renamed(site: Site) -> Site:
        producers, others, inner, parameters = (
            tuple(map(own, names)) for names in (site.producers, site.others, site.inner, site.parameters)
        )
        return replace(
            site,
            producers=producers,
            consumer=own(site.consumer),
            others=others,
            inner=inner,
            parameters=parameters,
            branch=own(site.branch),
        )

    return replace(plan, sites=tuple(replace(entry, site=renamed(entry.site)) for entry in plan.sites))


def shared_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return each name whose tensor is that of an earlier name (tied weights), with the earlier name."""
    first: dict[tuple[Any, ...], str] = {}
    shared = {}
    for name, value in state.items():
        if value.numel() == 0 or value.is_meta:
            continue
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        earlier = first.setdefault(place, name)
        if earlier != name:
            shared[name] = earlier
    return shared


def write_file(path: Path, manifest: Mapping[str, Any], state: State) -> None:
    """Write one `.pth` file that `torch.load(weights_only=True)` reads, whole or not at all."""
    content = {"format": FILE_FORMAT, **manifest, "state_dict": state}
    try:
        write_atomically(path, lambda file: write_sealed(file, content, FILE_FORMAT))
    except TypeError as error:
        raise InputError(
            f"metrics and settings must be plain data ({one_line(error)}); convert what is not"
        ) from error


def write_folder(folder: Path, manifest: Mapping[str, Any], state: State) -> None:
    """Write `model.safetensors` and `vbp.json`, whole or not at all.

    Replacing `vbp.json` is the one step that makes the new model valid. The weights lie beside the old ones until
    then; a reader that finds them still there, because the writer was killed, takes them. So the folder holds the old
    model or the new one at every moment, and never a part of each.

    Raises:
        InputError: The folder holds something else, or the content cannot be written in these formats.
        OutputError: It could not be written; an earlier model in the folder stays whole.
    """
    check_target(folder)
    shared = shared_names(state)
    try:
        data = save({name: value for name, value in state.items() if name not in shared}, {"format": "pt"})
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"safetensors cannot hold these weights: {one_line(error)}; save to a .pth file") from error
    digest = hashlib.sha256(data).hexdigest()
    weights = {"file": WEIGHTS, "bytes": len(data), "sha256": digest, "shared": shared}
    text = _readable_json({"format": FOLDER_FORMAT, "weights": weights, **manifest})
    new = not folder.exists()
    staged = _staged(folder, digest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(staged, data)
        write_bytes(folder / MANIFEST, text)
    except OSError as error:  # an OutputError is one
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
            if new:
                folder.rmdir()
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder} could not be written ({error}); choose another folder") from error
    with contextlib.suppress(OSError):  # what fails here, a reader makes good
        staged.replace(folder / WEIGHTS)
        for left_over in folder.glob(f".{WEIGHTS}.*"):
            left_over.unlink()


def check_target(folder: Path) -> None:
    """Raise InputError for a path that is or looks like a file, or is a folder with the weights of something else."""
    if folder.is_file() or folder.suffix in (".pt", ".bin", ".safetensors", ".json"):
        raise InputError(
            f"a pruned model goes into a folder, or into one file that ends in .pth, got {folder}; choose another "
            "name"
        )
    if (folder / WEIGHTS).exists() and not (folder / MANIFEST).exists():
        raise InputError(
            f"{folder} holds {WEIGHTS} of something else (there is no {MANIFEST} beside it), which would be "
            "overwritten; choose another folder"
        )


def remove_folder(folder: Path) -> None:
    """Remove what `write_folder` wrote, and the folder if it holds nothing else."""
    # The manifest last: weights that were left without it would be taken for somebody else's.
    for name in (WEIGHTS, MANIFEST):
        clear_folder(folder, (name, *(staged.name for staged in folder.glob(f".{name}.*"))))
    with contextlib.suppress(OSError):
        folder.rmdir()


def read_file(file: Path) -> tuple[dict[str, Any], State]:
    """Read what `write_file` wrote: the manifest and the weights."""
    try:
        content = load_plain(file)
    except READING_ERRORS as error:
        raise InputError(
            f"{file} is damaged or no file of a pruned model ({one_line(error)}); copy or make it again"
        ) from error
    check_format(file, content, FILE_FORMAT)
    if "state_dict" not in content:
        raise InputError(f"{file} lacks 'state_dict'; make it again")
    state: State = content.pop("state_dict")
    if not isinstance(state, dict) or not all(map(_is_weight, state, state.values())):
        raise InputError(f"{file} is damaged: its state_dict must hold tensors by name; copy or make it again")
    if fault := seal_fault(file, FILE_FORMAT):
        raise InputError(f"{file} is no whole pruned model: {fault}")
    return content, state


def _is_weight(name: object, value: object) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return plain and isinstance(name, str)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the `vbp.json` of a folder."""
    file = folder / MANIFEST
    if not is_regular(file):
        raise InputError(
            f"{folder} holds no pruned model: there is no {MANIFEST} in it; give the folder that has one"
        )
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({one_line(error)}); copy or make the folder again") from error
    check_format(file, content, FOLDER_FORMAT)
    weights = content.get("weights")
    fields = {"bytes": int, "sha256": str, "shared": dict}
    if not isinstance(weights, dict) or not all(isinstance(weights.get(key), kind) for key, kind in fields.items()):
        raise InputError(f"{file} is damaged: its weights must have {', '.join(fields)}; make the folder again")
    return dict(content)


def read_folder(folder: Path) -> tuple[dict[str, Any], State]:
    """Read what `write_folder` wrote: the manifest and the weights."""
    manifest = read_manifest(folder)
    expected = manifest["weights"]
    file = weights_path(folder, manifest)
    try:
        data = read_regular(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); copy or make the folder again") from error
    if len(data) < expected["bytes"]:
        raise InputError(
            f"{file} is truncated or of another model: {MANIFEST} says {expected['bytes']} bytes, got {len(data)}; "
            "copy or make the folder again"
        )
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise InputError(
            f"{file} is damaged or of another model than {MANIFEST} beside it (its sha256 differs); copy or make the "
            "folder again"
        )
    try:
        state = load(data)
        state.update({alias: state[name] for alias, name in expected["shared"].items()})
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{file} is no readable safetensors file ({one_line(error)}); make the folder again"
        ) from error
    return manifest, state


def weights_path(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Return the file with the weights that belong to this manifest of a folder."""
    staged = _staged(folder, manifest["weights"]["sha256"])
    return staged if staged.is_file() else folder / WEIGHTS


def check_format(path: Path, content: object, wanted: str) -> None:
    """Raise InputError for the content of another program, or of another version of this one."""
    got = content.get("format") if isinstance(content, dict) else type(content).__name__
    if got == wanted:
        return
    name, number = wanted.split("/")
    match = re.fullmatch(rf"{name}/(\d+)", str(got))
    remedy = "it is no pruned model; give a file or folder that save_pruned wrote"
    if match:
        newer = int(match[1]) > int(number)
        remedy = "a newer vbp wrote it; install that version" if newer else "use the vbp version that wrote it"
    raise InputError(f"{path} must have format {wanted}, got {reprlib.repr(got)}; {remedy}")


def _staged(folder: Path, digest: str) -> Path:
    # Only the characters of a digest: what stands in a foreign vbp.json must not lead out of the folder.
    return folder / f".{WEIGHTS}.{re.sub('[^0-9a-f]', '', digest)[:16]}"


def _readable_json(content: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"metrics and settings must be plain JSON data without NaN or infinity ({error}); convert or leave "
            "out what is not"
        ) from error
    # The kept channels of a site on one line.
    return text_bytes(_NUMBERS.sub(lambda numbers: " ".join(numbers[0].split()), text) + "\n")
