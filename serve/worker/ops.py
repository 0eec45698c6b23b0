"""The products of a layer's slots, as ops that torch.compile and CUDA graphs take for one opaque call each.

An op is named by the place of its layer (`place`), and finds slots and rows there: nothing but activations is an
input of a graph, and nothing that differs between experts or batches can be baked into one. It writes in place, and
into the rows of slots alone: rows of the base keep their bits. Where a batch has no such rows it does nothing;
vLLM captures graphs of such batches apart (`cudagraph_specialize_lora`).

On a CPU without torch.compile layers call their product without the op around it, which costs as much as a small
product does.

Shapes: T rows, N outputs, K inputs, V vocabulary, H hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from deltamux.serve.worker.product import rms_norm
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import Slots

# Every layer that an op can be called for; its place is the op's argument.
_layers: list["LayerDelta"] = []
_library = torch.library.Library("deltamux", "DEF")


def define_ops() -> None:
    """Register the ops; a second call does nothing."""
    if hasattr(torch.ops.deltamux, "add_delta"):
        return
    _library.define("add_delta(Tensor(a!) y, Tensor x, int place) -> ()")
    _library.define("multiply(Tensor x, Tensor weight, Tensor? bias, int place) -> Tensor")
    for key in ("CPU", "CUDA"):
        _library.impl("add_delta", _add_delta, key)
        _library.impl("multiply", _multiply, key)
    torch.library.register_fake("deltamux::add_delta", _nothing, lib=_library)
    torch.library.register_fake("deltamux::multiply", _product_shape, lib=_library)


def _add_delta(y: torch.Tensor, x: torch.Tensor, place: int) -> None:
    _layers[place].add(y, x)


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, place: int
) -> torch.Tensor:
    layer = _layers[place]
    assert isinstance(layer, LinearDelta)
    return layer.multiply(x, weight, bias)


def _nothing(*_args: object) -> None:
    """What an op that only writes into its first argument does to shapes: nothing."""


def _product_shape(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, place: int
) -> torch.Tensor:
    del bias, place
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class LayerDelta(ABC):
    """What experts change behind one layer.

    Args:
        slots: Where experts lie.
        rows: Which rows of the batch belong to which slot.
        direct: Call the product without the op around it.
    """

    def __init__(self, slots: Slots, rows: RowMap, direct: bool) -> None:
        self.slots, self.rows, self.direct = slots, rows, direct
        self.place = len(_layers)
        _layers.append(self)

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Change `y`, the layer's output for the input `x`, in the rows of slots, in place."""
        if self.direct:
            self.add(y, x)
        else:
            torch.ops.deltamux.add_delta(y, x, self.place)

    @abstractmethod
    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """The same, without the op around it."""


