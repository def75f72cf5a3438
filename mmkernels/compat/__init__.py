"""Drop-in replacements: torch's SDPA and varlen_attn, flash_attn, nn.MultiheadAttention.  Import them by name."""
