"""A sweep on the embedded digits."""

from __future__ import annotations

from pathlib import Path

import pytest

from vbp.data.digits import MODEL_KWARGS, MODEL_NAME, WEIGHTS
from vbp.recipes.demo import PREPROCESSING_OVERRIDES
from vbp.sweeps.config import SweepConfig


@pytest.fixture
def config(digits: Path, tmp_path: Path) -> SweepConfig:
    """Return a sweep of a few seconds."""
    return SweepConfig(
        data_path=str(digits),
        keep_ratios=(0.7, 0.4),
        criteria=("variance/mean", "l2/none"),
        model_name=MODEL_NAME,
        model_kwargs=dict(MODEL_KWARGS),
        checkpoint=WEIGHTS,
        **PREPROCESSING_OVERRIDES,
        num_workers=0,
        calib_samples=60,
        limit_val=100,
        save_dir=tmp_path / "sweep",
        device="cpu",
    )
