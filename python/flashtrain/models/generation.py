"""Text generation: prompts in, continued prompts out, each token computed once.

Prompts of unequal length are aligned at their ends, so that all grow in the same column; what is to
the left of a prompt is seen by nobody and takes no position.

Legend: B batch, T tokens of a call, S tokens so far, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flashtrain.models.gpt import GPT
from flashtrain.models.wrapping import evaluating, unwrap
from flashtrain.modules.attention import KVCache
from flashtrain.modules.ids import outside


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continues prompts; beyond max_seq_len the oldest tokens leave the window.

    Args:
        model: a GPT, also compiled or inside DistributedDataParallel; each of its modules is put
            back into its mode at the end.
        prompts: int64 [B, T], or B tensors int64 [T_b], each of at least one token.
        max_new_tokens: how many tokens to add to each prompt.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: sample among the k likeliest tokens only; None among all.
        top_p: sample among the fewest likeliest tokens whose probabilities reach it together
            (Holtzman et al. 2020); None among all.
        generator: source of randomness, on the prompts' device; torch's default when None.
        use_cache: keep keys and values. While the window slides, every token's position changes
            with each step, and they are computed anew.

    Returns:
        int64 [B, T + max_new_tokens], the prompts included; of prompts of unequal length, T is the
        longest one's, and shorter ones start later, after zeros.

    Raises:
        ValueError: there is no prompt or an empty one, a token is outside the vocabulary, an option
            is out of range, or the model's logits are no numbers.
    """
    gpt = unwrap(model, GPT)
    _check(max_new_tokens, temperature, top_k, top_p)
    prompt_BT, starts_B = _align(prompts)
    if error := outside("token id", prompt_BT, gpt.config.vocab_size):
        raise error
    (batch, length), end = prompt_BT.shape, prompt_BT.shape[1] + max_new_tokens
    try:
        tokens_BS = prompt_BT.new_empty(batch, end)  # pages are taken as they are written
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: {batch} texts of {end} tokens do not fit into memory"
        ) from error
    tokens_BS[:, :length] = prompt_BT
    decoder = _Decoder(gpt, starts_B, end, use_cache)
    with evaluating(gpt):
        for column in range(length, end):
            logits_BV = decoder(tokens_BS[:, :column]).float()
            tokens_BS[:, column] = sample(logits_BV, temperature, top_k, top_p, generator)[:, 0]
    return tokens_BS


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or larger, and finite")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")


def _align(prompts: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(int64 [B, S], int64 [B] of first columns, None where all are 0)."""
    for prompt in prompts:
        if prompt.ndim != 1 or prompt.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"a prompt of shape {list(prompt.shape)} and dtype {prompt.dtype} came; supported: "
                "int64 [T], or all of them as int64 [B, T]"
            )
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ValueError("the prompt is empty; give at least one token")
    if isinstance(prompts, Tensor):
        return prompts.long(), None
    longest = max(lengths)
    tokens_BS = prompts[0].new_zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    if min(lengths) == longest:
        return tokens_BS, None
    starts = torch.tensor([longest - length for length in lengths], device=tokens_BS.device)
    return tokens_BS, starts


class _Decoder:
    """The logits of the next token, given all tokens so far, one more with each call."""

    def __init__(self, model: GPT, starts_B: Tensor | None, length: int, use_cache: bool):
        self._model = model
        self._starts_B = starts_B
        self._capacity = min(length, model.config.max_seq_len)
        self._use_cache = use_cache
        self._caches: list[KVCache] | None = None

    def __call__(self, tokens_BS: Tensor) -> Tensor:
        """int64 [B, S] -> [B, V]."""
        length, max_seq_len = tokens_BS.shape[1], self._model.config.max_seq_len
        first = max(0, length - max_seq_len)  # column at which the window starts
        if not self._use_cache or first > 0:
            self._caches = None
            return self._window(tokens_BS[:, first:], first, caches=None)
        if self._caches is None:
            self._caches = self._new_caches(tokens_BS)
        known = self._caches[0].length
        return self._window(tokens_BS[:, known:], 0, self._caches)

    def _new_caches(self, tokens_BS: Tensor) -> list[KVCache]:
        model, config = self._model, self._model.config
        weight = model.head.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        return [
            KVCache(
                tokens_BS.shape[0],
                self._capacity,
                config.num_kv_heads or config.num_heads,
                config.d_model // config.num_heads,
                device=weight.device,
                dtype=dtype,
            )
            for _ in range(config.num_layers)
        ]

    def _window(self, tokens_BT: Tensor, first: int, caches: list[KVCache] | None) -> Tensor:
        """Logits after tokens that follow those in the caches, or fill the window at `first`."""
        model, starts_B = self._model, self._starts_B
        known = caches[0].length if caches else 0
        columns_S = torch.arange(known + tokens_BT.shape[1], device=tokens_BT.device)
        positions, mask_B1TS = columns_S[known:], None
        if starts_B is not None:
            starts_B = (starts_B - first).clamp(min=0)
            positions = (positions - starts_B[:, None]).clamp(min=0)
        if starts_B is not None or known:
            mask_B1TS = _visible(known, columns_S, starts_B, model.config.window)
        hidden_BTD = model.hidden_states(
            tokens_BT, positions=positions, mask_B1TS=mask_B1TS, caches=caches
        )
        return model.head(hidden_BTD[:, -1])


def _visible(known: int, columns_S: Tensor, starts_B: Tensor | None, window: int) -> Tensor:
    """bool, to [B, 1, T, S]: which column a query in one of those from `known` on sees.

    A query left of its prompt sees itself: softmax over nothing is not a number.
    """
    distance_TS = columns_S[known:, None] - columns_S
    visible = distance_TS >= 0
    if window:
        visible = visible & (distance_TS < window)
    if starts_B is not None:
        visible = (visible & (columns_S >= starts_B[:, None, None])) | (distance_TS == 0)
        return visible[:, None]
    return visible


def sample(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """fp32 [B, V] -> int64 [B, 1]; options as `generate` has them.

    Raises:
        ValueError: the largest logit of a row is no number.
    """
    best_B1 = logits_BV.amax(dim=-1, keepdim=True)
    if not best_B1.isfinite().all():
        raise ValueError(
            "the model's logits are NaN or infinite; its weights are damaged or too large for "
            "its precision"
        )
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    # With 0 as the largest, no temperature makes an infinity of it; the bounds, at which sampling
    # is greedy or uniform, keep the quotients of the others in fp32's range.
    logits_BV = (logits_BV - best_B1) / min(max(temperature, 1e-30), 1e30)
    if top_k is not None:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    if top_p is not None and top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probabilities_BV = sorted_BV.softmax(dim=-1)
        # A token is out when those before it reach top_p by themselves; the first never is.
        out_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV >= top_p
        logits_BV = logits_BV.masked_fill(out_BV.scatter(1, order_BV, out_BV), -math.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), num_samples=1, generator=generator)
