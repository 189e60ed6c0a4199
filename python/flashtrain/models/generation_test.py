"""Generated tokens against the reference, computed anew for each."""

import math

import pytest
import torch

from flashtrain.models.generation import generate
from flashtrain.models.gpt_reference import OPTIONS, random_tokens, reference_logits, tiny


def test_generate_is_greedy_at_temperature_zero():
    model = tiny()
    prompt = random_tokens(seq_len=3)
    expected = prompt
    for _ in range(15):  # past max_seq_len: the window slides
        logits = reference_logits(model, expected[:, -12:])
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(prompt, 15, temperature=0.0), expected)
    assert torch.equal(model.generate(prompt, 15, top_k=1), expected)


def test_generate_is_a_function_of_the_generator():
    model = tiny()
    prompt = random_tokens(seq_len=3)

    def sample(seed, **options):
        return model.generate(prompt, 40, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert sample(1).shape == (2, 43)
    assert torch.equal(sample(1)[:, :3], prompt)
    hot = sample(1, temperature=1e3)  # all but uniform: every real token may come, no padding
    assert hot.max() < 37


def test_generate_with_top_k_stays_among_the_likeliest():
    model = tiny()
    prompt = random_tokens(batch=1, seq_len=3)
    allowed = set(reference_logits(model, prompt)[0, -1].topk(4).indices.tolist())
    generator = torch.Generator().manual_seed(0)
    drawn = {
        model.generate(prompt, 1, temperature=5.0, top_k=4, generator=generator)[0, -1].item()
        for _ in range(100)
    }
    assert drawn == allowed


def test_generate_draws_by_the_softmax():
    model = tiny()
    prompt = random_tokens(batch=1, seq_len=3)
    probabilities = torch.softmax(reference_logits(model, prompt)[0, -1] / 0.5, dim=-1)
    generator = torch.Generator().manual_seed(0)
    draws = model.generate(prompt.repeat(20_000, 1), 1, temperature=0.5, generator=generator)
    frequencies = torch.bincount(draws[:, -1], minlength=37) / 20_000
    assert (frequencies - probabilities).abs().max() < 5 * 0.5 / math.sqrt(20_000)


def test_generate_leaves_the_mode_as_it_was():
    model = tiny(resid_dropout=0.9)
    greedy = model.eval().generate(random_tokens(), 3, temperature=0.0)
    model.train()
    assert torch.equal(model.generate(random_tokens(), 3, temperature=0.0), greedy)
    assert model.training
    assert model.blocks[0].training


@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_the_cache_changes_no_logits(overrides, monkeypatch):
    model = tiny(**overrides)
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for use_cache in seen:
        hook = model.head.register_forward_hook(
            lambda module, inputs, output, kept=seen[use_cache]: kept.append(output)
        )
        tokens = generate(model, random_tokens(seq_len=3), 12, temperature=0.0, use_cache=use_cache)
        hook.remove()
    assert len(seen[True]) == len(seen[False]) == 12
    for cached, computed in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(cached, computed, rtol=0, atol=1e-5)
    # The 12th new token follows 14, of which 12 are in the window.
    expected = reference_logits(model, tokens[:, 2:14])[:, -1]
    torch.testing.assert_close(computed[:, :37].double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("use_cache", [False, True], ids=["anew", "cached"])
@pytest.mark.parametrize(
    "name", ["default", "half_rotary", "alibi", "window", "grouped_queries", "parallel"]
)
def test_prompts_of_unequal_length_do_not_know_each_other(name, use_cache):
    model = tiny(**OPTIONS[name])
    tokens = random_tokens(batch=3, seq_len=8)
    prompts = [tokens[0, :2], tokens[1, :8], tokens[2, :5]]
    together = generate(model, prompts, 14, temperature=0.0, use_cache=use_cache)
    assert together.shape == (3, 8 + 14)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate(model, prompt[None], 14, temperature=0.0)
        padding = 8 - len(prompt)
        assert torch.equal(row[padding:], alone[0])
        assert (row[:padding] == 0).all()


def test_generate_with_top_p_stays_among_the_likeliest():
    model = tiny()
    prompt = random_tokens(batch=1, seq_len=3)
    probabilities = torch.softmax(reference_logits(model, prompt)[0, -1] / 2.0, dim=-1)
    values, order = probabilities.sort(descending=True)
    allowed, total = set(), 0.0
    for token, value in zip(order.tolist(), values.tolist(), strict=True):
        allowed.add(token)
        total += value
        if total >= 0.5:
            break
    assert 1 < len(allowed) < 37
    draws = model.generate(
        prompt.repeat(5_000, 1),
        1,
        temperature=2.0,
        top_p=0.5,
        generator=torch.Generator().manual_seed(0),
    )
    assert set(draws[:, -1].tolist()) == allowed
    greedy = model.generate(prompt, 5, temperature=0.0)
    assert torch.equal(model.generate(prompt, 5, top_p=1e-9), greedy)
    assert model.generate(prompt.repeat(50, 1), 20, temperature=1e3, top_p=1.0).max() < 37


def test_temperatures_at_the_ends_of_floats():
    """Next to 0 sampling is greedy, next to infinity uniform, and never NaN."""
    model = tiny()
    prompt = random_tokens(seq_len=3)
    greedy = model.generate(prompt, 5, temperature=0.0)
    for temperature in (5e-324, 1e-300, 1e-40, 1e-38):
        assert torch.equal(model.generate(prompt, 5, temperature=temperature), greedy)
        tokens = model.generate(prompt, 5, temperature=temperature, top_k=10**30, top_p=0.9)
        assert torch.equal(tokens, greedy)
    draws = model.generate(prompt.repeat(500, 1), 1, temperature=1e308)[:, -1]
    assert set(draws.tolist()) == set(range(37))


def test_a_model_whose_logits_are_no_numbers_writes_nothing():
    model = tiny()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    for options in ({"temperature": 0.0}, {}, {"top_k": 3}):
        with pytest.raises(ValueError, match="logits are NaN or infinite"):
            model.generate(random_tokens(), 1, **options)


def test_unusable_calls_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate(random_tokens(seq_len=0), 1)
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate([], 1)
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate([random_tokens()[0], random_tokens(seq_len=0)[0]], 1)
    with pytest.raises(ValueError, match="temperature=-1"):
        model.generate(random_tokens(), 1, temperature=-1.0)
    for temperature in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"temperature={temperature} must be .* finite"):
            model.generate(random_tokens(), 1, temperature=temperature)
    for top_p in (math.nan, -1.0, 1.5):
        with pytest.raises(ValueError, match=f"top_p={top_p} must be in"):
            model.generate(random_tokens(), 1, top_p=top_p)
    with pytest.raises(ValueError, match="max_new_tokens=-1 must be at least 0"):
        model.generate(random_tokens(), -1)
    for many in (2**50, 2**70):
        with pytest.raises(ValueError, match=f"max_new_tokens={many}: .* do not fit into memory"):
            model.generate(random_tokens(), many)
    for prompt in (random_tokens()[0], random_tokens().float(), [random_tokens()]):
        with pytest.raises(ValueError, match=r"a prompt of shape .* came; supported: int64 \[T\]"):
            model.generate(prompt, 1)
    with pytest.raises(ValueError, match="top_k=0"):
        model.generate(random_tokens(), 1, top_k=0)
    with pytest.raises(ValueError, match="top_p=0"):
        model.generate(random_tokens(), 1, top_p=0.0)
