"""GPT-2 XL (1.6B parameters) on OpenWebText.

Goal: validation loss 2.39 nats per token after 400,000 steps of 524,288 tokens (published for this
    recipe).
Command: tools/bazel run //experiments:train -- --config=configs/gpt2xl.py
Variants: plain (every fusion off, for comparison).
Hardware: 8 GPUs; the micro batch follows their memory (--config.data.batch_size sets it), the
    global batch is always 512 windows of 1024.
Speed: 0.31M tokens/s and 189 h on 8 H100 at 40% of their bf16 peak (computed);
    44k on one H100, 46%, without dropout (measured, see experiments/benchmarks/results).
Memory: weights, gradients and moments take 13.1 GiB, 9 bytes per parameter by ZeRO-1 on 8 (23.2 GiB
    on one) (computed); activations come on top.
Data: ${DATA_DIR}/openwebtext, or --config.data.path.
"""

import ml_collections

from experiments.configs.gpt_common import gpt2_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    return gpt2_config(
        "gpt2xl",
        arg,
        num_layers=48,
        d_model=1600,
        num_heads=25,
        lr=1.5e-4,
        micro_batches=(2, 4, 8, 16),
        zero1=True,
    )
