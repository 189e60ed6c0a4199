"""GPT-3 2.7B on The Pile.

Goal: validation loss 1.69 nats per token, published for this recipe with rotary positions (here
    they are learned), after 300,000 steps of 1,048,576 tokens. The published run went on for a
    third as many steps at the last learning rate.
Command: tools/bazel run //experiments:train -- --config=configs/gpt3_2p7b.py
Variants: plain (every fusion off, for comparison), 8k (windows of 8192), 60b (60,000 steps),
    hdim128 (20 heads of 128 instead of 32 of 80).
Hardware: 8 GPUs; the micro batch follows their memory, the global batch is always 512 windows of
    2048.
Speed: 0.18M tokens/s and 21 days on 8 H100 at 40% of their bf16 peak (computed, not measured).
Data: a prepared folder in ${DATA_DIR}/the_pile, or --config.data.path.
"""

import ml_collections

from experiments.configs.gpt_common import gpt3_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    hdim128 = "hdim128" in (arg or "").split(",")
    config = gpt3_config(
        "gpt3_2p7b",
        arg,
        num_layers=32,
        d_model=2560,
        num_heads=20 if hdim128 else 32,
        lr=1.6e-4,
        micro_batches=(1, 1, 2, 4),
        large=True,
        extra_variants=("hdim128",),
    )
    config.model.init_std = 0.0125
    return config
