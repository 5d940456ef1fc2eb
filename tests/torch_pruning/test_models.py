"""Small networks for the Torch-Pruning tests, and the oracle: the dense model with removed channels clamped."""

from __future__ import annotations
