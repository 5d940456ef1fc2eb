"""The process: ranks, precision, files, signals, log, progress."""
