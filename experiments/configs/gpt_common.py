"""What the GPT-2 and GPT-3 recipes share: data, optimizer, schedule, and the choice of micro batch.

A recipe names its size; the builders here add what its family has in common. Variants are words in
the config's argument, joined by commas, as in --config=configs/gpt3l.py:rotary,8k.
"""

from collections.abc import Collection

import ml_collections

# Sizes of device memory, in GB, at which the micro batch of a recipe changes.
_MEMORY_STEPS_GB = (24, 40, 80)


def micro_batch(by_memory: tuple[int, int, int, int]) -> int:
    """The largest micro batch that fits the first GPU; the smallest one where there is none.

    Args:
        by_memory: sequences for less than 24, less than 40, less than 80, and from 80 GB on.
    """
    import torch  # not needed to read a recipe of another family

    if not torch.cuda.is_available():
        return by_memory[0]
    memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    return by_memory[sum(memory_gb >= step for step in _MEMORY_STEPS_GB)]


def parse_variants(recipe: str, arg: str | None, supported: Collection[str]) -> set[str]:
    """The words of a config's argument.

    Raises:
        ValueError: a word is not supported; the message names those that are.
    """
    variants = {word for word in (arg or "").split(",") if word}
    unknown = sorted(variants - set(supported))
    if unknown:
        raise ValueError(
            f"{recipe} has no variant {unknown[0]!r}; supported: {', '.join(sorted(supported))}"
        )
    return variants


def _gpt_config(
    *, num_layers: int, d_model: int, num_heads: int, seq_len: int, lr: float, zero1: bool
) -> ml_collections.ConfigDict:
    """What GPT-2 and GPT-3 have in common."""
    config = ml_collections.ConfigDict()

    config.model = ml_collections.ConfigDict()
    config.model.vocab_size = 50257
    config.model.num_layers = num_layers
    config.model.d_model = d_model
    config.model.num_heads = num_heads
    config.model.max_seq_len = seq_len
    config.model.resid_dropout = 0.1
    config.model.embd_dropout = 0.1
    config.model.attn_dropout = 0.1
    config.model.scale_attn_by_inverse_layer_idx = True
    config.model.residual_in_fp32 = False
    config.model.init_std = 0.02
    config.model.fused = True

    config.data = ml_collections.ConfigDict()
    config.data.path = ""
    config.data.seq_len = seq_len
    config.data.seed = 1111

    config.optim = ml_collections.ConfigDict()
    config.optim.lr = lr
    config.optim.betas = (0.9, 0.999)
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.1

    config.trainer = ml_collections.ConfigDict()
    config.trainer.devices = 0
    config.trainer.strategy = "zero1" if zero1 else "ddp"
    config.trainer.grad_clip = 1.0
    config.trainer.seed = 1111
    config.trainer.save_every = 1000
    config.trainer.log_every = 10
    config.trainer.sample_tokens = 256
    return config


def gpt2_config(
    recipe: str,
    arg: str | None,
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    lr: float,
    micro_batches: tuple[int, int, int, int],
    zero1: bool = False,
) -> ml_collections.ConfigDict:
    """GPT-2 on OpenWebText: 400,000 steps of 512 x 1024 tokens, fp16, linear schedule."""
    variants = parse_variants(recipe, arg, ("plain",))
    config = _gpt_config(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        seq_len=1024,
        lr=lr,
        zero1=zero1,
    )
    fused = "plain" not in variants
    config.model.fused = config.optim.fused = config.trainer.compile = fused

    config.data.source = "openwebtext"
    config.data.batch_size = micro_batch(micro_batches)

    config.optim.schedule = "linear"
    config.optim.warmup_steps = 4000
    config.optim.min_lr = 0.0

    config.trainer.max_steps = 400_000
    config.trainer.global_batch_size = 512
    config.trainer.precision = "fp16"
    config.trainer.eval_every = 1000
    return config.lock()


def gpt3_config(
    recipe: str,
    arg: str | None,
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    lr: float,
    micro_batches: tuple[int, int, int, int],
    zero1: bool = False,
    large: bool = False,
    extra_variants: Collection[str] = (),
) -> ml_collections.ConfigDict:
    """GPT-3 on The Pile: windows of 2048, bf16, cosine down to a tenth of the rate over 315 billion
    tokens, then a third as many at that rate.

    Args:
        zero1: the optimizer's state is split among the GPUs.
        large: 1.3 billion parameters and more take 2**20 tokens a step instead of 2**19, and half
            the steps.
        extra_variants: words the caller handles itself.
    """
    short = "60b" if large else "30b"
    variants = parse_variants(recipe, arg, ("plain", "rotary", "8k", short, *extra_variants))
    long_context = "8k" in variants
    seq_len = 8192 if long_context else 2048
    config = _gpt_config(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        seq_len=seq_len,
        lr=lr,
        zero1=zero1,
    )
    fused = "plain" not in variants
    config.model.fused = config.optim.fused = config.trainer.compile = fused
    rotary = "rotary" in variants
    config.model.learned_positions = not rotary
    config.model.rotary_fraction = 0.5 if rotary else 0.0

    micro, global_batch_size = micro_batch(micro_batches), 512 if large else 256
    if long_context:  # the same tokens in windows four times as long
        micro, global_batch_size = max(1, micro // 4), global_batch_size // 4
    config.data.source = "the_pile"
    config.data.batch_size = micro

    config.optim.schedule = "cosine"
    config.optim.min_lr = 0.1 * lr
    config.optim.warmup_lr = 1e-6

    if short in variants:
        max_steps = config.optim.cycle_steps = 60_000
    else:
        max_steps = 400_000 if large else 800_000
        config.optim.cycle_steps = max_steps * 3 // 4
    config.trainer.max_steps = max_steps
    config.optim.warmup_steps = max_steps // 100
    config.trainer.global_batch_size = global_batch_size
    config.trainer.precision = "bf16"
    config.trainer.eval_every = 1000 if large else 2000
    return config.lock()
