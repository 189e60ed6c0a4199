"""GPT-2 XL (1.6B parameters) on OpenWebText.

Goal: validation loss 2.39 nats per token after 400,000 steps of 524,288 tokens (published for this
    recipe).
Command: tools/bazel run //experiments:train -- --config=configs/gpt2xl.py
Variants: plain (every fusion off, for comparison).
Hardware: 8 GPUs; the trainer chooses the largest micro batch that fits their memory
    (--config.data.batch_size sets it), the global batch is always 512 windows of 1024.
Speed: 49k tokens/s on one H200 without torch.compile, 51% of its bf16 peak (measured, see
    experiments/benchmarks/results); so 150 h on 8 (computed).
Memory: weights, gradients and moments take 13.1 GiB, 9 bytes per parameter by ZeRO-1 on 8 (23.2 GiB
    on one) (computed); activations come on top.
Data: ${DATA_DIR}/openwebtext, or --config.data.path.
"""

import ml_collections

from experiments.configs.variants import parse_variants


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    fused = "plain" not in parse_variants("gpt2xl", arg, ("plain",))
    config = ml_collections.ConfigDict()

    config.model = ml_collections.ConfigDict()
    config.model.vocab_size = 50257
    config.model.num_layers = 48
    config.model.d_model = 1600
    config.model.num_heads = 25
    config.model.max_seq_len = 1024
    config.model.resid_dropout = 0.1
    config.model.embd_dropout = 0.1
    config.model.attn_dropout = 0.1
    config.model.scale_attn_by_inverse_layer_idx = True
    config.model.residual_in_fp32 = False
    config.model.init_std = 0.02
    config.model.fused = fused

    config.data = ml_collections.ConfigDict()
    config.data.source = "openwebtext"
    config.data.path = ""
    config.data.seq_len = 1024
    config.data.batch_size = 0  # the largest that fits
    config.data.seed = 1111

    config.optim = ml_collections.ConfigDict()
    config.optim.lr = 1.5e-4
    config.optim.min_lr = 0.0
    config.optim.warmup_steps = 4000
    config.optim.schedule = "linear"
    config.optim.betas = (0.9, 0.999)
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.fused = fused

    config.trainer = ml_collections.ConfigDict()
    config.trainer.max_steps = 400_000
    config.trainer.global_batch_size = 512
    config.trainer.grad_clip = 1.0
    config.trainer.precision = "fp16"
    config.trainer.devices = 0
    config.trainer.strategy = "zero1"
    config.trainer.compile = fused
    config.trainer.seed = 1111
    config.trainer.eval_every = 1000
    config.trainer.save_every = 1000
    config.trainer.log_every = 10
    config.trainer.sample_tokens = 256

    return config.lock()
