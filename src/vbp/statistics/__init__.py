"""What is measured on calibration images, exact to merge over batches, processes and files."""
