"""Save a pruned model in its own library's format, where that can say the new widths: it then loads without vbp."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vbp.data.preprocessing import Preprocessing
from vbp.deploy.artifact_files import State, plain_state, shared_names
from vbp.errors import InputError, OutputError
from vbp.models.classifier import ModelSource
from vbp.models.huggingface_processor import processor_config
from vbp.models.load import build_model
from vbp.models.weights import mismatch
from vbp.pruning.plan import PruningPlan
from vbp.sites.layers import input_channels, output_channels
from vbp.sites.site import Site


@dataclass(frozen=True)
class Block:
    """The MLP of a block: channels that come in, and the width, of `dense` channels once.

    `gated` marks one layer that makes a gate and its value: it has twice as many rows.
    """

    inputs: int
    width: int
    dense: int
    gated: bool = False


def save_native(
    model: nn.Module,
    folder: Path | str,
    *,
    plans: PruningPlan | Sequence[PruningPlan],
    source: ModelSource,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write a timm checkpoint or a Hugging Face folder that its own library loads, with bit-equal logits.

    A timm folder loads by `timm.create_model("local-dir:FOLDER", pretrained=True)`, or from the architecture, the
    `model_args` in its config.json and `checkpoint_path=FOLDER/model.safetensors`; a Hugging Face folder by
    `AutoModelForImageClassification.from_pretrained(FOLDER)`. Whether the configuration can say the widths is found
    out by building: its model must have the very tensors of the pruned one.

    Args:
        model: The pruned model.
        folder: New or empty.
        plans: The plan that was applied, or several in their order.
        source: From `load_classifier`.
        preprocessing: From `load_classifier`; goes into the folder in the library's words.
        class_names: What each logit stands for.

    Returns:
        The arguments of the configuration that say the widths, such as `{"mlp_ratio": 2.0}`.

    Raises:
        InputError: The configuration cannot say the widths (the reason is given), or the folder is in use.
        OutputError: The folder could not be written; nothing is left of it.

    Example:
        >>> vbp.save_native(equal_pruned, folder / "native", plans=equal_plan, source=source)
        {'mlp_ratio': 2.0}
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"a native checkpoint must go into a new or empty folder, got {target}; choose another")
    state = plain_state(model)
    arguments, native = _built(model, state, (plans,) if isinstance(plans, PruningPlan) else tuple(plans), source)
    native.load_state_dict(state, strict=True, assign=True)
    described = replace(source, arguments={**source.arguments, **arguments})
    if source.library == "timm":
        _write_folder(target, lambda at: _write_timm(at, native, state, described, preprocessing, class_names))
    else:
        _write_folder(target, lambda at: _write_huggingface(at, native, preprocessing, class_names))
    return arguments


def _built(
    model: nn.Module, state: State, plans: Sequence[PruningPlan], source: ModelSource
) -> tuple[dict[str, Any], nn.Module]:
    """Return the arguments under which the library itself builds the pruned architecture, and that model."""
    sites: dict[str, Site] = {}
    for plan in plans:
        for entry in plan.sites:
            if entry.site.kind == "mlp":
                sites.setdefault(entry.site.name, entry.site)
    if any(entry.site.kind != "mlp" and entry.removed for plan in plans for entry in plan.sites):
        raise InputError(
            f"no configuration of {source.name} can say that attention was pruned; save the folder of vbp "
            "(save_pruned), or prune without --bottleneck"
        )
    types = {value.dtype for value in state.values() if value.is_floating_point()}
    if source.library == "timm" and types != {torch.float32}:
        raise InputError(f"timm builds models in float32, got {', '.join(map(str, types))}; save model.float()")
    blocks = [_block(model, site) for site in sites.values()]
    reasons = []
    for arguments in _candidates(blocks, source):
        try:
            native = _build(source, arguments)
        except InputError as error:
            reasons.append(str(error).split(";", maxsplit=1)[0])
            continue
        fault = mismatch(native.state_dict(), state)
        if fault is None:
            return arguments, native
        reasons.append(f"with {arguments} its tensors are others: {fault}")
    raise InputError(
        f"no configuration of {source.name} can say these widths: {_why_not(blocks, source, reasons)}; or save the "
        "folder of vbp (save_pruned), which says every width"
    )


def _build(source: ModelSource, arguments: Mapping[str, Any]) -> nn.Module:
    return build_model(replace(source, arguments={**source.arguments, **arguments}))


def _block(model: nn.Module, site: Site) -> Block:
    layer = model.get_submodule(site.producers[0])
    gated = len(site.producers) == 2 and site.producers[0] == site.producers[1]
    return Block(input_channels(layer), output_channels(layer) // (2 if gated else 1), site.hidden, gated)


def _why_not(blocks: Sequence[Block], source: ModelSource, reasons: Sequence[str]) -> str:
    widths = sorted({(block.inputs, block.width) for block in blocks})
    text = "MLPs of " + ", ".join(f"{width} channels on {inputs}" for inputs, width in widths)
    if reasons:
        return f"{text}: {'; '.join(reasons)}"
    # A whole number of channels in the narrowest MLP is one in its multiples too.
    narrowest = min(block.dense for block in blocks)
    ratio = round(sum(block.width for block in blocks) / sum(block.dense for block in blocks) * narrowest) / narrowest
    equal = [replace(block, width=round(ratio * block.dense)) for block in blocks]
    for arguments in _candidates(equal, source):
        with contextlib.suppress(InputError):
            _build(source, arguments)
            return (
                f"{text}, where it has one number for all; prune with --equal_widths, without --global_pruning, "
                f"with --keep_ratio {ratio:.7g}, which is a whole number of channels"
            )
    return f"{text}, and no number in it gives them"


def _candidates(blocks: Sequence[Block], source: ModelSource) -> Iterator[dict[str, Any]]:
    """Return the arguments that may say the widths: one number, one ratio, or one ratio a stage."""
    if "intermediate_size" in source.arguments and len({block.width for block in blocks}) == 1:
        yield {"intermediate_size": blocks[0].width}
    if source.library == "transformers" and "mlp_ratio" not in source.arguments:
        return
    if any(block.gated for block in blocks):  # some count the rows of gate and value together
        yield from _ratios([replace(block, width=block.width * (1 + block.gated)) for block in blocks], source)
    yield from _ratios(blocks, source)


def _ratios(blocks: Sequence[Block], source: ModelSource) -> Iterator[dict[str, Any]]:
    ratio = mlp_ratio(blocks)
    if ratio is not None:
        whole = isinstance(source.arguments.get("mlp_ratio"), int) and ratio == int(ratio)
        yield {"mlp_ratio": int(ratio) if whole else ratio}
        return
    stages = [mlp_ratio(list(stage)) for _, stage in groupby(blocks, key=lambda block: block.inputs)]
    if source.library == "timm" and len(stages) > 1 and None not in stages:
        yield {"mlp_ratio": stages}


def mlp_ratio(blocks: Sequence[Block]) -> float | None:
    """Return a ratio with `int(inputs * ratio) == width` in every block; None if there is none."""
    lowest = max(block.width / block.inputs for block in blocks)
    below = min((block.width + 1) / block.inputs for block in blocks)
    # The plain quotient is the most readable; where its binary fraction falls short, the middle does not.
    for ratio in (lowest, (lowest + below) / 2):
        if all(int(block.inputs * ratio) == block.width for block in blocks):
            return ratio
    return None


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside the wanted one, then put it in its place."""
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        if folder.exists():
            folder.rmdir()
        temporary.replace(folder)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"{folder} could not be written ({error}); choose another folder") from error
        raise


