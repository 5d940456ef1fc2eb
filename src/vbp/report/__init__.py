"""What a run measured: data, tables, figures, one HTML page."""
