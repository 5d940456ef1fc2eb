"""Costs of a model or a plan (MACs, parameters, milliseconds), and the largest plan within a budget."""
