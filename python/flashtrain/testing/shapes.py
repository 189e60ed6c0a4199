"""Sizes that find mistakes: 0, 1, odd, around vector widths and blocks, real models', huge."""

ROWS = (0, 1, 3, 17, 130)

# Around the widths of vectors (4, 8, 16), warps (32) and blocks (1024); the hidden sizes of GPT-2
# and GPT-3; past what fits in registers (8192) and in shared memory (16384).
COLS = (1, 2, 7, 8, 31, 64, 192, 513, 768, 1024, 1600, 2048, 2560, 3000, 4096)
COLS_HUGE = (8192, 8193, 16384, 20000)
