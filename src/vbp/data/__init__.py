"""From a path to batches of prepared images."""
