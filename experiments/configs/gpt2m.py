"""GPT-2 medium (355M parameters) on OpenWebText.

Goal: validation loss 2.64 nats per token after 400,000 steps of 524,288 tokens (published for this
    recipe).
Command: tools/bazel run //experiments:train -- --config=configs/gpt2m.py
Variants: plain (every fusion off, for comparison).
Hardware: 8 GPUs; the micro batch follows their memory (--config.data.batch_size sets it), the
    global batch is always 512 windows of 1024.
Speed: 1.3M tokens/s and 45 h on 8 H100 at 40% of their bf16 peak (computed);
    0.19M on one H100, 47%, without dropout (measured, see experiments/benchmarks/results).
Memory: weights, gradients and moments take 5.3 GiB, 16 bytes per parameter (computed); activations
    come on top.
Data: ${DATA_DIR}/openwebtext, or --config.data.path.
"""

import ml_collections

from experiments.configs.gpt_common import gpt2_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    return gpt2_config(
        "gpt2m",
        arg,
        num_layers=24,
        d_model=1024,
        num_heads=16,
        lr=1.5e-4,
        micro_batches=(8, 16, 32, 64),
    )
