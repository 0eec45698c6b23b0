"""Small random checkpoints of every supported architecture, with a byte-level tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Products of small matrices: two threads wait for each other longer than they work.
torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 272


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
    config = CONFIG_MAPPING[model_type](**(settings | overrides))
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
        save_base=save_base, save_expert=save_expert, save_tokenizer=save_tokenizer
    )


@pytest.fixture(scope="session")
def compress_pair(text_file: Path) -> Callable[..., Path]:
    """Compress an expert; calibrated and, where `verify` is set, verified on `text_file`."""
    from deltamux.compression.checkpoint import open_checkpoint
    from deltamux.compression.compress import compress
    from deltamux.compression.recipe import Recipe
    from deltamux.compression.text import encode_rows, read_rows

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
