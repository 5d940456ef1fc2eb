"""Flags in, exit code out; the small jobs inspect, latency, export, compare."""
