"""The training text: split, tokenizer, token ids, batches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # special tokens come first in the vocabulary
VOCABULARY_SIZE = 1024
HELD_OUT_SHARE = 0.1
CONTEXT_LENGTH = 512  # tokens of the longest training window, and of every held-out window
WINDOW_LENGTHS = (256, 256, 512)  # of successive epochs: short windows train faster
TOKENS_PER_STEP = 1024


@dataclass(frozen=True)
class Corpus:
    """The text as token ids, split once into a training part and a held-out part."""

    train_ids: Tensor  # [N_train]
    held_out_ids: Tensor  # [N_held_out]
    held_out_characters: int  # characters of every held-out token but the first, which is never predicted
    characters: int
    sha256: str


def split_text(text: str) -> tuple[str, str]:
    """Cut the last tenth off as held-out text, at a line start."""
    cut = text.index("\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 1
    return text[:cut], text[cut:]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE, so that every string can be encoded and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Return the token ids of a long text, `[N]`."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids, dtype=torch.long)


def load_corpus(path: Path) -> tuple[PreTrainedTokenizerFast, Corpus]:
    """Read the text, train the tokenizer on its training part and encode both parts."""
    text = path.read_text(encoding="utf-8")
    train_text, held_out_text = split_text(text)
    tokenizer = train_tokenizer(train_text)
    held_out_ids = encode(tokenizer, held_out_text)
    corpus = Corpus(
        train_ids=encode(tokenizer, train_text),
        held_out_ids=held_out_ids,
        held_out_characters=len(held_out_text) - len(str(tokenizer.decode(held_out_ids[:1]))),
        characters=len(text),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    return tokenizer, corpus


def batches(ids: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `(inputs, targets)`, each `[B, T]`, for ever.

    Every epoch cuts the text at a new random offset and shuffles the windows.
    """
    for length in itertools.cycle(WINDOW_LENGTHS):
        batch_size = TOKENS_PER_STEP // length
        offset = int(torch.randint(length, (1,), generator=generator))
        windows = ids[offset:].unfold(0, length + 1, length)  # [W, T + 1]
        order = torch.randperm(windows.shape[0], generator=generator)
        for chosen in order.split(batch_size):
            if len(chosen) == batch_size:
                yield windows[chosen, :-1], windows[chosen, 1:]
