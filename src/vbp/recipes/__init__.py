"""The jobs `vbp run`, `vbp finetune`, `vbp demo`: configuration, and scripts that read top to bottom.

Start at `run.py`.
"""
