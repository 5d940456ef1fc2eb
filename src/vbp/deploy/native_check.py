"""Export to timm's or Hugging Face's own format, and prove in a process without vbp that it loads."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.data.preprocessing import Preprocessing
from vbp.deploy import native_process
from vbp.deploy.export import TOLERANCES
from vbp.deploy.native import save_native
from vbp.deploy.parity import Parity, compare_logits
from vbp.deploy.torch_export import Portable
from vbp.errors import InputError, OutputError
from vbp.models.classifier import ModelSource
from vbp.pruning.plan import PruningPlan

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NativeReport:
    """What was written, and how far it lies from the model.

    Attributes:
        folder: Whole and proven.
        library: timm or transformers.
        arguments: What in its configuration says the new widths.
        size: Bytes of all files.
        parity: Its logits, from a process that has no vbp, against those of the model.
        tolerance: The greatest `parity.relative_error` that was allowed.
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
        return {
            "folder": str(self.folder),
            "to": "native",
            "library": self.library,
            "arguments": dict(self.arguments),
            "loads_by": self.loads_by,
            "bytes": self.size,
            **asdict(self.parity),
            "tolerance": self.tolerance,
        }

    def table(self) -> str:
        """Return the report as lines for the terminal."""
        says = ", ".join(f"{name} {value}" for name, value in self.arguments.items())
        return "\n".join((
            f"{self.folder}: a checkpoint of {self.library} ({says}), {self.size / 2**20:.1f} MiB",
            f"  loaded in a process without vbp and run on {self.parity.images} images:",
            f"  largest error of a logit  {self.parity.max_abs_error:.3g}, or {self.parity.relative_error:.2e} of "
            f"the largest logit (tolerance {self.tolerance:.2g})",
            f"  same class first          {self.parity.top1_agreement:.1%}",
            f"  load it with              {self.loads_by}",
        ))  # fmt: skip


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
    """Write what `save_native` writes, and put it in its place if a process without vbp gets the model's logits.

    Args:
        model: The pruned model; left as it was.
        images: Real ones, prepared as the model wants them.
        output: A folder, new or empty.
        plans: That were applied, in their order.
        source: From `load_classifier`.
        preprocessing: From `load_classifier`.
        class_names: What each logit stands for.
        tolerance: Of the relative error of a logit, in the place of that of a float32 export.

    Raises:
        InputError: The configuration cannot say the widths, the folder is in use, or the logits are too far from the
            model's; nothing is left behind.
        OutputError: The folder could not be written.
    """
    target, allowed = Path(output), TOLERANCES["float32"] if tolerance is None else tolerance
    _check_output(target)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as place:
            draft = Path(place) / "native"
            arguments = save_native(
                model, draft, plans=plans, source=source, preprocessing=preprocessing, class_names=class_names
            )
            parity = _parity(model, images, draft)
            if not parity.relative_error <= allowed:
                raise InputError(
                    f"the checkpoint must give the model's logits within {allowed:g} of the largest one, got a "
                    f"difference of {parity.relative_error:.3g}; nothing was written to {target}: report this with "
                    "the model's name, or give a tolerance"
                )
            if target.exists():
                target.rmdir()
            draft.replace(target)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target} could not be written ({error}); choose another folder") from error
    size = sum(file.stat().st_size for file in target.iterdir())
    report = NativeReport(target, source.library, arguments, size, parity, allowed)
    _log.info("%s", report.table())
    return report


def _check_output(folder: Path) -> None:
    if not folder.parent.is_dir():
        raise InputError(f"output must lie in an existing folder, got {folder}; create {folder.parent}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"a native checkpoint must go into a new or empty folder, got {folder}; choose another")


def _parity(model: nn.Module, images: Tensor, folder: Path) -> Parity:
    """Compare the model with what a process without vbp and without network makes of the folder."""
    images = images.detach().cpu().float()
    given, found = folder.with_name("images.pt"), folder.with_name("logits.pt")
    torch.save(images, given)
    # Not the folder of the script, which holds modules of vbp, but what is installed.
    command = [sys.executable, "-P", str(native_process.__file__), str(folder), str(given), str(found)]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise InputError(f"the checkpoint cannot be loaded without vbp: {last}; report this with the model's name")
    reference = Portable(model, torch.float32)
    with torch.inference_mode():
        expected = torch.cat([reference(batch) for batch in torch.split(images, 32)])
    return compare_logits(expected, torch.load(found, weights_only=True))
