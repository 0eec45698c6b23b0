"""From chat examples to padded batches, and the loss of a model on their responses.

Shapes: B examples, T tokens, P tokens of shared prefix, V vocabulary.

Every prompt of a chat template starts with the same tokens (system message, role marks). They are
a third to a half of a short example, so a batch runs them once and hands their keys and values to
all of its rows; gradients flow through them as if each row had run its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from deltamux.serve.demo.data import Example

# The label that PyTorch's cross entropy skips.
IGNORED = -100
# Examples of so many batches are sorted by length together. Chosen, not measured.
BATCHES_PER_BUCKET = 8


@dataclass(frozen=True)
class Encoded:
    """Token ids of a whole chat and the index at which the response starts."""

    ids: tuple[int, ...]
    response_start: int


@dataclass(frozen=True)
class Batch:
    """Inputs behind the shared prefix, and for each position the token to predict or `IGNORED`."""

    prefix_P: torch.Tensor
    ids_BT: torch.Tensor
    labels_BT: torch.Tensor


def encode(tokenizer: Any, examples: Sequence[Example]) -> list[Encoded]:
    """Apply the tokenizer's chat template; a response ends with its end-of-turn token.

    Raises:
        ValueError: There are no examples, or the chat does not start with its own prompt.
    """
    if not examples:
        raise ValueError("examples must not be empty, got none; generate some first")
    return [_encode_one(tokenizer, example) for example in examples]


def _encode_one(tokenizer: Any, example: Example) -> Encoded:
    """Encode one example, without what the template writes after the end of the turn."""
    turns = [{"role": "user", "content": example.prompt}]
    answer = {"role": "assistant", "content": example.response}
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    chat = tokenizer.apply_chat_template([*turns, answer], return_dict=False)
    if chat[: len(prompt)] != prompt:
        raise ValueError(
            "the chat template must render a chat as its prompt followed by the response, got "
            f"another text for {example.prompt!r}; use a template without such rewriting"
        )
    while tokenizer.eos_token_id in chat[len(prompt) :] and chat[-1] != tokenizer.eos_token_id:
        chat.pop()
    return Encoded(tuple(chat), len(prompt))


def shared_prefix_length(encoded: Sequence[Encoded]) -> int:
    """How many leading tokens all prompts share, the last prompt token never counted."""
    length = min(one.response_start for one in encoded) - 1
    while len({one.ids[:length] for one in encoded}) > 1:
        length -= 1
    return length


def in_order(encoded: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
    """Every example once, shortest first."""
    prefix_length = shared_prefix_length(encoded)
    ordered = sorted(encoded, key=lambda one: len(one.ids))
    for start in range(0, len(ordered), batch_size):
        yield collate(ordered[start : start + batch_size], prefix_length)


def shuffled(encoded: Sequence[Encoded], batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
    """Batches of similar lengths, `steps` of them, epoch after epoch in a new order."""
    prefix_length = shared_prefix_length(encoded)
    rng, bucket = Random(seed), batch_size * BATCHES_PER_BUCKET
    pending: list[Sequence[Encoded]] = []
    for _ in range(steps):
        if not pending:
            order = rng.sample(encoded, len(encoded))
            for start in range(0, len(order), bucket):
                near = sorted(order[start : start + bucket], key=lambda one: len(one.ids))
                pending += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
            rng.shuffle(pending)
        yield collate(pending.pop(), prefix_length)


def collate(encoded: Sequence[Encoded], prefix_length: int) -> Batch:
    """Pad on the right. Causal attention never looks there, so no padding mask is needed."""
    width = max(len(one.ids) for one in encoded) - prefix_length - 1
    ids_BT = torch.zeros(len(encoded), width, dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    for row, one in enumerate(encoded):
        tail = torch.tensor(one.ids[prefix_length:])
        first = one.response_start - prefix_length
        ids_BT[row, : len(tail) - 1] = tail[:-1]
        labels_BT[row, first - 1 : len(tail) - 1] = tail[first:]
    return Batch(torch.tensor(encoded[0].ids[:prefix_length]), ids_BT, labels_BT)


def response_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The negative log-likelihood in nats of each response token of a batch, flat."""
    cache = None
    if len(batch.prefix_P):
        cache = model.base_model(input_ids=batch.prefix_P[None], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(batch.ids_BT))
    hidden = model.base_model(
        input_ids=batch.ids_BT, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    wanted_BT = batch.labels_BT != IGNORED
    # The output matrix is a fifth of a small model: apply it to the response's positions only.
    logits_NV = model.get_output_embeddings()(hidden[wanted_BT]).float()
    return torch.nn.functional.cross_entropy(
        logits_NV, batch.labels_BT[wanted_BT], reduction="none"
    )
