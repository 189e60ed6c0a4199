"""GPT-2 large (774M parameters) on OpenWebText.

Goal: validation loss 2.49 nats per token after 400,000 steps of 524,288 tokens (published for this
    recipe).
Command: tools/bazel run //experiments:train -- --config=configs/gpt2l.py
Variants: plain (every fusion off, for comparison).
Hardware: 8 GPUs; the micro batch follows their memory (--config.data.batch_size sets it), the
    global batch is always 512 windows of 1024.
Speed: 0.61M tokens/s and 96 h on 8 H100 at 40% of their bf16 peak (computed);
    93k on one H100, 49%, without dropout (measured, see experiments/benchmarks/results).
Memory: weights, gradients and moments take 6.5 GiB, 9 bytes per parameter by ZeRO-1 on 8 (11.5 GiB
    on one) (computed); activations come on top.
Data: ${DATA_DIR}/openwebtext, or --config.data.path.
"""

import ml_collections

from experiments.configs.gpt_common import gpt2_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    return gpt2_config(
        "gpt2l",
        arg,
        num_layers=36,
        d_model=1280,
        num_heads=20,
        lr=1.5e-4,
        micro_batches=(4, 8, 16, 32),
        zero1=True,
    )
