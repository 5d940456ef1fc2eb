"""What a model or a plan costs (MACs, parameters, milliseconds), and the largest plan within a budget."""
