"""Put wrappers around a vLLM model's layers, and turn an artifact into payloads for them."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.checkpoint.architecture import EMBEDDING, LM_HEAD
from deltamux.compression.rounding.low_rank import FactoredDelta
from deltamux.compression.rounding.quantize import QuantizedDelta
from deltamux.serve.worker.layers import (
    ExpertEmbedding,
    ExpertLayer,
    ExpertLinear,
    ExpertLogits,
    ExpertNorm,
    MatrixLayer,
)
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import (
    NormPayload,
    Payload,
    SlotPlan,
    matrix_payload,
    rows_payload,
)

LOGITS = "logits_processor"
PARAMETERS = ("weight", "bias")
# Threads that decode an expert's matrices; each holds one of them unpacked.
MOST_READERS = 8


def wrap_model(
    model: Any, plan: SlotPlan, tokens: RowMap, samples: RowMap
) -> dict[str, ExpertLayer]:
    """Replace linears, norms, the embedding and the logits processor by wrappers, in place.

    Args:
        model: A vLLM decoder (Llama, Mistral, Qwen2, Qwen3).
        plan: Sizes.
        tokens: Row map of the batch's tokens.
        samples: Row map of the sampled positions.

    Returns:
        Wrappers by vLLM module name.
    """
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    wrapped: dict[str, ExpertLayer] = {}
    hidden = model.model.embed_tokens.embedding_dim
    for name, module in list(model.named_modules()):
        layer: ExpertLayer
        if name == LOGITS:
            layer = ExpertLogits(module, samples, tokens, plan, hidden)
        elif isinstance(module, LinearBase):
            layer = ExpertLinear(module, tokens, plan)
        elif name.endswith("embed_tokens") and isinstance(module, VocabParallelEmbedding):
            layer = ExpertEmbedding(module, tokens, plan)
        elif isinstance(module, RMSNorm):
            layer = ExpertNorm(module, tokens, plan)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        wrapped[name] = layer
    return wrapped


def base_bytes(wrapped: dict[str, ExpertLayer], dtype: torch.dtype, tied: bool) -> int:
    """Memory of the base's weights, from the layers' sizes.

    The CPU build keeps linear weights outside of the modules' parameters, in its kernels' layout.
    """
    weights = 0
    for layer in wrapped.values():
        if isinstance(layer, ExpertLinear):
            weights += sum(layer.slices) * (layer.columns + layer.has_bias)
        elif isinstance(layer, ExpertLogits):
            weights += 0 if tied else layer.slices[0] * layer.columns
        else:
            weights += layer.weight.numel()
    return weights * dtype.itemsize


def expert_payloads(
    artifact: Artifact,
    wrapped: dict[str, ExpertLayer],
    packed: dict[str, list[str]],
    plan: SlotPlan,
) -> dict[str, Payload]:
    """Read an artifact into payloads for the wrapped modules.

    Args:
        artifact: The compressed expert, checked.
        wrapped: Wrappers by module name.
        packed: vLLM's merged modules, such as qkv_proj → q_proj, k_proj, v_proj.
        plan: Sizes of the slots.

    Raises:
        ValueError: The expert changes a weight that no wrapper covers, or needs more 16-bit
            channels than a slot has room for.
    """
    sources = {name: _sources(artifact, name, layer, packed) for name, layer in wrapped.items()}
    used = {f"{each}.{kind}" for part in sources.values() for each in part for kind in PARAMETERS}
    left = sorted(set(artifact.entries) - used)
    if left:
        raise ValueError(f"the expert changes {left[0]!r}, which this model does not have")

    def read(name: str) -> Payload | None:
        return _payload(artifact, wrapped[name], sources[name], plan)

    # Most of the time goes into zlib and numpy, which let other threads run meanwhile.
    with ThreadPoolExecutor(min(MOST_READERS, os.cpu_count() or 1)) as readers:
        found = dict(zip(wrapped, readers.map(read, wrapped), strict=True))
    return {name: payload for name, payload in found.items() if payload is not None}


def _sources(
    artifact: Artifact, name: str, layer: ExpertLayer, packed: dict[str, list[str]]
) -> list[str]:
    """The modules of the checkpoint that a module of vLLM is made of."""
    if isinstance(layer, ExpertLogits):
        head = EMBEDDING if artifact.manifest.tied_embeddings else LM_HEAD
        return [head.removesuffix(".weight")]
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in packed.get(leaf, [leaf])]


def _payload(
    artifact: Artifact, layer: ExpertLayer, sources: list[str], plan: SlotPlan
) -> Payload | None:
    changed = [source for source in sources if _changes(artifact, source)]
    if not changed:
        return None
    if isinstance(layer, ExpertNorm):
        weight = artifact.vector(f"{sources[0]}.weight")
        if weight.shape != layer.weights.shape[1:]:
            raise ValueError(f"{sources[0]!r} has {len(weight)} weights, the served model differs")
        return NormPayload(weight.to(plan.dtype))
    if isinstance(layer, ExpertEmbedding):
        table = _codes(artifact, f"{sources[0]}.weight")
        _check_fits(table, sources[0], layer.shape, room=0)
        return rows_payload(table, plan.dtype)
    assert isinstance(layer, MatrixLayer)
    parts = []
    for source, rows in zip(sources, layer.slices, strict=True):
        quantized = _find(artifact, f"{source}.weight")
        if quantized is not None:
            _check_fits(quantized, source, (rows, layer.columns), layer.salient)
        bias = f"{source}.bias"
        vector = artifact.vector(bias) if bias in artifact.entries else None
        parts.append((rows, quantized, vector))
    return matrix_payload(parts, layer.columns, plan, layer.has_bias)


def _changes(artifact: Artifact, source: str) -> bool:
    return f"{source}.weight" in artifact.entries or f"{source}.bias" in artifact.entries


def _find(artifact: Artifact, name: str) -> QuantizedDelta | None:
    return _codes(artifact, name) if name in artifact.entries else None


def _codes(artifact: Artifact, name: str) -> QuantizedDelta:
    """A matrix in codes; slots hold a product of factors in 4 bit."""
    quantized = artifact.quantized(name)
    return quantized.codes() if isinstance(quantized, FactoredDelta) else quantized


def _check_fits(quantized: QuantizedDelta, source: str, shape: tuple[int, int], room: int) -> None:
    if quantized.shape != shape:
        raise ValueError(f"{source!r} has shape {quantized.shape}, the served model {shape}")
    channels = quantized.salient_channels_S
    if channels is not None and len(channels) > room:
        raise ValueError(
            f"{source!r} keeps {len(channels)} channels in 16 bit, a slot has room for {room}: "
            "for a linear, raise slot.salient_channels and restart"
        )
