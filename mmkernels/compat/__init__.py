"""Drop-in faces: torch's SDPA and varlen_attn, flash_attn, nn.MultiheadAttention.  Import the one you want by name."""
