"""Text front end: captions -> subword ids, [CLS] in front."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from mmmodel.configs import ConfigError, ModelConfig
from mmmodel.data import media
from mmmodel.data.shards import TEXT
from mmmodel.limits import CheckpointError

SPECIAL_TOKENS = ("[CLS]", "[IMG]", "[AUD]", "[MASK]")
# Characters of a caption that pieces are learnt from: with the length of one word the time grows squared, and a million
# would take hours in which not even Ctrl-C is heard.
LONGEST = 10_000


def train_tokenizer(
    captions: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> Tokenizer:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so any text in any script can be written.

    Captions are NFC and lower case first: "A flower." and "a flower." should share their pieces.  Of each the first
    LONGEST characters are read.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Sorted and unique: the pieces must not depend on the order in which shards were read.
    tokenizer.train_from_iterator(sorted({caption[:LONGEST] for caption in captions}), trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Raises CheckpointError for a file that is damaged."""
    return _parsed(Path(path).read_bytes(), path)


def _parsed(written: bytes, path: str | Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(written.decode())
    except Exception as error:  # what the Rust library raises has no type of its own
        raise CheckpointError(f"{path}: is no tokenizer, or a damaged one: {error}") from error


def load_language_model_tokenizer(path: str | Path, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """A Hugging Face tokenizer.json under our names for special tokens, with those it lacks added at the end.

    What it does around a text (truncate, pad, [CLS] and [SEP]) is taken off: the front end does it.
    """
    if not Path(path).is_file():
        raise ConfigError(f"text: no tokenizer at {path}, expected a tokenizer.json in Hugging Face format")
    written = Path(path).read_bytes()
    for theirs, ours in (("<s>", "[CLS]"), ("</s>", "[SEP]"), ("<mask>", "[MASK]")):  # RoBERTa's
        written = written.replace(json.dumps(theirs).encode(), json.dumps(ours).encode())
    tokenizer = _parsed(written, path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    tokenizer.add_special_tokens([token for token in special_tokens if tokenizer.token_to_id(token) is None])
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of the tokens that stand for no text, sorted: never hidden, never drawn in place of a hidden one."""
    return np.array(sorted(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special), np.int64)


class TextFrontEnd(nn.Module):
    """The stream is ids; the model's embedding operator reads their rows from the token table."""

    members = TEXT
    decode = staticmethod(media.decode_text)
    special = None  # [CLS] is an ordinary first id: the stream has it already

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.max_tokens = config.text.max_tokens
        self.longest = self.max_tokens, f"{self.max_tokens} tokens"
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # "[MASK]" in a caption is a word
        self.cls_id = tokenizer.token_to_id("[CLS]")
        self.sep_id = tokenizer.token_to_id("[SEP]")  # of a pretrained language model; None in a tokenizer of our own
        self.positions = (self.max_tokens,)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.tokenizer.encode_special_tokens = True  # a copied tokenizer forgets it, as a saved one does

    def prepare(self, caption: str) -> np.ndarray:
        """Ids, int32 [n], [CLS] first and [SEP], if there is one, last; at most max_tokens."""
        end = [] if self.sep_id is None else [self.sep_id]
        beginning = caption[: max(LONGEST, 100 * self.max_tokens)]  # of a book the rest would be cut in pieces in vain
        ids = [self.cls_id, *self.tokenizer.encode(beginning).ids]
        return np.array([*ids[: self.max_tokens - len(end)], *end], np.int32)

    def shape(self, features: np.ndarray) -> int:
        return len(features)

    def augment(self, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return features

    def collate(self, features: list[np.ndarray]) -> tuple[Tensor]:
        ids = np.concatenate(features) if features else np.zeros(0, np.int32)
        return (torch.from_numpy(ids.astype(np.int64)),)

    def computed_rows(self, ids: Tensor) -> int:
        return len(ids)

    def forward(self, ids: Tensor) -> Tensor:
        return ids
