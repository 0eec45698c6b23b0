"""Tensor parallelism on a real engine of two CPU ranks, held against one rank."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import torch
from torch import distributed

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import merge
from deltamux.compression.checkpoint.architecture import EMBEDDING
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.image.layout import assemble
from deltamux.compression.image.weights import vector_record
from deltamux.serve.demo.server import Server, deltamux_serve, running_server
from deltamux.serve.status import STATUS_DIRECTORY_VARIABLE, STATUS_FILE, WorkerStatus
from deltamux.serve.worker.decoder import Task
from deltamux.serve.worker.host_cache import HostCache
from deltamux.serve.worker.ranks import Ranks
from deltamux.serve.worker.residency import Residency
from deltamux.serve.worker.slots import Slots
from deltamux.serve.worker.table import Wanted
from tests.serve.test_engine import PROMPT, SHORT, TOLERANCE, run_engine, transformers_prompt

pytestmark = pytest.mark.vllm

PATIENCE = 300

# Heads of 64, which vLLM's CPU attention wants on more than one rank.
HEADS = {"hidden_size": 128, "head_dim": 64}
# Biases; tied embeddings and norms of heads; q, k and v in one matrix; one head of keys for two ranks.
MODELS = {
    "qwen2": ("qwen2", False, {"hidden_size": 256}),
    "qwen3, tied": ("qwen3", True, HEADS),
    "phi3": ("phi3", False, {"hidden_size": 256, "pad_token_id": 0}),
    "one head of keys": ("llama", False, HEADS | {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_say_what_transformers_says_of_the_merged_weights(
    name: str, tmp_path: Path, checkpoints: SimpleNamespace, text_file: Path
) -> None:
    """As one rank does in `test_engine.py`, and within the same."""
    model_type, tied, overrides = MODELS[name]
    base = checkpoints.save_base(tmp_path / "base", model_type, tied, **overrides)
    artifacts: dict[str, str] = {}
    merged: dict[str | None, Path] = {None: base}
    for seed, expert in enumerate(("one", "two"), start=1):
        tuned = checkpoints.save_expert(base, tmp_path / f"tuned-{expert}", seed)
        checkpoints.compress_tiny(base, tuned, tmp_path / expert, text_file)
        artifacts[expert], merged[expert] = str(tmp_path / expert), tmp_path / f"merged-{expert}"
        merge(open_checkpoint(base), Artifact(tmp_path / expert), merged[expert], progress=False)
    batch: list[tuple[str | None, str]] = [
        *(("one", PROMPT), (None, PROMPT)),
        *(("two", SHORT), ("one", SHORT)),
    ]
    (answers,) = run_engine(tmp_path, base, True, artifacts, [batch], tensor_parallel_size=2)
    assert len({tuple(answer["prompt_logprobs"][:8]) for answer in answers}) == len(batch)
    for (expert, _), answer in zip(batch, answers, strict=True):
        torch.testing.assert_close(
            torch.tensor(answer["prompt_logprobs"]),
            torch.tensor(transformers_prompt(merged[expert], answer["prompt_ids"])),
            atol=TOLERANCE,
            rtol=0,
        )


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: SimpleNamespace, text_file: Path
) -> Iterator[Server]:
    """Two ranks, three experts and a damaged one; two have room in slots, one in host memory."""
    folder = tmp_path_factory.mktemp("ranks")
    checkpoints.write_parts(folder, text_file, ("math", "sql", "shell"), **HEADS)
    config = checkpoints.write_config(folder, {"tensor_parallel_size": 2}, host_cache="60kB")
    environment = checkpoints.environment | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with running_server(deltamux_serve(config), folder / "server.log", environment) as running:
        yield running


def ask(server: Server, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": SHORT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE)
    content: dict[str, Any] = answer.json()
    return content | {"status": answer.status_code}


def said(server: Server, model: str) -> str:
    answer = ask(server, model)
    assert answer["status"] == 200, answer
    text: str = answer["choices"][0]["text"]
    return text


def decoders(server: Server) -> list[psutil.Process]:
    """Those that run, by rank: the ranks' rows of the embedding are in order."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        words = process.cmdline()
        if "deltamux.serve.worker.decoder" in words:
            cut = Task.from_json(words[-2]).cuts[EMBEDDING]
            assert cut.rows is not None
            found.append((cut.rows, process))
    return [process for _, process in sorted(found)]


def seen_by(server: Server, rank: int) -> WorkerStatus:
    folder = decoders(server)[0].environ()[STATUS_DIRECTORY_VARIABLE]
    path = Path(folder) / STATUS_FILE.format(rank=rank)
    return WorkerStatus.model_validate_json(path.read_text())


def tier_of(server: Server, name: str) -> str:
    tier: str = httpx.get(f"{server.url}/v1/experts/{name}", timeout=PATIENCE).json()["tier"]
    return tier


