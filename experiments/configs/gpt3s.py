"""GPT-3 small (125M parameters) on The Pile.

Goal: validation loss 2.20 nats per token after 800,000 steps of 524,288 tokens, the last quarter of
    them at the lowest rate (published for :rotary).
Command: tools/bazel run //experiments:train -- --config=configs/gpt3s.py:rotary
Variants: rotary (positions by rotating half of each head instead of learned vectors), 8k (windows
    of 8192), 30b (60,000 steps), plain (every fusion off, for comparison); joined by commas.
Hardware: 8 GPUs; the trainer chooses the largest micro batch that fits their memory
    (--config.data.batch_size sets it), the global batch is always 256 windows of 2048.
Speed: 3.3M tokens/s, 36 h (3 h for :30b) on 8 H100 at 40% of their bf16 peak (computed, not
    measured).
Memory: weights, gradients and moments take 1.9 GiB, 16 bytes per parameter (computed); activations
    come on top.
Data: ${DATA_DIR}/the_pile, or --config.data.path.
"""

import ml_collections

from experiments.configs.variants import parse_variants


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    variants = parse_variants("gpt3s", arg, ("plain", "rotary", "8k", "30b"))
    fused, rotary = "plain" not in variants, "rotary" in variants
    long, short = "8k" in variants, "30b" in variants
    config = ml_collections.ConfigDict()

    config.model = ml_collections.ConfigDict()
    config.model.vocab_size = 50257
    config.model.num_layers = 12
    config.model.d_model = 768
    config.model.num_heads = 12
    config.model.max_seq_len = 8192 if long else 2048
    config.model.learned_positions = not rotary
    config.model.rotary_fraction = 0.5 if rotary else 0.0
    config.model.resid_dropout = 0.1
    config.model.embd_dropout = 0.1
    config.model.attn_dropout = 0.1
    config.model.scale_attn_by_inverse_layer_idx = True
    config.model.residual_in_fp32 = False
    config.model.init_std = 0.02
    config.model.fused = fused

    config.data = ml_collections.ConfigDict()
    config.data.source = "the_pile"
    config.data.path = ""
    config.data.seq_len = 8192 if long else 2048
    config.data.batch_size = 0  # the largest that fits
    config.data.seed = 1111

    config.optim = ml_collections.ConfigDict()
    config.optim.lr = 6e-4
    config.optim.min_lr = 0.1 * config.optim.lr
    config.optim.warmup_lr = 1e-6
    config.optim.warmup_steps = 600 if short else 8_000
    config.optim.schedule = "cosine"
    config.optim.cycle_steps = 60_000 if short else 600_000
    config.optim.betas = (0.9, 0.999)
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.fused = fused

    config.trainer = ml_collections.ConfigDict()
    config.trainer.max_steps = 60_000 if short else 800_000
    config.trainer.global_batch_size = 64 if long else 256
    config.trainer.grad_clip = 1.0
    config.trainer.precision = "bf16"
    config.trainer.devices = 0
    config.trainer.strategy = "ddp"
    config.trainer.compile = fused
    config.trainer.seed = 1111
    config.trainer.eval_every = 2000
    config.trainer.save_every = 1000
    config.trainer.log_every = 10
    config.trainer.sample_tokens = 256

    return config.lock()
