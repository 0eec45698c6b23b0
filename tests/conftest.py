"""Small random checkpoints of every supported architecture, with a byte-level tokenizer."""

import gzip
import json
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from prometheus_client.parser import text_string_to_metric_families

# Products of small matrices: two threads wait for each other longer than they work.
torch.set_num_threads(1)
# The same examples in every run, and none of them timed: a busy machine is no counterexample.
settings.register_profile(
    "deltamux", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("deltamux")
# `make fuzz` asks for more examples than the tests have time for, and for others each time.
FUZZ_EXAMPLES = int(os.environ.get("DELTAMUX_FUZZ", "0"))
# How long `eventually` waits. Only an event that never comes takes that long.
PATIENCE_SECONDS = 300.0

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 272

# What makes an architecture another one, at values that tests of a few dozen tokens feel.
PECULIAR: dict[str, dict[str, object]] = {
    "ministral": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 32,
            "max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4},
}


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes and the chat template's marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        additional_special_tokens=SPECIAL_TOKENS[1:],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def save_base(
    directory: Path,
    model_type: str = "llama",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: object,
) -> Path:
    """A random checkpoint of a supported architecture."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": None,
    }
    if model_type == "qwen2":
        settings["hidden_size"] = 128
        del settings["head_dim"]
    config = CONFIG_MAPPING[model_type](**(settings | PECULIAR.get(model_type, {}) | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_expert(base: Path, directory: Path, seed: int = 1, scale: float = 0.3) -> Path:
    """A full fine-tune of a base: every weight moves, norms and biases too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * scale * parameter.float().std()
            parameter.add_(noise.to(parameter.dtype))
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def wait_until(condition: Callable[[], Any]) -> Any:
    """Call a condition until it is true, and return what it gave."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, f"not true in {PATIENCE_SECONDS} s: {condition}"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], Any]], Any]:
    """Waits for the event that a test asserts, however slow the machine is."""
    return wait_until


@contextmanager
def on_full_disk(room: int) -> Iterator[None]:
    """Files may not grow beyond so many bytes; pytest's own output neither, so that nothing may be reported inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def full_disk() -> Callable[[int], Any]:
    """Makes a disk full for a while: `with full_disk(bytes):`."""
    return on_full_disk


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(base, expert) of an architecture, made once a session."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(model_type: str = "llama", tied: bool = False) -> tuple[Path, Path]:
        key = f"{model_type}-{'tied' if tied else 'untied'}"
        if key not in made:
            root = tmp_path_factory.mktemp(key)
            base = save_base(root / "base", model_type, tied)
            made[key] = base, save_expert(base, root / "expert")
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few prompt/response rows."""
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows = [
        {"prompt": f"add {i} and {i + 3}", "response": f"the sum is {2 * i + 3}, done"}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def checkpoints() -> SimpleNamespace:
    """The makers above, for tests that need checkpoints of their own."""
    return SimpleNamespace(
        save_base=save_base,
        save_expert=save_expert,
        save_tokenizer=save_tokenizer,
        compress_tiny=compress_tiny,
        write_parts=write_parts,
        write_config=write_config,
        scraped=scraped,
        words=LIVE_WORDS,
        vocabulary=VOCABULARY,
        environment=SERVER_ENVIRONMENT,
    )


@pytest.fixture(scope="session")
def compress_pair(text_file: Path) -> Callable[..., Path]:
    """Compress an expert; calibrated and, where `verify` is set, verified on `text_file`."""
    from deltamux.compression.checkpoint.checkpoint import open_checkpoint
    from deltamux.compression.compress import compress
    from deltamux.compression.recipe import Recipe
    from deltamux.compression.streaming.rows import read_rows
    from deltamux.compression.streaming.text import encode_rows

    def run(
        base: Path,
        expert: Path,
        output: Path,
        *,
        scheme: str = "int2",
        salient_channels: int = 4,
        recipe: Recipe | None = None,
        verify: bool = False,
        overwrite: bool = False,
    ) -> Path:
        linear = {"scheme": scheme, "salient_channels": salient_channels}
        samples = encode_rows(read_rows(text_file), expert, max_tokens=64)
        compress(
            open_checkpoint(base),
            open_checkpoint(expert),
            output,
            recipe or Recipe.model_validate({"linear": linear}),
            calibration=samples[:8],
            held_out=samples[8:] if verify else [],
            overwrite=overwrite,
            progress=False,
        )
        return output

    return run


@pytest.fixture(scope="session")
def make_artifact(
    make_pair: Callable[..., tuple[Path, Path]],
    compress_pair: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """The artifact of a `make_pair`, made once a session; copy it before changing it."""
    made: dict[tuple[str, bool, str], Path] = {}

    def make(model_type: str = "llama", tied: bool = False, scheme: str = "int2") -> Path:
        key = model_type, tied, scheme
        if key not in made:
            output = tmp_path_factory.mktemp("artifact") / f"{model_type}-{scheme}"
            made[key] = compress_pair(*make_pair(model_type, tied), output, scheme=scheme)
        return made[key]

    return make


LIVE_NAMES = ("math", "sql", "shell")
LIVE_KEY = "secret"
SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@pytest.fixture(scope="session")
def server_environment() -> dict[str, str]:
    """What every server that tests start has in its environment."""
    return SERVER_ENVIRONMENT


LIVE_WORDS = {
    "math": "add subtract number sum total divide seven plus",
    "sql": "select table column where join rows database query",
    "shell": "list files directory grep folder permissions disk command",
    "general": "hello weather story friend music holiday advice dinner",
}
# Requests that the live server takes at once; more are refused with 503.
LIVE_QUEUE = 24


class SpanCollector:
    """An OTLP collector over HTTP that keeps the attributes of every span."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        spans: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in each.scope_spans:
                        spans.extend(map(_span_attributes, scope.spans))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.spans = spans
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def _span_attributes(span: Any) -> dict[str, Any]:
    values = {item.key: item.value for item in span.attributes}
    plain = {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}
    return {"name": span.name} | plain


