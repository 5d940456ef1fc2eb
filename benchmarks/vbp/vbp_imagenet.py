"""Variance-Based Pruning on ImageNet: prune a trained classifier, fine-tune it, write log and checkpoints.

The flags are listed by --help and explained in README.md beside this file.
"""

from __future__ import annotations

import sys

from vbp.cli.main import run_benchmark

if __name__ == "__main__":
    sys.exit(run_benchmark("benchmarks/vbp/vbp_imagenet.py"))
