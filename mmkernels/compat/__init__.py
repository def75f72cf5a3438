"""Drop-in replacements: torch's SDPA and varlen_attn, flash_attn, Hugging Face's and timm's.  Import them by name."""
