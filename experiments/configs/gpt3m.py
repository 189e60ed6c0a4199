"""GPT-3 medium (350M parameters) on The Pile.

Goal: validation loss 1.97 nats per token after 800,000 steps of 524,288 tokens, the last quarter of
    them at the lowest rate (published for :rotary).
Command: tools/bazel run //experiments:train -- --config=configs/gpt3m.py:rotary
Variants: rotary (positions by rotating half of each head instead of learned vectors), 8k (windows
    of 8192), 30b (60,000 steps), plain (every fusion off, for comparison); joined by commas.
Hardware: 8 GPUs; the micro batch follows their memory (--config.data.batch_size sets it), the
    global batch is always 256 windows of 2048.
Speed: 1.2M tokens/s, 100 h (8 h for :30b) on 8 H100 at 40% of their bf16 peak (computed, not
    measured).
Memory: weights, gradients and moments take 5.3 GiB, 16 bytes per parameter (computed); activations
    come on top.
Data: ${DATA_DIR}/the_pile, or --config.data.path.
"""

import ml_collections

from experiments.configs.gpt_common import gpt3_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    return gpt3_config(
        "gpt3m",
        arg,
        num_layers=24,
        d_model=1024,
        num_heads=16,
        lr=3e-4,
        micro_batches=(4, 8, 16, 32),
    )
