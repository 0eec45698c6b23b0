"""What experts add to a vLLM model, hooked in behind its layers' own products.

    y = W_base x        vLLM's layer, unchanged
    y += Δ̂_slot(row) x  the hook, for the rows of slots

vLLM's linears multiply in the `apply` of their quantization method, so the delta is added right behind it: before a
tensor-parallel sum, whatever the base is quantized with, and without a module of ours in between. Embeddings look up
in `embedding` of theirs, norms are hooked in their `forward`, logits in `_get_logits`, before ranks gather them. A
batch of the base alone passes a test of one flag.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from deltamux.compression.checkpoint.architecture import EMBEDDING, LM_HEAD
from deltamux.serve import compat
from deltamux.serve.worker.ops import EmbeddingDelta, LayerDelta, LinearDelta, NormDelta
from deltamux.serve.worker.ranks import WEIGHT, linears_of
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import Slots


@dataclass(frozen=True)
class Rows:
    """The maps of a step: of its tokens, and of its sampled positions."""

    tokens: RowMap
    samples: RowMap


@dataclass(frozen=True)
class Hooks:
    """How a model's layers are hooked.

    Attributes:
        slots: Where experts lie.
        rows: Which rows belong to which slot.
        norms: The base's norm weights that experts may replace.
        direct: Call products without ops around them (see `ops.py`).
        tied: Whether logits come from the embedding's own weight.
    """

    slots: Slots
    rows: Rows
    norms: frozenset[str]
    direct: bool
    tied: bool


def hook_model(model: Any, hooks: Hooks) -> list[LayerDelta]:
    """Let experts change a vLLM decoder whose weights are loaded."""
    _, embedding, norms = compat.hooked_layers()
    batched = compat.is_of_transformers(model)
    linears = linears_of(model, hooks.slots.names)
    found: list[LayerDelta] = [_hook_linear(module, parts, hooks) for module, parts in linears]
    for name, module in list(model.named_modules()):
        if isinstance(module, embedding) and f"{name}{WEIGHT}" == EMBEDDING:
            found.append(_hook_embedding(module, hooks))
        elif isinstance(module, norms) and f"{name}{WEIGHT}" in hooks.norms:
            found.append(_hook_norm(module, f"{name}{WEIGHT}", hooks, batched))
    found.append(_hook_logits(model, hooks))
    return found


def base_bytes(model: Any) -> int:
    """Memory of the base's weights, from the layers' sizes.

    The CPU build keeps linear weights outside of the modules' parameters, in its kernels' layout.
    """
    linear, _, _ = compat.hooked_layers()
    linears: list[Any] = [module for module in model.modules() if isinstance(module, linear)]
    weights: int = sum(
        sum(output_sizes(module)) * input_size(module) * module.params_dtype.itemsize
        for module in linears
    )
    others = {id(each) for module in linears for each in module.parameters(recurse=False)}
    rest = (each for each in model.parameters() if id(each) not in others)
    return weights + int(sum(each.numel() * each.element_size() for each in rest))


def input_size(module: Any) -> int:
    """Input channels of a linear on this rank."""
    return int(getattr(module, "input_size_per_partition", module.input_size))


def output_sizes(module: Any) -> list[int]:
    """Output rows of each slice of a linear, on this rank."""
    whole = [int(module.output_size)]
    return list(getattr(module, "output_partition_sizes", whole))


def _hook_linear(module: Any, parts: list[str], hooks: Hooks) -> LayerDelta:
    """Behind the product of its quantization method, of which layers may share one: it is copied."""
    sizes = output_sizes(module)
    delta = LinearDelta(
        hooks.slots,
        hooks.rows.tokens,
        hooks.direct,
        [hooks.slots.index(part) for part in parts],
        # One matrix of the checkpoint may be several slices of vLLM's layer, as in Phi-3.
        sizes if len(parts) == len(sizes) else [sum(sizes)],
        input_size(module),
    )
    method = copy.copy(module.quant_method)
    base_product = method.apply
    in_one = delta.multiplies and compat.is_unquantized(method)

    def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if in_one:
            both: torch.Tensor = torch.ops.deltamux.multiply(x, layer.weight, bias, delta.place)
            return both
        y: torch.Tensor = base_product(layer, x, bias)
        delta(y, x)
        return y

    method.apply = apply
    module.quant_method = method
    return delta


def _hook_embedding(module: Any, hooks: Hooks) -> LayerDelta:
    """Behind the look-up of its quantization method: a rank's ids are its own rows' there.

    What a rank does not have it looks up as row 0, and sets to nought behind.
    """
    entry = hooks.slots.index(EMBEDDING)
    sizes = vocabulary_rows(module), int(module.embedding_dim)
    delta = EmbeddingDelta(hooks.slots, hooks.rows.tokens, hooks.direct, entry, *sizes)
    method = copy.copy(module.quant_method)
    base_rows = method.embedding

    def embedding(layer: Any, ids: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = base_rows(layer, ids)
        delta(output, ids)
        return output

    method.embedding = embedding
    module.quant_method = method
    # One kernel that looks up and sets to nought leaves no place for a delta between.
    module.use_fused_embedding = False
    return delta


def _hook_norm(module: Any, name: str, hooks: Hooks, batched: bool) -> LayerDelta:
    """Over the norm's output; transformers' models have a batch of one around the tokens."""
    delta = NormDelta(
        hooks.slots,
        hooks.rows.tokens,
        hooks.direct,
        hooks.slots.index(name),
        float(module.variance_epsilon),
    )
    forward = module.forward

    def with_own_weight(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            output = forward(x)
            delta(output.squeeze(0), x.squeeze(0)) if batched else delta(output, x)
            return output
        output, summed = forward(x, residual)
        delta(output, summed)
        return output, summed

    module.forward = with_own_weight
    return delta


def _hook_logits(model: Any, hooks: Hooks) -> LayerDelta:
    """Behind the projection, before ranks gather; scaling and soft capping come later.

    vLLM asks for two kinds of rows: the sampled positions, gathered into a tensor of their own, and, for prompt
    log-probabilities, a slice of one request's rows out of the batch's hidden states.
    """
    head = model.model.embed_tokens if hooks.tied else model.lm_head
    entry = hooks.slots.index(EMBEDDING if hooks.tied else LM_HEAD)
    sizes = [vocabulary_rows(head)], int(head.embedding_dim)
    rows, processor = hooks.rows, model.logits_processor
    delta = LinearDelta(hooks.slots, rows.samples, hooks.direct, [entry], *sizes, is_table=True)
    base_logits, base_gather = processor._get_logits, processor._gather_logits
    # Hidden states whose logits have not got their delta yet.
    waiting: list[torch.Tensor] = []

    def add(logits: torch.Tensor) -> None:
        hidden_states = waiting.pop()
        own = logits[..., : sizes[0][0]]
        delta.add_for(_rows_of(hidden_states, rows), own, hidden_states.to(logits.dtype))

    def gather(logits: torch.Tensor) -> Any:
        if waiting:
            add(logits)
        return base_gather(logits)

    def with_delta(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        waiting[:] = [hidden_states]
        logits = base_logits(hidden_states, *args, **kwargs)
        if waiting:  # nothing was gathered
            add(logits)
        return logits

    processor._get_logits, processor._gather_logits = with_delta, gather
    return delta


def vocabulary_rows(module: Any) -> int:
    """Rows of an embedding or lm_head on this rank, without padding."""
    found = module.shard_indices
    return int(found.org_vocab_end_index) - int(found.org_vocab_start_index)


def _rows_of(hidden_states: torch.Tensor, rows: Rows) -> RowMap:
    length = hidden_states.shape[0]
    whole = hidden_states.untyped_storage().nbytes() == hidden_states.nbytes
    if whole and length == rows.samples.count:
        return rows.samples
    start = hidden_states.storage_offset() // hidden_states.stride(0)
    return rows.tokens.span(start, length)
