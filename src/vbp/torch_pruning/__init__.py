"""VBP inside Torch-Pruning: an importance and a pruner behind its interfaces, over the core's compensation.

Source: Berisha, Mehnert, Condurache, "Variance-Based Pruning for Accelerating and Compressing Trained Networks",
ICCV 2025, arXiv 2507.12988.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vbp.runtime.lazy import lazy_names

# The public names: one more is one more line here. `import vbp` imports this package, and is to import no library.
if TYPE_CHECKING:
    from vbp.torch_pruning.compensate import ChannelMeans as ChannelMeans
    from vbp.torch_pruning.compensate import reestimate_batchnorm_ as reestimate_batchnorm_
    from vbp.torch_pruning.hook import install as install
    from vbp.torch_pruning.importance import VarianceImportance as VarianceImportance
    from vbp.torch_pruning.mean_check import MeanMovement as MeanMovement
    from vbp.torch_pruning.pruner import VBPPruner as VBPPruner

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, __file__)
