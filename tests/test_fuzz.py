"""Whatever stands in a file or a request: it is read, or refused in a line; nothing else happens.

`make test` tries the same few hundred damages of each kind in every run; `make fuzz` tries as many others as it is told
to (`DELTAMUX_FUZZ`). Damages are of valid material, since random bytes end at the first check.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deltamux.compression.artifact import entropy
from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.lossless import decode_exact, encode_exact
from deltamux.compression.artifact.manifest import manifest_sha256
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.checkpoint.settings import read_side_settings
from deltamux.compression.files import sha256
from deltamux.compression.image.adapter import Adapter
from deltamux.compression.image.build import adapter_image, artifact_image
from deltamux.compression.image.layout import RECORD_BYTES, assemble, check_image
from deltamux.compression.image.source import open_source

EXAMPLES = int(os.environ.get("DELTAMUX_FUZZ", "0"))
VOCABULARY = 272


def fuzz(examples: int) -> Any:
    """Settings of a test: its number of examples, or the one that is asked for."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# Places by share of the length, so that they shrink, and what stands there then.
damages = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
)
lengths = st.floats(0, 1)
texts = st.text(max_size=30)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | texts
    | st.sampled_from([0, 1, -1, 20.0, 2**31, "eos", "<|end|>", VOCABULARY]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


def damaged(content: bytes, places: list[tuple[float, int]], kept: float = 1.0) -> bytes:
    """Bytes with some of them changed, and perhaps without their end."""
    found = bytearray(content)
    for place, value in places:
        found[int(place * len(found))] = value
    return bytes(found[: max(1, round(kept * len(found)))])


def changed(content: Any, path: list[int], value: Any) -> Any:
    """JSON with the value at a path replaced, dropped or put in; indices are taken modulo what is there."""
    if not isinstance(content, dict | list) or not content or not path:
        return value
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[path[0] % len(keys)]
    copied = content.copy()
    copied[key] = changed(content[key], path[1:], value)
    return copied


def refused_or(work: Callable[[], Any]) -> Any:
    """What comes of it; None where it is refused in a line."""
    try:
        return work()
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
    assert said
    return None


@fuzz(400)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    levels=st.sampled_from([2, 3, 5, 16, 256]),
    seed=st.integers(0, 2**32 - 1),
    places=damages,
    kept=lengths,
    raw=st.booleans(),
)
def test_streams_of_codes(  # noqa: PLR0917 - what hypothesis draws
    shape: tuple[int, int],
    levels: int,
    seed: int,
    places: list[tuple[float, int]],
    kept: float,
    raw: bool,
) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, levels, shape, np.uint8)
    codes[random.random(shape) < 0.7] = levels // 2
    whole = entropy.deflate(torch.from_numpy(codes)).numpy().tobytes()
    # Behind the deflate code, or under it: the former is what its own checks would never let through.
    if raw:
        import zlib

        inner = damaged(zlib.decompress(whole, -15), places, max(kept, 0.9))
        encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
        content = encoder.compress(inner) + encoder.flush()
    else:
        content = damaged(whole, places, kept)
    stream = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    found = refused_or(lambda: entropy.inflate(stream, levels, *shape))
    if found is not None:
        assert found.shape == shape
        assert int(found.max()) < levels


@fuzz(200)
@given(
    content=st.binary(max_size=200),
    shape=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    levels=st.integers(2, 256),
)
def test_streams_of_anything(content: bytes, shape: tuple[int, int], levels: int) -> None:
    stream = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.zeros(0, dtype=torch.uint8)
    )
    found = refused_or(lambda: entropy.inflate(stream, levels, *shape))
    assert found is None or found.shape == shape


@fuzz(200)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.integers(1, 300),
    places=damages,
    kept=lengths,
)
def test_exact_differences(
    dtype: torch.dtype, size: int, places: list[tuple[float, int]], kept: float
) -> None:
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator).to(dtype)
    expert = (base.float() + 0.01 * torch.randn(size, generator=generator)).to(dtype)
    whole = encode_exact(expert, base).numpy().tobytes()
    stream = torch.frombuffer(bytearray(damaged(whole, places, kept)), dtype=torch.uint8)
    found = refused_or(lambda: decode_exact(stream, base))
    assert found is None or (found.shape, found.dtype) == (base.shape, base.dtype)


