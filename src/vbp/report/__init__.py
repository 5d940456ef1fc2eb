"""What a run or a sweep found: data, tables, figures, one HTML page."""
