"""What a run or a sweep measured: data, tables, figures, one HTML page."""
