"""Prompts of all lengths; other reports about models have their tests beside the code.

module_state_test: meta init; wrapping_test: compiled models and modes; hf_gpt2_test: files of
others; transforms_test: dynamic shapes, dropout in recomputed blocks.
"""

from typing import Any

import pytest
import torch

from flashtrain.models.gpt import GPT, GPTConfig

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "rotary": {"learned_positions": False, "rotary_fraction": 1.0},
    "alibi": {"alibi": True, "learned_positions": False},
    "window": {"window": 5, "num_kv_heads": 1},
    "parallel": {"block": "parallel"},
    "post_norm_plain": {"block": "post_norm", "fused": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_prompts_of_all_lengths_together(name: str) -> None:
    """huggingface/transformers#3021, #21080: unequal lengths, prompts longer than the context."""
    torch.manual_seed(0)
    shape: Any = {"num_layers": 2, "d_model": 24, "num_heads": 3, "max_seq_len": 16}
    model = GPT(GPTConfig(vocab_size=50, **shape, init_std=0.3, **OPTIONS[name])).eval()
    prompts = [torch.randint(0, 50, (length,)) for length in (1, 40, 7, 16, 20)]
    together = model.generate(prompts, 8, temperature=0.0)
    for row, prompt in zip(together, prompts, strict=True):
        tokens = prompt[None]
        with torch.no_grad():
            for _ in range(8):
                token = model(tokens[:, -16:])[:, -1].argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, token], dim=1)
        assert torch.equal(row[-tokens.shape[1] :], tokens[0])
