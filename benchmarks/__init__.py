"""Benchmarks: every kernel against every peer on this machine, as percent of what this machine can do."""
