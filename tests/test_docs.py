"""The documents: their commands run, their links lead somewhere, and what they list is what there is.

A block of commands has a comment in front of it, which readers of the page do not see: `<!-- run -->` runs here,
`<!-- run: server -->` is started and asked, `<!-- file: NAME -->` is written to that file, and `<!-- shown: why -->`
cannot run here. The models are tiny and random; the folder is that of somebody who follows the README.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
HTTP = ROOT / "docs" / "http.md"
PAGES = [
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    ROOT / "docker" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
README_LINES = 150
TAG = re.compile(r"<!-- (run|shown|file)(?:: (.+))? -->")
PORT = 8000
WORDS = {
    "math": "add subtract number sum total divide seven plus",
    "general": "hello weather story friend music holiday advice dinner",
}


@dataclass(frozen=True)
class Block:
    """A fenced block and the comment in front of it."""

    page: Path
    line: int
    language: str
    kind: str
    argument: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found, lines = [], page.read_text().splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        tag = TAG.fullmatch(lines[start - 1]) if start else None
        kind, argument = (tag[1], tag[2] or "") if tag else ("", "")
        text = "\n".join(lines[start + 1 : number]) + "\n"
        found.append(Block(page, start + 1, lines[start][3:], kind, argument, text))
        start = None
    assert start is None, f"{page} has a block without an end"
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_commands_says_whether_it_runs(page: Path) -> None:
    assert not [str(each) for each in blocks(page) if each.language == "bash" and not each.kind]
    # Commands in blocks that are merely indented would escape.
    assert not re.findall(
        r"^ {4}(?:deltamux|make|curl|pip|python|docker compose|VLLM\w*=).*$", page.read_text(), re.M
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    roots = (
        ROOT,
        page.parent,
        *(ROOT / part for part in ("compression", "router", "serve", "benchmarks")),
    )
    named = re.findall(r"`([\w/.-]+\.(?:py|cpp|sh))`", page.read_text())
    missing = {name for name in named if not any((root / name).exists() for root in roots)}
    assert not missing


def test_every_benchmark_is_in_the_list() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = {
        path.relative_to(ROOT / "benchmarks")
        for path in (ROOT / "benchmarks").rglob("*.py")
        if "__main__" in path.read_text()
    }
    assert not {str(path) for path in scripts if f"`{path}`" not in text}


def test_the_readme_is_a_page() -> None:
    assert len(README.read_text().splitlines()) <= README_LINES


def test_every_option_is_documented() -> None:
    from typer.main import get_command

    from deltamux.serve.cli import app

    text = "\n".join(page.read_text() for page in PAGES)
    commands = get_command(app).commands  # type: ignore[attr-defined]
    options = {
        (name, *parameter.opts)
        for name in ("compress", "inspect", "merge", "evaluate", "serve", "plan", "fleet")
        for parameter in commands[name].params
        if parameter.opts[0].startswith("-")
    }
    assert len(options) > 15
    assert not {
        (name, *spellings)
        for name, *spellings in options
        if not any(re.search(rf"(?<![\w-]){each}\b", text) for each in spellings)
    }


def test_every_setting_is_documented() -> None:
    from pydantic import BaseModel

    from deltamux.serve.settings import Settings

    def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
            if inner and not str(field.annotation).startswith("tuple"):
                yield from keys(inner[0], f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    text = (ROOT / "docs" / "operations.md").read_text()
    assert not {key for key in keys(Settings) if f"`{key}`" not in text}


@pytest.mark.vllm
def test_every_route_is_documented() -> None:
    from deltamux.serve.api.console import console_router
    from deltamux.serve.api.experts_api import experts_router
    from deltamux.serve.api.ready import ready_router
    from deltamux.serve.api.router_api import routing_router
    from deltamux.serve.api.tenants_api import tenants_router

    text = HTTP.read_text()
    routes = {
        f"{method} {route.path}"
        for router in (
            *(console_router, experts_router, ready_router),
            *(routing_router, tenants_router),
        )
        for route in router.routes
        for method in route.methods  # type: ignore[attr-defined]
    }
    # A slash too many leads to the page.
    routes.remove("GET /console/")
    assert not {route for route in routes if f"`{route}`" not in text}


def test_every_metric_is_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    named = {
        name
        for module in ("metrics", "collector", "routing_metrics")
        for name in re.findall(
            r'"(deltamux_[a-z_]+)"', (ROOT / "serve" / "observability" / f"{module}.py").read_text()
        )
    }
    assert len(named) > 20
    assert not {name for name in named if name not in text}


@dataclass(frozen=True)
class Newcomer:
    """A folder with checkpoints and text, and a shell in it."""

    folder: Path
    environment: dict[str, str]

    def run(self, block: Block, port: int = PORT) -> str:
        """Run a block's commands; any that fails fails the test."""
        prelude = 'set -euo pipefail\ncurl() { command curl --fail-with-body "$@"; }\n'
        done = subprocess.run(
            ["bash", "-c", prelude + block.text.replace(str(PORT), str(port))],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def write(self, block: Block) -> None:
        (self.folder / block.argument).write_text(block.text)


def save_adapter(base: Path, target: Path) -> None:
    """A LoRA adapter of rank 4 on every q_proj, as PEFT saves it."""
    config = json.loads((base / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    torch.manual_seed(3)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, hidden) / 8
        tensors[f"{name}.lora_B.weight"] = torch.randn(heads, 4) / 8
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (target / "adapter_config.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def newcomer(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: SimpleNamespace,
    server_environment: dict[str, str],
) -> Newcomer:
    """Somebody with a base, two fine-tunes of it and text, who has followed the README up to the server."""
    folder = tmp_path_factory.mktemp("newcomer")
    base = checkpoints.save_base(folder / "my" / "base")
    checkpoints.save_expert(base, folder / "my" / "math")
    save_adapter(base, folder / "my" / "poems-lora")
    for name, count in (("math", 40), ("math-test", 8)):
        rows = [
            {"prompt": f"What is {i} and {i + 2}?", "response": f"It is {2 * i + 2}."}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts").mkdir()
    for domain, words in WORDS.items():
        each = words.split()
        prompts = [
            f"{each[i % 8]} the {each[(i * 3 + 1) % 8]} of {each[i // 8 % 8]} {i}"
            for i in range(48)
        ]
        text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (folder / "prompts" / f"{domain}.jsonl").write_text(text)
    binaries = tmp_path_factory.mktemp("bin")
    for name, module in (("deltamux", "-m deltamux.serve"), ("python", "")):
        (binaries / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        (binaries / name).chmod(0o755)
    path = f"{binaries}:{os.environ['PATH']}"
    kernels = {"PATH": path, "VLLM_CPU_KVCACHE_SPACE": "1"}
    found = Newcomer(folder, {**os.environ, **server_environment, **kernels})
    for block in blocks(README):
        if block.kind == "run" and block.argument == "server":
            break
        _follow(found, block)
    return found


def _follow(newcomer: Newcomer, block: Block, port: int = PORT) -> None:
    if block.kind == "file":
        newcomer.write(block)
    elif block.kind == "run":
        newcomer.run(block, port)


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if page not in (README, HTTP) and any(b.kind == "run" for b in blocks(page))
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_of_a_page_run(newcomer: Newcomer, page: Path) -> None:
    for block in blocks(page):
        _follow(newcomer, block)


@pytest.mark.vllm
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_server_of_the_readme_answers(newcomer: Newcomer) -> None:
    from deltamux.serve.demo.server import running_server

    all_blocks = blocks(README)
    (index,) = [i for i, block in enumerate(all_blocks) if block.argument == "server"]
    command = all_blocks[index].text.split()
    assert command[-2:] == ["--port", str(PORT)]
    log = newcomer.folder / "server.log"
    with running_server(command[:-2], log, newcomer.environment, newcomer.folder) as server:
        port = int(server.url.rpartition(":")[2])
        for block in [*all_blocks[index + 1 :], *blocks(HTTP)]:
            _follow(newcomer, block, port)
