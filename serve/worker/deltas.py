"""What experts add to a vLLM model, hooked in behind its layers' own products.

    y = W_base x        vLLM's layer, unchanged
    y += Δ̂_slot(row) x  the hook, for the rows of slots

vLLM's linears multiply in the `apply` of their quantization method, so the delta is added right behind it: before a
tensor-parallel sum, whatever the base is quantized with, and without a module of ours in between. Embeddings and
norms are hooked in their `forward`, logits in `_get_logits`. A batch of the base alone passes a test of one flag.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from deltamux.compression.checkpoint.architecture import EMBEDDING, LM_HEAD
from deltamux.serve import compat
from deltamux.serve.worker.ops import EmbeddingDelta, LayerDelta, LinearDelta, NormDelta
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import Slots

WEIGHT = ".weight"


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
    """Let experts change a vLLM decoder whose weights are loaded; in the order of its modules."""
    found: list[LayerDelta] = []
    packed: dict[str, list[str]] = dict(getattr(model, "packed_modules_mapping", {}))
    linear, embedding, norms = compat.hooked_layers()
    batched = compat.is_of_transformers(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, linear):
            parent, _, leaf = name.rpartition(".")
            parts = [f"{parent}.{part}{WEIGHT}" for part in packed.get(leaf, [leaf])]
            # A mixture's router belongs to experts that no slot holds.
            if parts[0] in hooks.slots:
                found.append(_hook_linear(module, parts, hooks))
        elif isinstance(module, embedding) and f"{name}{WEIGHT}" == EMBEDDING:
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
    entry = hooks.slots.index(EMBEDDING)
    sizes = int(module.org_vocab_size), int(module.embedding_dim)
    delta = EmbeddingDelta(hooks.slots, hooks.rows.tokens, hooks.direct, entry, *sizes)
    forward = module.forward

    def with_delta(input_ids: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = forward(input_ids)
        delta(output, input_ids)
        return output

    module.forward = with_delta
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
    """Behind the projection and its gathering; scaling and soft capping come later.

    vLLM asks for two kinds of rows: the sampled positions, gathered into a tensor of their own, and, for prompt
    log-probabilities, a slice of one request's rows out of the batch's hidden states.
    """
    head = model.model.embed_tokens if hooks.tied else model.lm_head
    entry = hooks.slots.index(EMBEDDING if hooks.tied else LM_HEAD)
    sizes = [int(head.org_vocab_size)], int(head.embedding_dim)
    rows = hooks.rows
    delta = LinearDelta(hooks.slots, rows.samples, hooks.direct, [entry], *sizes, is_table=True)
    base_logits = model.logits_processor._get_logits

    def with_delta(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = base_logits(hidden_states, *args, **kwargs)
        if logits is not None:
            delta.add_for(_rows_of(hidden_states, rows), logits, hidden_states.to(logits.dtype))
        return logits

    model.logits_processor._get_logits = with_delta
    return delta


def _rows_of(hidden_states: torch.Tensor, rows: Rows) -> RowMap:
    length = hidden_states.shape[0]
    whole = hidden_states.untyped_storage().nbytes() == hidden_states.nbytes
    if whole and length == rows.samples.count:
        return rows.samples
    start = hidden_states.storage_offset() // hidden_states.stride(0)
    return rows.tokens.span(start, length)
