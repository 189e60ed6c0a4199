"""GPT-3 2.7B on The Pile.

Goal: validation loss 1.69 nats per token after 400,000 steps of 1,048,576 tokens, the last quarter
    of them at the lowest rate (published for :rotary).
Command: tools/bazel run //experiments:train -- --config=configs/gpt3_2p7b.py:rotary
Variants: rotary (positions by rotating half of each head instead of learned vectors), 8k (windows
    of 8192), 60b (60,000 steps), plain (every fusion off, for comparison), hdim128 (20 heads of 128
    instead of 32 of 80); joined by commas.
Hardware: 8 GPUs; the micro batch follows their memory (--config.data.batch_size sets it), the
    global batch is always 512 windows of 2048.
Speed: 0.18M tokens/s, 27 days (4 days for :60b) on 8 H100 at 40% of their bf16 peak (computed, not
    measured).
Memory: weights, gradients and moments take 22.2 GiB, 9 bytes per parameter by ZeRO-1 on 8 (39.5 GiB
    on one) (computed); activations come on top.
Data: ${DATA_DIR}/the_pile, or --config.data.path.
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
        zero1=True,
        large=True,
        extra_variants=("hdim128",),
    )
    config.model.init_std = 0.0125
    return config
