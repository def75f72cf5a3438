"""Samples as WebDataset tar shards: made (stamps, synthetic, your own files), indexed, read."""
