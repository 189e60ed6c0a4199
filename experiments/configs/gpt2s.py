"""GPT-2 small (124M parameters) on OpenWebText.

Goal: validation loss 2.89 nats per token after 400,000 steps of 524,288 tokens (published for this
    recipe).
Command: tools/bazel run //experiments:train -- --config=configs/gpt2s.py
Variants: plain (every fusion off, for comparison).
Hardware: 8 GPUs; the micro batch follows their memory (--config.data.batch_size sets it), the
    global batch is always 512 windows of 1024.
Speed: 0.49M tokens/s on one H100, 0.95M on two, 42% of their bf16 peak (measured in bf16, see
    experiments/benchmarks/results); so 3.8M tokens/s and 15 h on 8 (computed).
Memory: 14.4 GiB on one H100 in bf16 with micro batches of 64 (measured).
Data: ${DATA_DIR}/openwebtext, or --config.data.path.
"""

import ml_collections

from experiments.configs.gpt_common import gpt2_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    return gpt2_config(
        "gpt2s",
        arg,
        num_layers=12,
        d_model=768,
        num_heads=12,
        lr=6e-4,
        micro_batches=(16, 32, 64, 64),
    )
