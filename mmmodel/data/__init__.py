"""Samples as WebDataset tar shards: prepare (stamps, synthetic), index, load, batch."""
