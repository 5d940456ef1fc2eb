"""Label-free refits of the pruned model to the dense one."""
