"""ViT-B/16 (86.6M parameters) on ImageNet-1k, from scratch.

Goal: not measured here. Beyer et al. 2022 (arXiv:2205.01580) report 76.5% accuracy for ViT-S/16
    after 90 epochs of a close recipe, which adds mixup.
Command: tools/bazel run //experiments:train -- --config=configs/vit_b_imagenet.py
Variants: ti, s, l (the other sizes, with a patch size of 16), plain (every fusion off, for
    comparison).
Hardware: 8 GPUs; images are decoded on all CPU cores (needs torchvision).
Data: ${DATA_DIR}/imagenet or --config.data.path, with train/<class>/<image> and
    val/<class>/<image>.

112,600 steps of 1,024 images of 224 x 224 pixels: 90 epochs.
"""

import ml_collections

from experiments.configs.variants import parse_variants

# Layers, width and heads by size.
_SIZES = {
    "ti": (12, 192, 3),
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe, or its variants joined by commas in `arg`."""
    variants = parse_variants("vit_b_imagenet", arg, ("ti", "s", "l", "plain"))
    sizes = sorted(variants - {"plain"})
    if len(sizes) > 1:
        raise ValueError(f"vit_b_imagenet takes one size, got {' and '.join(sizes)}")
    num_layers, d_model, num_heads = _SIZES[sizes[0] if sizes else "b"]
    config = ml_collections.ConfigDict()

    config.model = ml_collections.ConfigDict()
    config.model.family = "vit"
    config.model.image_size = 224
    config.model.patch_size = 16
    config.model.num_channels = 3
    config.model.num_classes = 1000
    config.model.num_layers = num_layers
    config.model.d_model = d_model
    config.model.num_heads = num_heads
    config.model.drop_path = 0.1
    config.model.label_smoothing = 0.1
    config.model.fused = "plain" not in variants

    config.data = ml_collections.ConfigDict()
    config.data.source = "imagenet"
    config.data.path = ""
    config.data.workers = 0
    config.data.batch_size = 0  # the largest that fits
    config.data.seed = 1111

    config.optim = ml_collections.ConfigDict()
    config.optim.lr = 1e-3
    config.optim.min_lr = 0.0
    config.optim.warmup_steps = 10_000
    config.optim.schedule = "cosine"
    config.optim.betas = (0.9, 0.999)
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.1

    config.trainer = ml_collections.ConfigDict()
    config.trainer.max_steps = 112_600
    config.trainer.global_batch_size = 1024
    config.trainer.grad_clip = 1.0
    config.trainer.precision = "bf16"
    config.trainer.devices = 0
    config.trainer.compile = "plain" not in variants
    config.trainer.seed = 1111
    config.trainer.eval_every = 5000
    config.trainer.save_every = 1000
    config.trainer.log_every = 50
    config.trainer.sample_tokens = 0
    return config.lock()
