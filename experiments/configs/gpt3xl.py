"""GPT-3 XL (1.3B parameters) on The Pile.

Goal: validation loss 1.77 nats per token after 400,000 steps of 1,048,576 tokens, the last quarter
    of them at the lowest rate (published for :rotary).
Command: tools/bazel run //experiments:train -- --config=configs/gpt3xl.py:rotary
Variants: rotary (positions by rotating half of each head instead of learned vectors), 8k (windows
    of 8192), 60b (60,000 steps), plain (every fusion off, for comparison); joined by commas.
Hardware: 8 GPUs; the trainer chooses the largest micro batch that fits their memory
    (--config.data.batch_size sets it), the global batch is always 512 windows of 2048.
Speed: 0.35M tokens/s, 14 days (50 h for :60b) on 8 H100 at 40% of their bf16 peak (computed);
    62k tokens/s on one H100, 57%, without dropout (measured, see experiments/benchmarks/results).
Memory: weights, gradients and moments take 11.0 GiB, 9 bytes per parameter by ZeRO-1 on 8 (19.6 GiB
    on one) (computed); activations come on top.
Data: ${DATA_DIR}/the_pile, or --config.data.path.
"""

import ml_collections

from experiments.configs.variants import parse_variants


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    variants = parse_variants("gpt3xl", arg, ("plain", "rotary", "8k", "60b"))
    fused, rotary = "plain" not in variants, "rotary" in variants
    long, short = "8k" in variants, "60b" in variants
    config = ml_collections.ConfigDict()

    config.model = ml_collections.ConfigDict()
    config.model.vocab_size = 50257
    config.model.num_layers = 24
    config.model.d_model = 2048
    config.model.num_heads = 16
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
    config.optim.lr = 2e-4
    config.optim.min_lr = 0.1 * config.optim.lr
    config.optim.warmup_lr = 1e-6
    config.optim.warmup_steps = 600 if short else 4_000
    config.optim.schedule = "cosine"
    config.optim.cycle_steps = 60_000 if short else 300_000
    config.optim.betas = (0.9, 0.999)
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.fused = fused

    config.trainer = ml_collections.ConfigDict()
    config.trainer.max_steps = 60_000 if short else 400_000
    config.trainer.global_batch_size = 128 if long else 512
    config.trainer.grad_clip = 1.0
    config.trainer.precision = "bf16"
    config.trainer.devices = 0
    config.trainer.strategy = "zero1"
    config.trainer.compile = fused
    config.trainer.seed = 1111
    config.trainer.eval_every = 1000
    config.trainer.save_every = 1000
    config.trainer.log_every = 10
    config.trainer.sample_tokens = 256

    return config.lock()
