"""Packed, mask-aware attention.  `api.attention` is the public function."""
