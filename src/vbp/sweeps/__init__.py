"""The job of `vbp sweep`: many prunings of one dense model, compared in one table, two figures and one HTML page.

Start at `sweep.py`.
"""
