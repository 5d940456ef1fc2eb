"""ExecuTorch: a program gives the model's logits, or nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, randomise_
from torch import nn

import vbp
from vbp import InputError


def test_a_program_gives_the_models_logits(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="needs the extra executorch")
    torch.manual_seed(0)
    model, images = randomise_(FAMILIES["hf-vit"].build()).eval(), FAMILIES["hf-vit"].example(3, torch.float32)
    report = vbp.export_model(model, images, tmp_path / "model.pte", to="executorch")
    assert report.parity.relative_error <= 1e-5
    assert (report.parity.images, report.size) == (3, report.file.stat().st_size)
    with torch.inference_mode():
        expected = model(images).logits
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(vbp.open_exported(report.file)(images), expected, rtol=0, atol=atol)

    report.file.write_bytes(b"no program")
    with pytest.raises(InputError, match=r"model\.pte is damaged"):
        vbp.open_exported(report.file)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_other_precisions_are_refused(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"dtype must be one of float32 for executorch, got {dtype}"):
        vbp.export_model(nn.Flatten(), torch.zeros(2, 3, 4, 4), tmp_path / "a.pte", to="executorch", dtype=dtype)


def test_without_the_extra_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(InputError, match=r"executorch.*pip install 'vbp-pruning\[executorch\]'"):
        vbp.export_model(nn.Flatten(), torch.zeros(2, 3, 4, 4), tmp_path / "a.pte", to="executorch")
