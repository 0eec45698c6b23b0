"""vLLM layers wrapped so that each row of a batch gets its own expert's delta.

A wrapper calls the layer it wraps, unchanged, and lets a custom op add the delta to the rows that
belong to slots. Sizes come from the layers' partition attributes: the CPU build repacks weights, so
that `weight.shape` says nothing.
"""

from abc import abstractmethod
from typing import Any

import torch
from vllm.lora.layers.base import BaseLayerWithLoRA

from deltamux.serve.worker.ops import padded_shape
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import (
    MatrixPayload,
    MatrixSlots,
    NormPayload,
    Payload,
    RowsPayload,
    SlotPlan,
    slot_bytes,
)


class ExpertLayer(BaseLayerWithLoRA):  # type: ignore[misc]
    """A vLLM layer with slots.

    Args:
        base_layer: The layer of the base model.
        rows: Which rows of the current batch belong to which slot.
    """

    def __init__(self, base_layer: Any, rows: RowMap) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rows = rows

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks (`weight`, `quant_method`, …) is the base layer's."""
        try:
            return torch.nn.Module.__getattr__(self, name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(torch.nn.Module.__getattr__(self, "base_layer"), name)

    @abstractmethod
    def load_slot(self, slot: int, payload: Payload | None) -> None:
        """Copy an expert's part into a slot; None: the expert changes nothing here."""

    @abstractmethod
    def device_bytes(self) -> int:
        """Memory of the slot buffers."""


def row_arguments(rows: RowMap) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row map as the ops take it."""
    return rows.slot_of_row, rows.order, rows.starts


class MatrixLayer(ExpertLayer):
    """A layer whose slots hold code matrices.

    Attributes:
        slices: Output rows of each slice.
        columns: Input channels.
        salient: 16-bit channels that a slice may have.
        has_bias: Whether experts may change a bias.
    """

    slices: list[int]
    columns: int
    salient: int
    has_bias: bool
    matrix: MatrixSlots

    def load_slot(self, slot: int, payload: Payload | None) -> None:
        """Copy an expert's matrix into a slot."""
        if isinstance(payload, MatrixPayload):
            self.matrix.load(slot, payload)
        else:
            self.matrix.clear(slot)

    def device_bytes(self) -> int:
        """Memory of the slot buffers."""
        return slot_bytes(self.matrix)

    def add_delta(self, output: torch.Tensor, x: torch.Tensor, rows: RowMap) -> None:
        """Add the delta product of `x` to `output`, in place."""
        matrix = self.matrix
        torch.ops.deltamux.add_linear(
            output.view(-1, output.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            *row_arguments(rows),
            matrix.codes,
            matrix.steps,
            matrix.channels,
            matrix.values,
            matrix.bias,
        )


class ExpertLinear(MatrixLayer):
    """A linear, possibly merged from slices (q, k, v; gate, up).

    Args:
        base_layer: A vLLM linear whose forward returns (output, bias).
        rows: Token rows.
        plan: Sizes of the slots.
    """

    def __init__(self, base_layer: Any, rows: RowMap, plan: SlotPlan) -> None:
        super().__init__(base_layer, rows)
        whole = [base_layer.output_size]
        self.slices = list(getattr(base_layer, "output_partition_sizes", whole))
        self.columns = int(base_layer.input_size_per_partition)
        self.has_bias = getattr(base_layer, "bias", None) is not None
        self.salient = plan.salient
        room = plan.salient * len(self.slices)
        self.matrix = MatrixSlots(plan, sum(self.slices), self.columns, room, self.has_bias)

    def forward(self, x: torch.Tensor) -> Any:
        """The base's output with each row's delta added."""
        result = self.base_layer(x)
        output = result[0] if isinstance(result, tuple) else result
        self.add_delta(output, x, self.rows)
        return result


class ExpertLogits(MatrixLayer):
    """The logits processor: adds the lm_head's delta.

    vLLM calls it with two kinds of rows: the sampled positions, gathered into a tensor of their own,
    and, for prompt log-probabilities, a slice of one request's rows out of the batch's hidden states.

    Args:
        base_layer: vLLM's logits processor.
        rows: Sampled rows.
        tokens: Token rows of the batch.
        plan: Sizes of the slots.
        hidden: Input channels.
    """

    def __init__(
        self, base_layer: Any, rows: RowMap, tokens: RowMap, plan: SlotPlan, hidden: int
    ) -> None:
        super().__init__(base_layer, rows)
        self.tokens = tokens
        self.slices = [int(base_layer.org_vocab_size)]
        self.columns = hidden
        self.salient = 0
        self.has_bias = False
        self.matrix = MatrixSlots(plan, self.slices[0], hidden, 0, self.has_bias)
        self._base_logits = base_layer._get_logits
        # Scaling and soft capping come after the projection, in the base layer's own forward.
        base_layer._get_logits = self._get_logits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Logits of the base with each row's delta added before scaling."""
        return self.base_layer(*args, **kwargs)

    def _get_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = self._base_logits(hidden_states, *args, **kwargs)
        if logits is not None:
            logits = logits.contiguous()
            rows = self._rows_of(hidden_states)
            self.add_delta(logits, hidden_states.to(logits.dtype), rows)
        return logits

    def _rows_of(self, hidden_states: torch.Tensor) -> RowMap:
        length = hidden_states.shape[0]
        whole = hidden_states.untyped_storage().nbytes() == hidden_states.nbytes
        if whole and length == self.rows.count:
            return self.rows
        start = hidden_states.storage_offset() // hidden_states.stride(0)
        return self.tokens.span(start, length)


class ExpertEmbedding(ExpertLayer):
    """The input embedding: adds the delta of each token's row."""

    def __init__(self, base_layer: Any, rows: RowMap, plan: SlotPlan) -> None:
        super().__init__(base_layer, rows)
        # Token ids up to the table's padded end are valid to vLLM.
        vocabulary, hidden = padded_shape(
            base_layer.num_embeddings_padded, base_layer.embedding_dim
        )
        self.shape = (int(base_layer.org_vocab_size), int(base_layer.embedding_dim))
        shape = (plan.slots, vocabulary)
        self.codes = torch.zeros(*shape, hidden // 2, dtype=torch.uint8, device=plan.device)
        self.steps = torch.zeros(*shape, dtype=plan.dtype, device=plan.device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The base's embeddings with each token's delta added."""
        output: torch.Tensor = self.base_layer(input_ids)
        torch.ops.deltamux.add_embedding(
            output, input_ids, *row_arguments(self.rows), self.codes, self.steps
        )
        return output

    def load_slot(self, slot: int, payload: Payload | None) -> None:
        """Copy an expert's embedding into a slot."""
        if isinstance(payload, RowsPayload):
            rows = len(payload.steps_V)
            self.codes[slot, :rows].copy_(payload.codes, non_blocking=True)
            self.steps[slot, :rows].copy_(payload.steps_V, non_blocking=True)
        else:
            self.steps[slot] = 0

    def device_bytes(self) -> int:
        """Memory of the slot buffers."""
        return self.codes.numel() + self.steps.numel() * self.steps.element_size()


class ExpertNorm(ExpertLayer):
    """An RMSNorm whose weight an expert may replace."""

    def __init__(self, base_layer: Any, rows: RowMap, plan: SlotPlan) -> None:
        super().__init__(base_layer, rows)
        size = int(base_layer.weight.shape[0])
        self.weights = torch.ones(plan.slots, size, dtype=plan.dtype, device=plan.device)
        self.replaced = torch.zeros(plan.slots, dtype=torch.bool, device=plan.device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The base's norm, recomputed with the slot's weight where the slot has one."""
        if residual is None:
            output = self.base_layer(x)
            self._replace(output, x)
            return output
        output, summed = self.base_layer(x, residual)
        self._replace(output, summed)
        return output, summed

    def _replace(self, output: torch.Tensor, normalized: torch.Tensor) -> None:
        torch.ops.deltamux.replace_norm(
            output,
            normalized,
            *row_arguments(self.rows),
            self.weights,
            self.replaced,
            self.base_layer.variance_epsilon,
        )

    def load_slot(self, slot: int, payload: Payload | None) -> None:
        """Copy an expert's norm weight into a slot."""
        self.replaced[slot] = payload is not None
        if isinstance(payload, NormPayload):
            self.weights[slot].copy_(payload.weight_H, non_blocking=True)

    def device_bytes(self) -> int:
        """Memory of the slot buffers."""
        return self.weights.numel() * self.weights.element_size() + self.replaced.numel()
