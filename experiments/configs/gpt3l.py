"""GPT-3 large (760M parameters) on The Pile.

Goal: validation loss 1.84 nats per token, published for this recipe with rotary positions (here
    they are learned), after 600,000 steps of 524,288 tokens. The published run went on for a third
    as many steps at the last learning rate.
Command: tools/bazel run //experiments:train -- --config=configs/gpt3l.py
Variants: plain (every fusion off, for comparison), 8k (windows of 8192), 30b (60,000 steps).
Hardware: 8 GPUs; the micro batch follows their memory, the global batch is always 256 windows of
    2048.
Speed: 0.58M tokens/s and 6 days on 8 H100 at 40% of their bf16 peak (computed, not measured).
Data: a prepared folder in ${DATA_DIR}/the_pile, or --config.data.path.
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
    )
