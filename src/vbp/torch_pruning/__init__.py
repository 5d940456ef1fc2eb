"""VBP inside Torch-Pruning: an importance and a pruner behind its interfaces, over the core's compensation.

Source: Berisha, Mehnert, Condurache, "Variance-Based Pruning for Accelerating and Compressing Trained Networks",
ICCV 2025, arXiv 2507.12988.
"""

from vbp.torch_pruning.compensate import reestimate_batchnorm_
from vbp.torch_pruning.importance import VarianceImportance
from vbp.torch_pruning.install import install
from vbp.torch_pruning.mean_check import MeanMovement
from vbp.torch_pruning.means import ChannelMeans
from vbp.torch_pruning.pruner import VBPPruner

__all__ = ["ChannelMeans", "MeanMovement", "VBPPruner", "VarianceImportance", "install", "reestimate_batchnorm_"]