class LinearDelta(LayerDelta):
    """y += Δ̂ x for a linear, possibly merged from slices (q, k, v; gate, up).

    Args:
        slots: Where experts lie.
        rows: Token rows.
        direct: Call the product without the op around it.
        entries: The record of each slice.
        sizes: Its output rows.
        columns: Input channels K.
        is_table: Whether records may lack rows (lm_head, a tied embedding).
    """

    def __init__(
        self,
        slots: Slots,
        rows: RowMap,
        direct: bool,
        entries: Sequence[int],
        sizes: Sequence[int],
        columns: int,
        is_table: bool = False,
    ) -> None:
        super().__init__(slots, rows, direct)
        self._add, self._multiply = linear_product(slots, entries, sizes, columns, is_table)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [T, N] the delta's product with x [T, K]."""
        self.add_for(self.rows, y, x)

    def add_for(self, rows: RowMap, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add for rows that another map describes."""
        if not rows.active:
            return
        # Rows are what vLLM mostly has already, and a view costs as much as the call.
        if y.dim() != 2:
            y = y.view(-1, y.shape[-1])
        if x.dim() != 2:
            x = x.reshape(-1, x.shape[-1])
        self._add(y, x, rows)

    @property
    def multiplies(self) -> bool:
        """Whether base and delta can be one product (see `multiply`)."""
        return self._multiply is not None

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The base's product and the delta's, which for many rows is that of the merged weight."""
        if self._multiply is None or not self.rows.active:
            y = torch.nn.functional.linear(x, weight, bias)
            self.add(y, x)
            return y
        return self._multiply(x, weight, bias, self.rows)


class EmbeddingDelta(LayerDelta):
    """y[t] += Δ̂[ids[t]] for the input embedding.

    Args:
        slots: Where experts lie.
        rows: Token rows.
        direct: Call the product without the op around it.
        entry: The embedding's record.
        vocabulary: V, without padding.
        hidden: H.
    """

    def __init__(
        self, slots: Slots, rows: RowMap, direct: bool, entry: int, vocabulary: int, hidden: int
    ) -> None:
        super().__init__(slots, rows, direct)
        self._add = embedding_product(slots, entry, vocabulary, hidden)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [T, H] the delta of the rows that the token ids x [T] name."""
        if self.rows.active:
            self._add(y.view(-1, y.shape[-1]), x.reshape(-1), self.rows)


class NormDelta(LayerDelta):
    """y = RMSNorm(x) with the expert's own weight, where it has one.

    Args:
        slots: Where experts lie.
        rows: Token rows.
        direct: Call the product without the op around it.
        entry: The norm's record.
        epsilon: Added to the mean square.
    """

    def __init__(
        self, slots: Slots, rows: RowMap, direct: bool, entry: int, epsilon: float
    ) -> None:
        super().__init__(slots, rows, direct)
        self._replace = norm_product(slots, entry, epsilon)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Write over y [T, …, H], the base's norm of x, in the rows of slots that replace it."""
        if self.rows.active:
            self._replace(y, x, self.rows)


Add = Callable[[torch.Tensor, torch.Tensor, RowMap], None]
Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, RowMap], torch.Tensor]


def linear_product(
    slots: Slots, entries: Sequence[int], sizes: Sequence[int], columns: int, is_table: bool
) -> tuple[Add, Multiply | None]:
    """The product of a linear's slots on their device, and where there is one, base and delta in one."""
    if slots.on_cpu:
        from deltamux.serve.worker import native

        add = native.linear_product(slots.buffer, tuple(entries), tuple(sizes), columns)
        return (lambda y, x, rows: add(y, x, rows.order, rows.starts)), None
    from deltamux.serve.worker import cuda

    return cuda.linear_product(slots, entries, sizes, is_table)


def embedding_product(slots: Slots, entry: int, vocabulary: int, hidden: int) -> Add:
    """The look-up of an embedding's slots on their device."""
    if slots.on_cpu:
        from deltamux.serve.worker import native

        add = native.embedding_product(slots.buffer, entry, vocabulary, hidden)
        return lambda y, ids, rows: add(y, ids, rows.order, rows.starts)
    from deltamux.serve.worker import cuda

    return cuda.embedding_product(slots, entry, vocabulary)


def norm_product(slots: Slots, entry: int, epsilon: float) -> Add:
    """The replacement of a norm on its device."""
    if slots.on_cpu:
        return lambda y, x, rows: _replace_norm(y, x, rows, slots, entry, epsilon)
    from deltamux.serve.worker import cuda

    return cuda.norm_product(slots, entry, epsilon)


def _replace_norm(
    y: torch.Tensor, x: torch.Tensor, rows: RowMap, slots: Slots, entry: int, epsilon: float
) -> None:
    """y[t] = RMSNorm(x[t]) with the slot's own weight."""
    spans: list[int] = rows.starts_host.tolist()
    for slot, (begin, end) in enumerate(pairwise(spans)):
        weight_H = slots.vector(slot, entry, y.shape[-1]) if begin < end else None
        if weight_H is None:
            continue
        chosen = rows.order[begin:end]
        y.index_copy_(0, chosen, rms_norm(x.index_select(0, chosen), weight_H, epsilon, y.dtype))