def test_swaps_updates_and_deletions_keep_ranks_in_step(server: Server) -> None:
    names = ("math", "sql", "shell")
    first = {name: said(server, name) for name in (*names, "tiny")}
    assert len(set(first.values())) == len(first)
    for name in (*names, *reversed(names)):
        assert said(server, name) == first[name]
    folder = server.log.parent
    url = f"{server.url}/v1/experts"
    update = {"name": "math", "path": str(folder / "sql")}
    assert httpx.post(url, json=update, timeout=PATIENCE).status_code == 201
    assert said(server, "math") == first["sql"]
    back = {"name": "math", "path": str(folder / "math")}
    assert httpx.post(url, json=back, timeout=PATIENCE).status_code == 201
    assert said(server, "math") == first["math"]
    assert httpx.delete(f"{url}/shell", timeout=PATIENCE).status_code == 200
    assert ask(server, "shell")["status"] == 404
    known = [set(seen_by(server, rank).experts) for rank in range(2)]
    assert known[0] == known[1]
    assert ask(server, "broken")["status"] == 503
    assert all(seen_by(server, rank).stalls == 0 for rank in range(2))


def test_what_one_rank_cannot_load_is_refused_on_all_and_tried_again(server: Server) -> None:
    before = said(server, "sql")
    for name in ("math", "sql"):
        ask(server, name)
    folder = server.log.parent
    again = {"name": "sick", "path": str(folder / "shell")}
    decoder = decoders(server)[1]
    decoder.suspend()
    with ThreadPoolExecutor(1) as pool:
        offered = pool.submit(httpx.post, f"{server.url}/v1/experts", json=again, timeout=PATIENCE)
        # The other rank has looked at it, and waits for nobody.
        time.sleep(1)
        assert not offered.done()
        decoder.kill()
        refused = offered.result(PATIENCE)
    assert refused.status_code == 400, refused.text
    assert "decoder ended" in refused.text
    assert ask(server, "sick")["status"] == 404
    assert said(server, "sql") == before
    known = set(seen_by(server, 0).experts)
    assert httpx.post(f"{server.url}/v1/experts", json=again, timeout=PATIENCE).status_code == 201
    (expert_id,) = (number for number in seen_by(server, 0).experts if number not in known)
    # Host memory has room for one.
    other = {"name": "other", "path": str(folder / "math")}
    assert httpx.post(f"{server.url}/v1/experts", json=other, timeout=PATIENCE).status_code == 201
    assert tier_of(server, "sick") == "disk"
    decoder = decoders(server)[1]
    decoder.suspend()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, server, "sick")
        end = time.monotonic() + PATIENCE
        while seen_by(server, 0).experts[expert_id].tier == "disk":
            assert time.monotonic() < end
            time.sleep(0.05)
        decoder.kill()
        assert asked.result(PATIENCE)["status"] == 503
    assert tier_of(server, "sick") == "disk"
    assert expert_id not in seen_by(server, 0).experts
    assert said(server, "sick")
    assert tier_of(server, "sick") == "slot"


def test_a_step_whose_expert_fails_on_one_rank_has_the_base_on_all(tmp_path: Path) -> None:
    """Two processes over gloo; on the second the artifact cannot be read."""
    context = get_context("spawn")
    queue = context.Queue()
    places = [(rank, tmp_path / str(rank), tmp_path / "store", queue) for rank in range(2)]
    processes = [context.Process(target=step_on_a_rank, args=place) for place in places]
    for place, process in zip(places, processes, strict=True):
        place[1].mkdir()
        process.start()
    found = dict(queue.get(timeout=PATIENCE) for _ in processes)
    for process in processes:
        process.join(PATIENCE)
    # Of the expert that fails on one, and of the other.
    assert found[0] == ("another rank could not load it", True, None, False)
    assert found[1] == ("no such file", True, None, False)


def step_on_a_rank(rank: int, folder: Path, store: Path, queue: Any) -> None:
    os.environ[STATUS_DIRECTORY_VARIABLE] = str(folder)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    nothing = assemble({}, 1)
    image = assemble({0: vector_record(torch.ones(4))}, 1)

    def read(path: str) -> torch.Tensor:
        if path == "bad" and rank == 1:
            raise ValueError("no such file")
        return image

    slots = Slots(2, image.numel(), ["a"], torch.device("cpu"))
    ranks = Ranks(rank, 2, distributed.group.WORLD)
    residency = Residency(slots, HostCache(2**20), read, nothing, ranks)
    # Only on one rank has it been brought in before.
    if rank == 0:
        residency.enter(Wanted(1, "one@0.1", "bad"))
    placed = residency.begin([Wanted(1, "one@0.1", "bad"), Wanted(2, "two@0.2", "good")])
    told: list[Any] = []
    for expert_id in (1, 2):
        told += [residency.status.expert(expert_id).error]
        told += [slots.vector(placed[expert_id], 0, 4) is None]
    queue.put((rank, tuple(told)))
    distributed.barrier()
    distributed.destroy_process_group()
