"""GPT-3 XL (1.3B parameters) on The Pile.

Goal: validation loss 1.77 nats per token after 400,000 steps of 1,048,576 tokens, the last quarter
    of them at the lowest rate (published for :rotary).
Command: tools/bazel run //experiments:train -- --config=configs/gpt3xl.py:rotary
Variants: rotary (positions by rotating half of each head instead of learned vectors), 8k (windows
    of 8192), 60b (60,000 steps), plain (every fusion off, for comparison); joined by commas.
Hardware: 8 GPUs; the micro batch follows their memory (--config.data.batch_size sets it), the
    global batch is always 512 windows of 2048.
Speed: 0.35M tokens/s, 14 days (50 h for :60b) on 8 H100 at 40% of their bf16 peak (computed);
    62k tokens/s on one H100, 57%, without dropout (measured, see experiments/benchmarks/results).
Memory: weights, gradients and moments take 11.0 GiB, 9 bytes per parameter by ZeRO-1 on 8 (19.6 GiB
    on one) (computed); activations come on top.
Data: ${DATA_DIR}/the_pile, or --config.data.path.
"""

import ml_collections

from experiments.configs.gpt_common import gpt3_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    return gpt3_config(
        "gpt3xl",
        arg,
        num_layers=24,
        d_model=2048,
        num_heads=16,
        lr=2e-4,
        micro_batches=(1, 2, 4, 8),
        zero1=True,
        large=True,
    )
