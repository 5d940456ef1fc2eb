"""The mathematics: tensors in, tensors out; no model, no file, no flag.

One idea of a paper a file, the equation on top.
"""