def write_parts(
    folder: Path,
    text_file: Path,
    names: tuple[str, ...] = LIVE_NAMES,
    words: dict[str, str] = LIVE_WORDS,
    routed: dict[str, str] | None = None,
    **base_settings: object,
) -> Path:
    """A tiny base (returned), experts, a damaged one and a router, below a folder.

    The router's prompts are made of `words`, by domain; `routed` names the experts of domains that are not
    called like theirs; `base_settings` go to `save_base`.
    """
    from deltamux.router.fit.data import read_dataset
    from deltamux.router.fit.fit import fit_router
    from deltamux.router.fit.options import Options

    base = save_base(folder / "base", **base_settings)  # type: ignore[arg-type]
    for seed, name in enumerate(names, start=1):
        compress_tiny(
            base, save_expert(base, folder / f"tuned-{name}", seed), folder / name, text_file
        )
    shutil.copytree(folder / "sql", folder / "broken")
    weights = folder / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    prompts = folder / "prompts"
    prompts.mkdir()
    for domain, of_domain in words.items():
        each = of_domain.split()
        rows = [
            {"prompt": f"{each[i % 8]} the {each[(i * 3 + 1) % 8]} of {each[(i // 8) % 8]} {i}"}
            for i in range(48)
        ]
        (prompts / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit_router(
        read_dataset(prompts), folder / "router", Options(experts=routed or {}), base=str(base)
    )
    return base


def compress_tiny(base: Path, tuned: Path, output: Path, text_file: Path) -> None:
    """Compress with the defaults, unverified."""
    from deltamux.compression.checkpoint.checkpoint import open_checkpoint
    from deltamux.compression.compress import compress
    from deltamux.compression.recipe import Recipe
    from deltamux.compression.streaming.rows import read_rows
    from deltamux.compression.streaming.text import encode_rows

    samples = encode_rows(read_rows(text_file), tuned, 128)
    pair = open_checkpoint(base), open_checkpoint(tuned)
    compress(*pair, output, Recipe(), calibration=samples, held_out=[], progress=False)


def write_config(folder: Path, engine: dict[str, Any], **settings: Any) -> Path:
    """A configuration for what `write_parts` left in the folder; changes to it come as arguments."""
    content = {
        "version": 1,
        "base": {"model": "base"},
        "experts": [{"name": name, "path": name} for name in (*LIVE_NAMES, "broken")],
        "router": {"path": "router"},
        "slots": 2,
        "host_cache": "1GiB",
        "engine": {
            "served_model_name": "tiny",
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 2**26,
        }
        | engine,
    }
    config = folder / "deltamux.yaml"
    config.write_text(yaml.safe_dump(content | settings))
    return config


def scraped(page: str) -> dict[tuple[str, ...], float]:
    """A page of metrics as (name, label=value, …) → value."""
    return {
        (sample.name, *sorted(f"{k}={v}" for k, v in sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


@dataclass(frozen=True)
class Live:
    """A running server that logs requests and traces; `math` is pinned, two slots."""

    folder: Path
    server: Any
    traces: SpanCollector

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {LIVE_KEY}"}
        url = f"{self.server.url}{path}"
        return httpx.request(method, url, headers=headers, timeout=PATIENCE_SECONDS, **arguments)

    def samples(self) -> dict[tuple[str, ...], float]:
        """`/metrics` as (name, label=value, …) → value."""
        return scraped(self.http("GET", "/metrics").text)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Iterator[Live]:
    """A server for the tests of metrics, logs, traces, Prometheus and dashboards."""
    from deltamux.serve.demo.server import deltamux_serve, running_server

    folder = tmp_path_factory.mktemp("live")
    write_parts(folder, text_file)
    names = [{"name": name, "path": name} for name in (*LIVE_NAMES, "broken")]
    config = write_config(
        folder,
        {"max_num_queued_reqs": LIVE_QUEUE},
        experts=[{**names[0], "pin": True}, *names[1:]],
        log_requests=True,
    )
    traces = SpanCollector()
    environment = SERVER_ENVIRONMENT | {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    command = [*deltamux_serve(config), "--api-key", LIVE_KEY]
    command += ["--otlp-traces-endpoint", traces.url]
    with running_server(command, folder / "server.log", environment) as server:
        yield Live(folder, server, traces)
    traces.server.shutdown()
    traces.server.server_close()


@pytest.fixture(scope="session")
def debian_prometheus() -> Path:
    """The folder with Debian's `prometheus` and `promtool`.

    Where the package is not installed, apt fetches it and it is unpacked under `build/`: that needs no
    root and changes nothing on the machine.
    """
    installed = shutil.which("promtool")
    if installed and shutil.which("prometheus"):
        return Path(installed).parent
    folder = Path(__file__).parent.parent / "build" / "prometheus"
    binaries = folder / "usr" / "bin"
    if not (binaries / "promtool").is_file():
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        places = {"State::Lists": folder / "lists", "Cache": folder / "cache"}
        apt = ["apt-get", "-qq", *(f"-oDir::{key}={place}" for key, place in places.items())]
        subprocess.run([*apt, "update"], check=True, cwd=folder)
        subprocess.run([*apt, "download", "prometheus"], check=True, cwd=folder)
        (package,) = folder.glob("prometheus_*.deb")
        subprocess.run(["dpkg", "-x", package, folder], check=True)
    return binaries
