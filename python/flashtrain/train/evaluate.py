"""Validation loss over a whole split, shared among ranks, and samples of what a model writes."""

from collections.abc import Callable

import torch
from torch import nn

from flashtrain.data import TokenDataset
from flashtrain.distributed import World
from flashtrain.models.gpt import GPT
from flashtrain.train.precision import Precision

_PROMPT = "\n"
_TEMPERATURE = 0.8
_TOP_K = 200


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    dataset: TokenDataset,
    world: World,
    precision: Precision,
    batch_size: int,
    interrupted: Callable[[], bool],
) -> float | None:
    """Mean cross entropy per token in nats, the same on every rank.

    Args:
        model: not wrapped in DistributedDataParallel: ranks may see different numbers of batches.
        batch_size: sequences at a time on each rank.
        interrupted: asked before each batch; where it holds on any rank, there is no result.

    Returns:
        The loss, or None if some rank was interrupted.
    """
    device = world.device
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, targets, interrupted ranks
    was_training = model.training
    model.eval()
    for tokens_BT, targets_BT in dataset.val_batches(
        batch_size, rank=world.rank, world_size=world.size
    ):
        if interrupted():
            totals[2] = 1
            break
        with precision.autocast():
            loss = model(tokens_BT.to(device), targets_BT.to(device))
        totals[0] += loss.double() * targets_BT.numel()
        totals[1] += targets_BT.numel()
    model.train(was_training)
    loss_sum, targets, interruptions = world.sum(totals).tolist()
    return None if interruptions else loss_sum / targets


def write_sample(
    model: GPT, dataset: TokenDataset, precision: Precision, num_tokens: int, seed: int
) -> str:
    """Text of `num_tokens` tokens that the model writes after a line break."""
    device = next(model.parameters()).device
    prompt_BT = torch.tensor([dataset.tokenizer.encode(_PROMPT)], device=device)
    with precision.autocast():
        tokens_BT = model.generate(
            prompt_BT,
            num_tokens,
            temperature=_TEMPERATURE,
            top_k=_TOP_K,
            generator=torch.Generator(device).manual_seed(seed),
        )
    # A model may have more tokens than the data; those have no text.
    tokens = [t for t in tokens_BT[0].tolist() if t < dataset.tokenizer.vocab_size]
    return dataset.tokenizer.decode(tokens[prompt_BT.shape[1] :])
