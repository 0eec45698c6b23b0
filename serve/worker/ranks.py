"""Tensor parallelism: several workers, one a device, each with a part of every matrix of base and experts.

vLLM splits the base's layers, and says of each which rows or channels it has (Megatron's split: Shoeybi et al. 2019,
arXiv 1909.08053). Experts are cut the same way (`compression/image/cut.py`), so that a rank's slots, products and
host cache are those of a smaller model. A rank decides alone where its experts lie. Two things they decide together:
how large a slot is, and, at each step that has experts, whether one of them could not be loaded anywhere: half a
delta would be neither the base nor the expert.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from deltamux.compression.checkpoint.architecture import EMBEDDING, LM_HEAD
from deltamux.compression.image.cut import Cut
from deltamux.serve import compat

WEIGHT = ".weight"


@dataclass(frozen=True)
class Ranks:
    """The workers that share a model's matrices.

    Attributes:
        rank: This worker's place among them.
        size: How many there are.
        group: torch.distributed's, over the hosts' memory; None: there is one worker.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of_worker(cls) -> "Ranks":
        """This process's place in vLLM's group of workers."""
        group = compat.tensor_parallel_group()
        return cls(int(group.rank_in_group), int(group.world_size), group.cpu_group)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number on any rank; all ranks have to ask at once."""
        if self.size == 1 or not numbers:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.group)
        return [int(number) for number in found]


ONE = Ranks()


def linears_of(model: Any, names: Collection[str]) -> Iterator[tuple[Any, list[str]]]:
    """A vLLM model's linears, and which weights of the checkpoint each is made of; those that experts may change.

    Args:
        model: vLLM's.
        names: The base's tensors that are served.
    """
    packed: dict[str, list[str]] = dict(getattr(model, "packed_modules_mapping", {}))
    linear, _, _ = compat.hooked_layers()
    for name, module in list(model.named_modules()):
        if isinstance(module, linear):
            parent, _, leaf = name.rpartition(".")
            parts = [f"{parent}.{part}{WEIGHT}" for part in packed.get(leaf, [leaf])]
            # A mixture's router belongs to experts that no slot holds.
            if parts[0] in names:
                yield module, parts


def cuts_of(model: Any, names: Collection[str], tied: bool) -> dict[str, Cut]:
    """The parts that this rank holds of a vLLM model's weights, by the checkpoint's names.

    Args:
        model: vLLM's, whose layers say which part they have.
        names: The base's tensors that are served.
        tied: Whether logits come from the embedding's own weight.
    """
    cuts: dict[str, Cut] = {}
    for module, parts in linears_of(model, names):
        cuts |= zip(parts, _cuts_of_linear(module, len(parts)), strict=True)
    cuts[EMBEDDING] = _cut_of_table(model.model.embed_tokens)
    if not tied:
        cuts[LM_HEAD] = _cut_of_table(model.lm_head)
    return cuts


def _cuts_of_linear(module: Any, parts: int) -> list[Cut]:
    """Of each weight that a linear is made of; one weight may be several slices of it, as in Phi-3."""
    row_parallel, replicated, qkv = compat.parallel_linears()
    if isinstance(module, replicated):
        return [Cut()] * parts
    rank, size = int(module.tp_rank), int(module.tp_size)
    if isinstance(module, row_parallel):
        width = int(module.input_size_per_partition)
        return [Cut(channels=(rank * width, (rank + 1) * width), bias=rank == 0)]
    local = [int(each) for each in module.output_partition_sizes]
    # Where there are fewer heads of keys and values than ranks, some ranks have the same.
    copies = [1] * len(local)
    if isinstance(module, qkv):
        copies[1:] = [int(module.num_kv_head_replicas)] * 2
    whole = [each * size // copy for each, copy in zip(local, copies, strict=True)]
    ranges = [
        (rank // copy * each, (rank // copy + 1) * each)
        for each, copy in zip(local, copies, strict=True)
    ]
    if parts == len(local):
        return [Cut(rows=(each,)) for each in ranges]
    starts = [sum(whole[:place]) for place in range(len(whole))]
    moved = zip(starts, ranges, strict=True)
    return [Cut(rows=tuple((start + begin, start + end) for start, (begin, end) in moved))]


def _cut_of_table(module: Any) -> Cut:
    found = module.shard_indices
    return Cut(rows=((int(found.org_vocab_start_index), int(found.org_vocab_end_index)),))
