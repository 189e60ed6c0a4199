"""GPT-3 large (760M parameters) on The Pile.

Goal: validation loss 1.84 nats per token after 800,000 steps of 524,288 tokens, the last quarter of
    them at the lowest rate (published for :rotary).
Command: tools/bazel run //experiments:train -- --config=configs/gpt3l.py:rotary
Variants: rotary (positions by rotating half of each head instead of learned vectors), 8k (windows
    of 8192), 30b (60,000 steps), plain (every fusion off, for comparison); joined by commas.
Hardware: 8 GPUs; the micro batch follows their memory (--config.data.batch_size sets it), the
    global batch is always 256 windows of 2048.
Speed: 0.58M tokens/s, 201 h (15 h for :30b) on 8 H100 at 40% of their bf16 peak (computed);
    96k tokens/s on one H100, 53%, without dropout (measured, see experiments/benchmarks/results).
Memory: weights, gradients and moments take 6.4 GiB, 9 bytes per parameter by ZeRO-1 on 8 (11.3 GiB
    on one) (computed); activations come on top.
Data: ${DATA_DIR}/the_pile, or --config.data.path.
"""

import ml_collections

from experiments.configs.gpt_common import gpt3_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    return gpt3_config(
        "gpt3l",
        arg,
        num_layers=24,
        d_model=1536,
        num_heads=16,
        lr=2.5e-4,
        micro_batches=(2, 4, 8, 16),
        zero1=True,
    )
