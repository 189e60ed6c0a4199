"""Mirror of flash_attn.ops.triton; the kernels are C++ and CUDA here."""
