"""How likely a model thinks a continuation is, shared among ranks.

Legend: B batch, T sequence, V vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashtrain.data.tokenizer import Tokenizer
from flashtrain.distributed import World

_PADDING = 0  # after the end of a sequence, where a causal model's earlier logits do not see it


@dataclasses.dataclass(frozen=True)
class Request:
    """A question: how likely is `continuation` after `context`?"""

    context: tuple[int, ...]  # token ids, at least one
    continuation: tuple[int, ...]  # token ids, at least one


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Answers requests with a model.

    Attributes:
        logits: int64 [B, T] -> [B, T, V] on the device, for a causal model.
        tokenizer: the model's.
        max_seq_len: largest T; the oldest tokens of longer requests are left out.
        batch_size: sequences at a time on each rank.
        world: the ranks, each of which has the same model and takes a share of the requests.
        autocast: gives the context in which the model computes.
    """

    logits: Callable[[Tensor], Tensor]
    tokenizer: Tokenizer
    max_seq_len: int
    batch_size: int
    world: World
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def first_token(self) -> int:
        """What a text without context follows: the end of another, or else a line break."""
        end_of_text = self.tokenizer.end_of_text
        return self.tokenizer.encode("\n")[0] if end_of_text is None else end_of_text

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> Tensor:
        """Log-likelihoods, and whether greedy decoding gives the same tokens.

        Ranks call the model equally often, as models that are split among them need it.

        Returns:
            fp64 [len(requests), 2] on the CPU, the same on every rank: the sum of the natural log
            probabilities of the continuation's tokens; 1 if each is the likeliest one, else 0.
        """
        scores = torch.zeros(len(requests), 2, dtype=torch.float64, device=self.world.device)
        # Requests of similar length together, so that little is padding; the longest first, so that
        # what does not fit into memory fails at once.
        order = sorted(range(len(requests)), key=lambda i: -self._length(requests[i]))
        share = self.batch_size * self.world.size
        for first in range(0, len(order), share):
            mine = order[first + self.world.rank : first + share : self.world.size]
            # A rank without requests takes part with one whose score it does not keep.
            self._score_batch([requests[i] for i in mine or order[:1]], mine, scores)
        return self.world.sum(scores).cpu()

    def _length(self, request: Request) -> int:
        return min(len(request.context) + len(request.continuation) - 1, self.max_seq_len)

    def _score_batch(self, requests: list[Request], rows: list[int], scores: Tensor) -> None:
        device = self.world.device
        length = max(self._length(request) for request in requests)
        tokens_BT = torch.full((len(requests), length), _PADDING, dtype=torch.int64)
        spans = []
        for row, request in enumerate(requests):
            kept = (*request.context, *request.continuation)[-self.max_seq_len - 1 :]
            tokens_BT[row, : len(kept) - 1] = torch.tensor(kept[:-1])
            targets = torch.tensor(request.continuation[-self.max_seq_len :], device=device)
            spans.append((len(kept) - 1 - len(targets), targets))
        with self.autocast():
            logits_BTV = self.logits(tokens_BT.to(device))
        for row, (index, (begin, targets)) in enumerate(zip(rows, spans)):
            log_probs = logits_BTV[row, begin : begin + len(targets)].float().log_softmax(-1)
            scores[index, 0] = log_probs.gather(-1, targets[:, None]).double().sum()
            scores[index, 1] = (log_probs.argmax(-1) == targets).all()
