"""Save a pruned model in its own library's format, where that can say the new widths: it then loads without vbp."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.data.preprocessing import Preprocessing
from vbp.deploy.artifact_files import State, plain_state
from vbp.deploy.export import TOLERANCES
from vbp.deploy.file_formats import Parity, Portable, measure_parity
from vbp.deploy.native_files import check_new_folder, load_native, write_folder, write_huggingface, write_timm
from vbp.errors import InputError, printable
from vbp.models.classifier import ModelSource
from vbp.models.load import build_model
from vbp.models.weights import load_weights_, mismatch
from vbp.pruning.plan import PruningPlan
from vbp.sites.layers import input_channels, output_channels
from vbp.sites.site import Site


@dataclass(frozen=True)
class Block:
    """The MLP of a block: its input channels, and its width now and in the dense model.

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
    check_new_folder(target, "a native checkpoint")
    arguments, write = _checkpoint(model, plans, source, preprocessing, class_names)
    write_folder(target, write)
    return arguments


@dataclass(frozen=True)
class NativeReport:
    """A written folder, the bytes of its files, and its differences from the model if its own library loads it.

    `arguments` are those of the configuration that say the new widths; `tolerance` is the greatest
    `parity.relative_error` that was allowed.
    """

    folder: Path
    library: str
    arguments: Mapping[str, Any]
    size: int
    parity: Parity
    tolerance: float

    @property
    def loads_by(self) -> str:
        """Return the line of Python that loads it."""
        if self.library == "timm":
            return f'timm.create_model("local-dir:{self.folder}", pretrained=True)'
        return f'transformers.AutoModelForImageClassification.from_pretrained("{self.folder}")'

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        written = {"folder": str(self.folder), "to": "native", "library": self.library, "bytes": self.size}
        loading = {"arguments": dict(self.arguments), "loads_by": self.loads_by}
        return {**written, **loading, **asdict(self.parity), "tolerance": self.tolerance}

    def table(self) -> str:
        """Return the report as lines for the terminal."""
        says = ", ".join(f"{name} {value}" for name, value in self.arguments.items())
        return "\n".join(map(printable, (
            f"{self.folder}: a checkpoint of {self.library} ({says}), {self.size / 2**20:.1f} MiB",
            f"  loaded by {self.library} alone and run on {self.parity.images} images:",
            *self.parity.lines(self.tolerance),
            f"  load it with              {self.loads_by}",
        )))  # fmt: skip


def export_native(
    model: nn.Module,
    images: Float[Tensor, "images channels height width"],
    output: Path | str,
    *,
    plans: Sequence[PruningPlan],
    source: ModelSource,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> NativeReport:
    """Write what `save_native` writes, and keep it if its own library, without vbp, gets the model's logits from it.

    The images are real ones, prepared as the model wants them; the default tolerance is that of a float32 export.

    Raises:
        InputError: The configuration cannot say the widths, the folder is in use, or the logits are too far from the
            model's; nothing is left behind.
        OutputError: The folder could not be written.
    """
    target, allowed = Path(output), TOLERANCES["float32"] if tolerance is None else tolerance
    check_new_folder(target, "a native checkpoint")
    if not target.parent.is_dir():
        raise InputError(f"output must lie in an existing folder, got {target}; create {target.parent}")
    arguments, write = _checkpoint(model, plans, source, preprocessing, class_names)
    parities = []

    def write_and_check(folder: Path) -> None:
        write(folder)
        parity = measure_parity(
            Portable(model, torch.float32),
            Portable(load_native(folder), torch.float32),
            images.detach().cpu().float(),
        )
        if not parity.relative_error <= allowed:
            raise InputError(
                f"the checkpoint must give the model's logits within {allowed:g} of the largest one, got a "
                f"difference of {parity.relative_error:.3g}; nothing was written to {target}: report this with "
                "the model's name, or give a tolerance"
            )
        parities.append(parity)

    write_folder(target, write_and_check)
    size = sum(file.stat().st_size for file in target.iterdir())
    return NativeReport(target, source.library, arguments, size, parities[0], allowed)


def _checkpoint(
    model: nn.Module,
    plans: PruningPlan | Sequence[PruningPlan],
    source: ModelSource,
    preprocessing: Preprocessing | None,
    class_names: Sequence[str] | None,
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """Return the configuration arguments that say the widths, and a function that writes the checkpoint."""
    state = plain_state(model)
    arguments, native = _built(model, state, (plans,) if isinstance(plans, PruningPlan) else tuple(plans), source)
    load_weights_(native, state, assign=True)
    if source.library != "timm":
        return arguments, lambda folder: write_huggingface(folder, native, preprocessing, class_names)
    described = replace(source, arguments={**source.arguments, **arguments})
    return arguments, lambda folder: write_timm(folder, native, state, described, preprocessing, class_names)


def _built(
    model: nn.Module, state: State, plans: Sequence[PruningPlan], source: ModelSource
) -> tuple[dict[str, Any], nn.Module]:
    """Return the arguments under which the library itself builds the pruned architecture, and that model."""
    sites: dict[str, Site] = {}
    for plan in plans:
        for entry in plan.sites:
            if entry.site.kind == "mlp":
                sites.setdefault(entry.site.name, entry.site)
    if any((entry.site.kind != "mlp" and entry.removed) or not entry.keep for plan in plans for entry in plan.sites):
        raise InputError(
            f"no configuration of {source.name} can say that attention was pruned, or a whole branch; save the "
            "folder of vbp (save_pruned), or keep attention whole: --attention off, and no --bottleneck"
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