def _write_timm(
    folder: Path,
    native: nn.Module,
    state: State,
    source: ModelSource,
    preprocessing: Preprocessing | None,
    class_names: Sequence[str] | None,
) -> None:
    """Write a folder in the format of timm's models on the hub."""
    shared = shared_names(state)
    weights = {name: value.clone() if name in shared else value for name, value in state.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    known: Mapping[str, Any] = getattr(native, "pretrained_cfg", None) or {}
    cfg: dict[str, Any] = {
        key: known[key] for key in ("first_conv", "classifier", "fixed_input_size", "pool_size") if known.get(key)
    }
    if preprocessing is not None:
        described = preprocessing.to_dict()
        size = described.pop("img_size")
        cfg.update(described, input_size=[len(preprocessing.mean), *size], test_crop_pct=preprocessing.crop_pct)
    config = {
        "architecture": source.name,
        "num_classes": source.arguments.get("num_classes", getattr(native, "num_classes", None)),
        "num_features": getattr(native, "num_features", None),
        "model_args": {key: value for key, value in source.arguments.items() if key != "num_classes"},
        "pretrained_cfg": cfg,
        **({} if class_names is None else {"label_names": list(class_names)}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_huggingface(
    folder: Path, native: Any, preprocessing: Preprocessing | None, class_names: Sequence[str] | None
) -> None:
    if class_names is not None:
        native.config.id2label = dict(enumerate(class_names))
        native.config.label2id = {name: index for index, name in enumerate(class_names)}
    native.save_pretrained(folder)
    if preprocessing is not None:
        values = processor_config(preprocessing)
        (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
