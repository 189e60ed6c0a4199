"""Mirror of flash_attn.ops."""
