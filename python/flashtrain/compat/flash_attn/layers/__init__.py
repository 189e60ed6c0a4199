"""Mirror of flash_attn.layers."""
