"""What users of other rotary embeddings have reported.

Reports about tables, XPos and compiled calls in place have their tests beside the code, in
rotary_embedding_test.py and rotary_torch_test.py of flashtrain.ops.
"""

import pytest
import torch

from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.ops.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

COS, SIN = torch.rand(2, 4, 4)


@pytest.mark.parametrize(
    ("shape", "sizes", "rotate"),
    [
        ((1, 4, 1, 8), (1, 4, 4, 8), lambda x: apply_rotary_emb(x, COS, SIN, inplace=True)),
        ((1, 4, 3, 2, 8), (3, 4, 3, 2, 8), lambda x: apply_rotary_emb_qkv_(x, COS, SIN)),
        ((1, 4, 2, 2, 8), (2, 4, 2, 2, 8), lambda x: apply_rotary_emb_kv_(x, COS, SIN)),
        ((1, 4, 3, 1, 8), (1, 4, 3, 3, 8), RotaryEmbedding(8)),
    ],
    ids=["x", "qkv", "kv", "module"],
)
def test_in_place_on_expanded_tensors(shape, sizes, rotate):
    """pytorch/pytorch#17935: elements that share memory were rotated several times."""
    base = torch.randn(shape)
    kept = base.clone()
    with pytest.raises(ValueError, match="elements share memory"):
        rotate(base.expand(sizes))
    assert torch.equal(base, kept)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("fused", [True, False])
def test_compiled_rotary_model_of_several_lengths(dynamic, fused):
    """pytorch/pytorch#133166: numbers on modules become symbols."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=50, num_layers=1, d_model=24, num_heads=3, max_seq_len=32,
        learned_positions=False, rotary_fraction=0.5, fused=fused,
    )  # fmt: skip
    model = GPT(config)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, length in ((2, 5), (3, 9), (4, 32)):
        tokens = torch.randint(0, 50, (batch, length))
        torch.testing.assert_close(compiled(tokens, tokens), model(tokens, tokens))
