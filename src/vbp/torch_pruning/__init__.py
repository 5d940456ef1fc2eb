"""VBP inside Torch-Pruning: an importance and a pruner behind its interfaces, over the core's compensation.

Source: Berisha, Mehnert, Condurache, "Variance-Based Pruning for Accelerating and Compressing Trained Networks",
ICCV 2025, arXiv 2507.12988.
"""

from __future__ import annotations
