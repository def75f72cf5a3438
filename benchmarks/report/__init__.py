"""Reports: result files to Markdown tables, plots and one HTML page."""
