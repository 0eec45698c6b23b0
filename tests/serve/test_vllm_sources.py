"""Every vLLM symbol that deltamux touches, looked up in the sources of a vLLM that is not installed.

pip download vllm==0.33.0 --no-deps && unzip -q 'vllm-*.whl' '*.py' -d vllm-0.33
DELTAMUX_VLLM_SOURCES=vllm-0.33 pytest tests/serve/test_vllm_sources.py
"""

import ast
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from deltamux.serve import compat

ROOT = os.environ.get("DELTAMUX_VLLM_SOURCES")
pytestmark = pytest.mark.skipif(
    not ROOT, reason="DELTAMUX_VLLM_SOURCES names no folder of an unpacked vLLM wheel"
)
# What is called, and the parameters that it is called with, after self.
CALLS = {
    ("vllm.model_executor.layers.linear", "UnquantizedLinearMethod", "apply"): [
        "layer",
        "x",
        "bias",
    ],
    ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin", "load_lora_model"): [
        "model",
        "vllm_config",
        "device",
    ],
    ("vllm.model_executor.layers.layernorm", "RMSNorm", "forward_native"): ["x", "residual"],
    ("vllm.v1.worker.gpu_worker", "Worker", "execute_model"): ["scheduler_output"],
    ("vllm.v1.metrics.stats", "LoRARequestStates", "update_scheduler_stats"): ["scheduler_stats"],
    ("vllm.model_executor.layers.logits_processor", "LogitsProcessor", "_get_logits"): [
        "hidden_states"
    ],
    ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding", "forward"): [
        "input_"
    ],
}


@cache
def parsed(module: str) -> ast.Module:
    assert ROOT
    path = Path(ROOT, *module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    return ast.parse(file.read_text())


def names_of(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """What a module or class defines or imports, also under conditions."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from ((each.id, node) for each in node.targets if isinstance(each, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.If | ast.Try):
            yield from names_of([*node.body, *node.orelse])


def found(symbol: tuple[str, ...]) -> ast.AST:
    module, *path = symbol
    body = parsed(module).body
    node: ast.AST = parsed(module)
    for name in path:
        named = dict(names_of(body))
        assert name in named, f"{module} has no {'.'.join(path)}"
        node = named[name]
        body = node.body if isinstance(node, ast.ClassDef) else []
    return node


@pytest.mark.parametrize("symbol", [s for s in compat.SYMBOLS if len(s) == 2], ids=".".join)
def test_a_symbol_is_there(symbol: tuple[str, ...]) -> None:
    found(symbol)


@pytest.mark.parametrize("call", CALLS, ids=".".join)
def test_what_is_called_still_takes_what_it_is_given(call: tuple[str, ...]) -> None:
    node = found(call)
    assert isinstance(node, ast.FunctionDef)
    arguments = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
    assert arguments[1 : len(CALLS[call]) + 1] == CALLS[call]


@pytest.mark.parametrize("file", ["linear", "vocab_parallel_embedding", "logits_processor"])
def test_products_still_go_through_the_quantization_method(file: str) -> None:
    source = ast.unparse(parsed(f"vllm.model_executor.layers.{file}"))
    assert "quant_method.apply(" in source or "quant_method.embedding(" in source


def test_model_runners_still_create_the_manager_by_its_name() -> None:
    module, name = compat.MANAGER
    assert f"{name}(" in ast.unparse(parsed(module))
