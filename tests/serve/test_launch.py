"""`deltamux serve`: what it hands to vLLM, and what it refuses at once."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from deltamux.serve.cli import app
from deltamux.serve.launch import check_port, found_configuration, vllm_arguments
from deltamux.serve.settings import load_settings


def settings(folder: Path, **changes: Any) -> Any:
    (folder / "base").mkdir(exist_ok=True)
    path = folder / "deltamux.yaml"
    path.write_text(yaml.safe_dump({"base": {"model": "base"}} | changes))
    return load_settings(path, {})


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_the_configuration_becomes_vllms_flags(tmp_path: Path) -> None:
    engine = {
        "max_model_len": 64,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "quantization": None,
        "served_model_name": ["a", "b"],
    }
    arguments = vllm_arguments(settings(tmp_path, slots=3, engine=engine), ["--port", "1"])
    assert value(arguments, "--model") == str(tmp_path / "base")
    assert value(arguments, "--max-loras") == "3"
    assert value(arguments, "--max-model-len") == "64"
    assert {"--enable-lora", "--enforce-eager", "--no-enable-prefix-caching"} <= set(arguments)
    assert not {"--quantization", "--no-disable-log-stats"} & set(arguments)
    index = arguments.index("--served-model-name")
    assert arguments[index + 1 : index + 3] == ["a", "b"]
    assert arguments[-2:] == ["--port", "1"]


def test_vllm_gets_a_cpu_capacity_for_every_expert(tmp_path: Path) -> None:
    experts = [{"name": f"e{i}", "path": f"e{i}"} for i in range(6)]
    arguments = vllm_arguments(settings(tmp_path, slots=2, experts=experts), [])
    assert value(arguments, "--max-cpu-loras") == "6"


def test_deltamuxs_settings_are_part_of_vllms_cache_key(tmp_path: Path) -> None:
    engine = {"additional_config": {"mine": 1}}
    arguments = vllm_arguments(settings(tmp_path, engine=engine), [])
    additional = json.loads(value(arguments, "--additional-config"))
    assert additional["mine"] == 1
    assert additional["deltamux"]["version"] == 1
    assert additional["deltamux"]["slot"] == {"bytes": "auto", "rank": "auto"}


def test_vllm_reads_the_files_that_experts_belong_to(tmp_path: Path) -> None:
    arguments = vllm_arguments(settings(tmp_path), ["--load-format", "dummy"])
    assert value(arguments, "--config-format") == "hf"
    assert value(arguments, "--load-format") == "hf"
    assert arguments[-2:] == ["--load-format", "dummy"]


def test_weights_that_vllm_would_load_beside_the_others_are_refused(tmp_path: Path) -> None:
    found = settings(tmp_path)
    for name in ("model.safetensors", "consolidated.safetensors", "params.json"):
        (tmp_path / "base" / name).touch()
    with pytest.raises(ValueError, match=r"holds 'consolidated\.safetensors' beside"):
        vllm_arguments(found, [])
    # An index says which files count.
    (tmp_path / "base" / "model.safetensors.index.json").touch()
    assert vllm_arguments(found, [])


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


def configure_base(folder: Path, **content: Any) -> None:
    (folder / "base" / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("where", ["file", "flag", "short"])
def test_ranks_that_divide_no_matrix_are_refused_with_those_that_do(
    tmp_path: Path, where: str
) -> None:
    found = settings(tmp_path, engine={"tensor_parallel_size": 3} if where == "file" else {})
    extra = {"file": [], "flag": ["--tensor-parallel-size=3"], "short": ["-tp", "3"]}[where]
    configure_base(tmp_path, **HEADS)
    with pytest.raises(
        ValueError, match=r"is 3, which does not divide the 4 heads.*one of 1, 2, 4"
    ):
        vllm_arguments(found, extra)
    # Two heads of keys and values for four ranks: two ranks have the same.
    assert vllm_arguments(settings(tmp_path), ["-tp", "4"])
    configure_base(tmp_path, **HEADS | {"intermediate_size": 98})
    with pytest.raises(ValueError, match="98 rows"):
        vllm_arguments(settings(tmp_path), ["-tp", "4"])


def test_a_base_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    found = settings(tmp_path)
    configure_base(tmp_path, quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match=r"quantized by 'awq'.*base\.quantized"):
        vllm_arguments(found, [])


@pytest.mark.parametrize("place", ["vocabulary", "added"])
def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path, place: str) -> None:
    found = settings(tmp_path)
    configure_base(tmp_path, vocab_size=3)
    tokens = {"a": 0, "b": 2} | ({"c": 3} if place == "vocabulary" else {})
    added = [{"content": "c", "id": 3}] if place == "added" else []
    file = tmp_path / "base" / "tokenizer.json"
    file.write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": added}))
    with pytest.raises(ValueError, match="the token 'c' with id 3, the embedding has 3 rows"):
        vllm_arguments(found, [])
    assert vllm_arguments(found, ["--tokenizer", "elsewhere"])
    configure_base(tmp_path, vocab_size=4)
    assert vllm_arguments(found, [])


@pytest.mark.parametrize("where", ["file", "flag", "joined"])
def test_a_base_is_looked_for_where_vllm_downloads_to(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "downloads"
    snapshot = folder / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (folder / "models--org--name" / "refs").mkdir()
    (folder / "models--org--name" / "refs" / "main").write_text("0" * 40)
    engine = {"download_dir": str(folder)} if where == "file" else {}
    extra = {
        "file": [],
        "flag": ["--download-dir", str(folder)],
        "joined": [f"--download-dir={folder}"],
    }
    changes: dict[str, Any] = {"base": {"model": "org/name"}, "engine": engine}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        arguments = vllm_arguments(settings(tmp_path, **changes), extra[where])
    assert value(arguments, "--model") == "org/name"


def test_paths_of_the_configuration_begin_at_home_where_they_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "base").mkdir(parents=True)
    experts = [{"name": "math", "path": "~/math"}, {"name": "sql", "path": "sql"}]
    router = {"path": "~/router", "log": "~/log.jsonl"}
    found = settings(tmp_path, base={"model": "~/base"}, experts=experts, router=router)
    assert found.base.model == str(tmp_path / "home" / "base")
    assert [expert.path for expert in found.experts] == [
        tmp_path / "home" / "math",
        tmp_path / "sql",
    ]
    assert found.router.path == tmp_path / "home" / "router"
    assert found.router.log == tmp_path / "home" / "log.jsonl"


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["c.yaml", "--port", "8000"], ["--port", "8000"]),
        (
            ["--host", "0.0.0.0", "--port", "8000", "c.yaml"],
            ["--host", "0.0.0.0", "--port", "8000"],
        ),
        (["--port=8000", "c.yaml"], ["--port=8000"]),
        (["--enforce-eager", "c.yaml", "--port", "1"], ["--enforce-eager", "--port", "1"]),
        (["--config", "v.yaml", "c.yaml"], ["--config", "v.yaml"]),
        (["--chat-template", "none.yaml", "c.yaml"], ["--chat-template", "none.yaml"]),
    ],
    ids=" ".join,
)
def test_the_configuration_is_found_among_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], flags: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c.yaml", "v.yaml"):
        (tmp_path / name).touch()
    assert found_configuration(words) == (Path("c.yaml"), flags)


@pytest.mark.parametrize("words", [["--port", "1"], ["--a", "c.yaml", "v.yaml"]], ids=" ".join)
def test_no_configuration_among_flags_is_said_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c.yaml", "v.yaml"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="the configuration comes first: deltamux serve"):
        found_configuration(words)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deltamux.serve", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not a file"),
        ("base: {model: nowhere/at/all}", "neither a directory nor a hub id"),
        ("base: {model: /}\nslots: none", "slots"),
        ("speed: fast", "speed"),
    ],
)
def test_a_wrong_start_is_one_line_and_exit_2(
    tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "deltamux.yaml"
    if content is not None:
        path.write_text(content)
    done = run("serve", str(path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_is_frozen() -> None:
    commands = typer.main.get_command(app)
    options = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in commands.commands.items()  # type: ignore[attr-defined]
        if name != "router"
    }
    assert options == {
        "compress": [
            "--base-as-served",
            "--bits",
            "--budget",
            "--calibration",
            "--held-out",
            "--json",
            "--lossless",
            "--output",
            "--overwrite",
            "--preset",
            "--recipe",
            "--slot-bits",
            "--target-kl",
            "-o",
            "base",
            "expert",
        ],
        "inspect": ["--json", "artifact"],
        "key": ["--stdin"],
        "merge": ["--dtype", "--output", "-o", "artifact", "base"],
        "evaluate": [
            "--data",
            "--json",
            "--max-rows",
            "--max-tokens",
            "artifact",
            "base",
            "expert",
        ],
        "route": ["--jsonl", "--router", "text"],
        "serve": ["--host-cache", "--slots", "config"],
        "demo": ["--base", "--experts", "--root", "--serve", "more"],
        "plan": [
            "--bound",
            "--concurrency",
            "--experts",
            "--json",
            "--replicas",
            "--slots",
            "--swaps",
            "--zipf",
            "file",
        ],
        "fleet": ["--port", "--replicas", "config"],
    }


@pytest.mark.parametrize(
    "given", [["--download-dir", "DIR"], ["--download-dir=DIR"], ["--download_dir", "DIR"], []]
)
def test_a_base_is_looked_for_where_vllm_will_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(source: str, **arguments: Any) -> str:
        asked.update(arguments, source=source)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    engine = {} if given else {"download_dir": "DIR"}
    vllm_arguments(settings(tmp_path, base={"model": "org/base"}, engine=engine), given)
    assert (asked["source"], asked["cache_dir"]) == ("org/base", "DIR")


@pytest.mark.parametrize("spelled", ["--port {}", "--port={}", "engine"])
def test_a_port_that_is_taken_is_named(spelled: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        engine = {"port": port} if spelled == "engine" else {}
        extra = [] if spelled == "engine" else spelled.format(port).split()
        with pytest.raises(ValueError, match=rf"the port {port} of '127\.0\.0\.1' cannot be had"):
            check_port(engine, ["--host", "127.0.0.1", *extra])
    check_port({}, ["--host", "127.0.0.1", "--port", str(port)])
