"""Mirror of flash_attn.losses."""