@pytest.fixture(scope="module")
def material(
    make_pair: Callable[..., tuple[Path, Path]],
    make_artifact: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, dict[str, tuple[int, ...]]]:
    """An artifact that may be damaged, its original, and the shapes of its base."""
    folder = tmp_path_factory.mktemp("fuzz")
    original = make_artifact("qwen2")
    base = open_checkpoint(make_pair("qwen2")[0])
    shapes = {name: base.shape(name) for name in base.files}
    check_values(image_of(original, shapes), shapes)
    return shutil.copytree(original, folder / "artifact"), original, shapes


def seal(folder: Path) -> None:
    """Hashes that say nothing is wrong: what is tested stands behind them."""
    path = folder / "delta_config.json"
    try:
        content = json.loads(path.read_text())
        content["weights_sha256"] = sha256(folder / "model.safetensors")
        content["totals"]["weights_file_bytes"] = (folder / "model.safetensors").stat().st_size
        content["sha256"] = manifest_sha256(content)
        path.write_text(json.dumps(content))
    except (ValueError, TypeError, KeyError):
        return


def image_of(folder: Path, shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
    """As the server makes it, of an artifact of this base."""
    artifact = Artifact(folder)
    artifact.check_servable()
    artifact.check_content()
    return artifact_image(artifact, shapes)


def check_values(image: torch.Tensor | None, shapes: dict[str, tuple[int, ...]]) -> None:
    """That an image that was made is one, and says nothing that is not finite."""
    from deltamux.compression.image.dense import served_delta
    from deltamux.compression.image.layout import ImageReader

    if image is None:
        return
    check_image(image, len(shapes))
    reader = ImageReader(image)
    for index, shape in enumerate(shapes.values()):
        if len(shape) == 2:
            assert bool(torch.isfinite(served_delta(reader, index, *shape)).all())


@fuzz(150)
@given(places=damages, kept=st.floats(0.9, 1), in_header=st.booleans())
def test_weights_of_artifacts(
    material: tuple[Path, Path, dict[str, tuple[int, ...]]],
    places: list[tuple[float, int]],
    kept: float,
    in_header: bool,
) -> None:
    folder, original, shapes = material
    whole = (original / "model.safetensors").read_bytes()
    shutil.copy(original / "delta_config.json", folder)
    if in_header:
        end = 8 + int.from_bytes(whole[:8], "little")
        content = damaged(whole[:end], places) + whole[end:]
    else:
        content = damaged(whole, places, 1.0 if kept > 0.95 else kept)
    (folder / "model.safetensors").write_bytes(content)
    seal(folder)
    check_values(refused_or(lambda: image_of(folder, shapes)), shapes)


@fuzz(150)
@given(path=st.lists(st.integers(0, 1000), min_size=1, max_size=5), value=json_values)
def test_manifests(
    material: tuple[Path, Path, dict[str, tuple[int, ...]]], path: list[int], value: Any
) -> None:
    folder, original, shapes = material
    shutil.copy(original / "model.safetensors", folder)
    content = json.loads((original / "delta_config.json").read_text())
    (folder / "delta_config.json").write_text(json.dumps(changed(content, path, value)))
    seal(folder)
    check_values(refused_or(lambda: image_of(folder, shapes)), shapes)


@fuzz(150)
@given(places=damages, kept=lengths)
def test_bytes_of_manifests(
    material: tuple[Path, Path, dict[str, tuple[int, ...]]],
    places: list[tuple[float, int]],
    kept: float,
) -> None:
    folder, original, _ = material
    shutil.copy(original / "model.safetensors", folder)
    whole = (original / "delta_config.json").read_bytes()
    (folder / "delta_config.json").write_bytes(damaged(whole, places, kept))
    refused_or(lambda: open_source(folder, 64))


ADAPTER_SHAPES: dict[str, tuple[int, ...]] = {"model.layers.0.mlp.down_proj.weight": (24, 40)}


@fuzz(200)
@given(
    keys=st.dictionaries(
        st.sampled_from(
            [
                *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias"),
                *("fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern"),
            ]
        ),
        json_values,
        max_size=3,
    ),
    places=damages,
    kept=st.floats(0.8, 1),
    rank=st.integers(0, 5),
)
def test_adapters(
    tmp_path_factory: pytest.TempPathFactory,
    keys: dict[str, Any],
    places: list[tuple[float, int]],
    kept: float,
    rank: int,
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(rank, 40),
        f"{prefix}.lora_B.weight": torch.ones(24, rank),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    if kept < 0.9:
        (folder / "adapter_model.safetensors").write_bytes(damaged(whole, places, kept + 0.1))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | keys
    (folder / "adapter_config.json").write_text(json.dumps(config))
    image = refused_or(lambda: adapter_image(Adapter(folder, 64), ADAPTER_SHAPES))
    check_values(image, ADAPTER_SHAPES)
    shutil.rmtree(folder)


@fuzz(300)
@given(
    file=st.sampled_from(["generation_config.json", "config.json", "tokenizer_config.json"]),
    content=st.dictionaries(
        st.sampled_from(
            [
                *("eos_token_id", "temperature", "top_p", "top_k", "min_p", "max_new_tokens"),
                *("repetition_penalty", "eos_token", "chat_template", "added_tokens_decoder"),
            ]
        ),
        json_values,
    )
    | json_values,
)
def test_what_stands_beside_the_weights(
    tmp_path_factory: pytest.TempPathFactory, file: str, content: Any
) -> None:
    folder = tmp_path_factory.mktemp("side")
    (folder / file).write_text(json.dumps(content))
    found = refused_or(lambda: read_side_settings(folder, VOCABULARY, {"<|end|>": 256}.get))
    if found is not None:
        assert all(type(each) is int and 0 <= each < VOCABULARY for each in found.stop_ids)
        assert all(np.isfinite(value) for value in found.sampling.values())
        assert found.template is None or isinstance(found.template, str)
    shutil.rmtree(folder)


@fuzz(200)
@given(
    template=st.text(
        st.sampled_from("{}%-#| ()[]'\"abcforinifendset=.+*,0123456789\n\\"), max_size=60
    )
)
def test_templates(tmp_path_factory: pytest.TempPathFactory, template: str) -> None:
    folder = tmp_path_factory.mktemp("template")
    (folder / "chat_template.jinja").write_text(template)
    found = refused_or(lambda: read_side_settings(folder, VOCABULARY))
    assert found is None or found.template == template
    shutil.rmtree(folder)


@fuzz(300)
@given(places=damages, count=st.integers(0, 6), kept=lengths)
def test_heads_of_slot_images(places: list[tuple[float, int]], count: int, kept: float) -> None:
    whole = assemble({}, 4).numpy().tobytes()
    content = damaged(whole, places, kept)
    image = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if refused_or(lambda: check_image(image, count) or True):
        assert len(content) >= count * RECORD_BYTES


@pytest.fixture(scope="module")
def kept_image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, bytes, torch.Tensor]:
    """A cache of one slot image, its file, what stands in it, and the image."""
    from deltamux.compression.image.layout import Field, Record
    from deltamux.serve.worker.image_cache import ImageCache

    cache = ImageCache(2**20, {"a.weight": (8,)}, tmp_path_factory.mktemp("images"))
    image = assemble({0: Record({}, {Field.VECTOR: np.arange(8, dtype=np.float32)})}, 1)
    cache.image("content", lambda: image)
    (file,) = cache.folder.iterdir()
    return cache, file, file.read_bytes(), image


@fuzz(300)
@given(places=damages, kept=lengths, ended=st.binary(max_size=40))
def test_files_of_kept_slot_images(
    kept_image: tuple[Any, Path, bytes, torch.Tensor],
    places: list[tuple[float, int]],
    kept: float,
    ended: bytes,
) -> None:
    cache, file, whole, image = kept_image
    file.write_bytes(damaged(whole, places, kept) + ended)
    made: list[torch.Tensor] = []
    found = cache.image("content", lambda: made.append(image) or image)
    # Whatever stood there, a slot gets the image, and the next reader finds it whole.
    assert torch.equal(found, image)
    assert file.read_bytes() == whole


@pytest.fixture(scope="module")
def router(
    tmp_path_factory: pytest.TempPathFactory, make_pair: Callable[..., tuple[Path, Path]]
) -> tuple[Path, Path, Path]:
    """A router that may be damaged, its original, and its base."""
    from deltamux.router.fit.data import read_dataset
    from deltamux.router.fit.fit import fit_router

    folder, base = tmp_path_factory.mktemp("router"), make_pair()[0]
    words = {
        "math": "add subtract number sum",
        "sql": "select table column join",
        "general": "hi you",
    }
    (folder / "data").mkdir()
    for domain, each in words.items():
        rows = [
            {"prompt": f"{each.split()[i % len(each.split())]} {i} {each[:4]}"} for i in range(40)
        ]
        path = folder / "data" / f"{domain}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit_router(read_dataset(folder / "data"), folder / "original", base=str(base))
    assert decided(folder / "original", folder / "original", base).confidence > 0
    return shutil.copytree(folder / "original", folder / "router"), folder / "original", base


def decided(folder: Path, original: Path, base: Path) -> Any:
    from deltamux.router.decide.router import Router
    from deltamux.router.decide.tokenizer import load_tokenizer, tokenizer_sha256

    found = Router.load(folder, tokenizer_sha256=tokenizer_sha256(base))
    return found.decide(["select the table"], load_tokenizer(original))


@fuzz(100)
@given(path=st.lists(st.integers(0, 100), min_size=1, max_size=3), value=json_values)
def test_configurations_of_routers(
    router: tuple[Path, Path, Path], path: list[int], value: Any
) -> None:
    folder, original, base = router
    shutil.copy(original / "router.safetensors", folder)
    content = json.loads((original / "router_config.json").read_text())
    (folder / "router_config.json").write_text(json.dumps(changed(content, path, value)))
    found = refused_or(lambda: decided(folder, original, base))
    assert found is None or 0 <= found.confidence <= 1


@fuzz(100)
@given(places=damages, kept=st.floats(0.9, 1), in_header=st.booleans())
def test_tables_of_routers(
    router: tuple[Path, Path, Path],
    places: list[tuple[float, int]],
    kept: float,
    in_header: bool,
) -> None:
    folder, original, base = router
    shutil.copy(original / "router_config.json", folder)
    whole = (original / "router.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    content = (
        damaged(whole[:end], places) + whole[end:]
        if in_header
        else damaged(whole, places, 1.0 if kept > 0.95 else kept)
    )
    (folder / "router.safetensors").write_bytes(content)
    found = refused_or(lambda: decided(folder, original, base))
    assert found is None or 0 <= found.confidence <= 1


requests = st.dictionaries(
    st.sampled_from(
        ["messages", "prompt", "input", "metadata", "token_ids", "query", "previous_response_id"]
    ),
    json_values
    | st.lists(st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), json_values))
    | st.builds(lambda allow: {"deltamux": allow}, json_values),
)


