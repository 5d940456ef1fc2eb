"""Variance-Based Pruning (VBP) for PyTorch image classifiers."""

__version__ = "0.1.0"
