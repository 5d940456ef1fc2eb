"""Fine-tune, distil, evaluate, checkpoint."""