@pytest.mark.vllm
@fuzz(300)
@given(request=requests)
def test_requests_for_auto(router: tuple[Path, Path, Path], request: dict[str, Any]) -> None:
    from deltamux.router.decide.tokenizer import load_tokenizer
    from deltamux.serve.api.autoroute import AutoRoute
    from deltamux.serve.settings import RouterSettings

    _, original, base = router
    encode = load_tokenizer(original)
    route = AutoRoute(RouterSettings(path=original), base, encode, lambda _: True)
    assert route.error is None
    decisions = refused_or(lambda: route.decide_each(request, counted=True)) or []
    assert all(0 <= decision.confidence <= 1 for decision in decisions)
    json.dumps([decision.to_json() for decision in decisions])


@pytest.mark.vllm
@fuzz(300)
@given(
    path=st.text(st.sampled_from("/v1.experts%2e\\?#{}ab:;&= é"), max_size=30),
    authorization=st.binary(max_size=60),
    method=st.sampled_from(["GET", "POST", "DELETE", "HEAD", "PUT", "OPTIONS", "x"]),
)
def test_requests_at_the_door(path: str, authorization: bytes, method: str) -> None:
    import asyncio

    from deltamux.serve.api.access import Access, access_of
    from deltamux.serve.api.guard import Doors, Guard

    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(b"authorization", authorization)],
    }
    asyncio.run(Guard(app, Doors(api_keys=["secret"]))(scope, None, send))  # type: ignore[arg-type]
    if access_of(method, path) in (Access.OPEN, Access.METRICS):
        assert reached
    else:
        opened = authorization.lower().startswith(b"bearer ") and authorization[7:] == b"secret"
        assert bool(reached) == opened
        assert reached or sent[0]["status"] in (401, 403)
