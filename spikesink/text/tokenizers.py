"""Tokenizers turn text into token ids and back: GPT-2's BPE, or bytes."""

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import UserError, extra
from .token_files import Meta

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END = "<|endoftext|>"
GPT2_SIZE = 50257
Spans = list[tuple[int, int]]  # for each token, the characters [start, end) of the text that it covers


class TextTokenizer(Protocol):
    """The methods that every tokenizer has.

    Some also have `bos_id`; `separator_id`, the id between documents if that is not `bos_id`; `special_ids`, {text of a
    special token: its id}; `text(ids)`, an array of ids -> text; `n_bytes(ids)` and `spans(texts)`, for the functions
    `n_bytes` and `spans_of`.
    """

    def encode(self, texts: list[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """Texts -> their ids, without special tokens. One that a text spells is read as text. Raises UserError."""

    def decode(self, token: int) -> str:
        """One id -> text to show."""


class ByteTokenizer:
    """UTF-8 bytes. Id 256 begins a sequence and separates documents."""

    name, vocab_size, bos_id = "byte", 257, 256
    bpe: str | None = None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """A list of strings -> a list of arrays of ids."""
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]

    def spans(self, texts: list[str]) -> list[tuple[list[int], Spans]]:
        """See `spans_of`."""
        length = lambda token: self.n_bytes([token])
        return [spans_of_bytes(text, ids, length) for text, ids in zip(texts, self.encode(texts), strict=True)]

    def decode(self, token: int) -> str:
        """One id -> text to show."""
        if token >= self.bos_id:
            return "<bos>" if token == self.bos_id else f"<{token}>"
        return bytes([token]).decode("ascii", "backslashreplace")

    def text(self, ids: np.ndarray) -> str:
        """An array of ids -> text; documents stand a blank line apart."""
        parts = np.split(ids, np.flatnonzero(ids == self.bos_id))
        return "\n\n".join(part[part < 256].astype(np.uint8).tobytes().decode("utf-8", "replace") for part in parts)

    def n_bytes(self, ids: Sequence[int]) -> int:
        """See `n_bytes`."""
        return sum(i < 256 for i in ids)


class GPT2Tokenizer(ByteTokenizer):
    """GPT-2's byte-level BPE from tiktoken. Its last id (<|endoftext|>) begins a sequence and separates documents.

    `bpe` is a local file of ranks (gpt2.tiktoken); without it tiktoken downloads them once. A smaller `vocab_size` uses
    only the first merges, which are a BPE, too, for models too small for 50,257 embeddings. Raises UserError.
    """

    name = "gpt2"

    def __init__(self, bpe: str | Path | None = None, vocab_size: int = GPT2_SIZE) -> None:
        with extra("bpe"):
            import tiktoken
            from tiktoken.load import load_tiktoken_bpe

        self.bpe = str(Path(bpe).resolve()) if bpe else None
        self.vocab_size, self.bos_id = vocab_size, vocab_size - 1
        self.special_ids = {END: self.bos_id}
        if not 256 < vocab_size <= GPT2_SIZE:
            raise UserError(f"GPT-2's BPE has 257 to {GPT2_SIZE:,} ids, not {vocab_size}")
        if bpe and not Path(bpe).is_file():
            raise UserError(f"there is no file of BPE ranks {bpe}")
        try:
            ranks = load_tiktoken_bpe(self.bpe) if self.bpe else tiktoken.get_encoding("gpt2")._mergeable_ranks
            self.encoding = tiktoken.Encoding(
                self.name,
                pat_str=GPT2_SPLIT,
                mergeable_ranks={token: rank for token, rank in ranks.items() if rank < self.bos_id},
                special_tokens={END: self.bos_id},
                explicit_n_vocab=vocab_size,
            )
        except Exception as error:
            kind = type(error).__name__
            if bpe:
                raise UserError(f"{bpe} does not hold GPT-2's BPE ranks: {kind}") from None
            remedy = "point at a local copy with --bpe=gpt2.tiktoken"
            raise UserError(f"tiktoken could not fetch GPT-2's ranks ({kind}); {remedy}") from None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """A list of strings -> a list of arrays of ids. Special tokens in the text are read as plain text."""
        return [np.array(ids, dtype=np.uint16) for ids in self.encoding.encode_ordinary_batch(texts, num_threads=4)]

    def decode(self, token: int) -> str:
        """One id -> text to show. Ids that pad the vocabulary are shown as numbers."""
        return self.encoding.decode([token]) if token < self.vocab_size else f"<{token}>"

    def text(self, ids: np.ndarray) -> str:
        """An array of ids -> text; documents stand a blank line apart."""
        return self.encoding.decode(ids[ids < self.vocab_size].tolist()).replace(END, "\n\n")

    def n_bytes(self, ids: Sequence[int]) -> int:
        """See `n_bytes`."""
        return sum(len(self.encoding.decode_single_token_bytes(i)) for i in ids if i < self.vocab_size)


class NoTokenizer:
    """A tokenizer for ids whose text is unknown. They are shown as numbers."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Raises UserError."""
        raise UserError("this model has no tokenizer here; give it ids with --tokens FILE.npy, or --bpe")

    def decode(self, token: int) -> str:
        """One id -> text to show."""
        return f"<{token}>"


class CharTokenizer:
    """One id per character, as listed in meta.json or nanoGPT's meta.pkl. Synthetic data uses it."""

    def __init__(self, chars: str, bos_id: int | None = None) -> None:
        self.chars, self.bos_id = chars, bos_id
        self.ids = {char: i for i, char in enumerate(chars)}

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Texts -> arrays of ids. Raises UserError naming a character that the alphabet lacks."""
        unknown = next((char for text in texts for char in text if char not in self.ids), None)
        if unknown is not None:
            raise UserError(f"the model's alphabet of {len(self.chars)} characters has no {unknown!r}")
        return [np.array([self.ids[char] for char in text], dtype=np.int64) for text in texts]

    def spans(self, texts: list[str]) -> list[tuple[list[int], Spans]]:
        """See `spans_of`."""
        return [(ids.tolist(), [(i, i + 1) for i in range(len(ids))]) for ids in self.encode(texts)]

    def decode(self, token: int) -> str:
        """One id -> text to show."""
        return "<bos>" if token == self.bos_id else self.chars[token] if token < len(self.chars) else f"<{token}>"


def spans_of(tokenizer: TextTokenizer, texts: list[str]) -> list[tuple[list[int], Spans]]:
    """For each text, (its ids without special tokens, the span of each id). A token with only some bytes of a character
    covers that whole character. Raises UserError if the tokenizer cannot give spans."""
    spans = getattr(tokenizer, "spans", None)
    if spans is None:
        tokenizer.encode([""])  # NoTokenizer raises a clearer error
        raise UserError("the model's tokenizer does not tell which characters a token stands for")
    return spans(texts)


def text_of(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """ids (K,) -> text. If the tokenizer can, it decodes them together, so that the bytes of a character are joined;
    invalid bytes become U+FFFD."""
    decode_all = getattr(tokenizer, "text", None)
    return decode_all(np.array(ids, dtype=np.int64)) if decode_all else "".join(map(tokenizer.decode, ids))


def n_bytes(tokenizer: TextTokenizer, ids: Sequence[int], first: int = 0) -> int:
    """The number of UTF-8 bytes that the ids from index `first` on stand for. ids (K,) has no special tokens. It is
    exact for bytes and GPT-2's BPE. For others we decode, and count a piece of a character as one byte."""
    exact = getattr(tokenizer, "n_bytes", lambda ids: None)(ids[first:])
    size = lambda ids: len(text_of(tokenizer, ids).replace("\ufffd", "?").encode("utf-8", "replace"))
    return size(ids) - size(ids[:first]) if exact is None else exact


def spans_of_bytes(text: str, ids: np.ndarray, length: Callable[[int], int]) -> tuple[list[int], Spans]:
    """(ids, their spans), where a token stands for `length(token)` bytes of the text's UTF-8."""
    byte_to_character = [i for i, c in enumerate(text) for _ in c.encode("utf-8", "replace")]
    ends = itertools.accumulate(map(length, ids.tolist()), initial=0)
    return ids.tolist(), [(byte_to_character[a], byte_to_character[b - 1] + 1) for a, b in itertools.pairwise(ends)]


# name -> function (file of ranks, number of ids) -> tokenizer
TOKENIZERS: dict[str, Callable[..., ByteTokenizer]] = {
    "byte": lambda bpe, vocab_size: ByteTokenizer(),
    "gpt2": GPT2Tokenizer,
}


def tokenizer_of(meta: Meta, bpe: str | Path | None = None) -> TextTokenizer:
    """The tokenizer that a dataset's meta.json names; NoTokenizer if it names none, or if that cannot be loaded."""
    if meta.get("tokenizer") == "chars" and "chars" in meta:
        return CharTokenizer(meta["chars"], meta.get("bos_id"))
    if meta.get("tokenizer") not in TOKENIZERS:
        return NoTokenizer()
    ids = min(meta.get("vocab_size", GPT2_SIZE), GPT2_SIZE)  # larger vocabularies are padded
    try:
        return TOKENIZERS[meta["tokenizer"]](bpe or meta.get("bpe"), ids)
    except UserError as error:
        if bpe:
            raise
        print(f"tokens are shown as numbers: {error}", file=sys.stderr)
        return NoTokenizer()


# two tokenizers that split this text in the same way are taken for the same
FINGERPRINT = (
    "Naïve quicksilver foxes, 12,345.67 of them: jumped over\n\tdef spikes(x):  return x**2  # 日本語, Ωμέγα 😀"
)


def fingerprint(tokenizer: TextTokenizer) -> str | None:
    """A hash of how a tokenizer splits FINGERPRINT; None if it cannot encode text."""
    try:
        (ids,) = tokenizer.encode([FINGERPRINT])
    except UserError:
        return None
    return hashlib.blake2b(repr([int(i) for i in ids]).encode(), digest_size=6).hexdigest()


def same_tokens(a: TextTokenizer, b: TextTokenizer) -> bool | None:
    """Whether two tokenizers have the same fingerprint; None if one of them cannot encode text."""
    prints = fingerprint(a), fingerprint(b)
    return None if None in prints else prints[0] == prints[1]


def split_documents(lines: Iterable[str]) -> Iterator[str]:
    """Yields the documents in these lines. A line `<|endoftext|>`, perhaps with blanks around it, ends a document."""
    document: list[str] = []
    for line in lines:
        if line.strip() == END:
            if document:
                yield "".join(document)
            document = []
        else:
            document.append(line)
    if re.search(r"\S", "".join(document)):
        yield "".join(document)


def visible(text: str) -> str:
    """Token text with visible symbols for white space, and without control characters. Never empty."""
    if not text:
        return "<empty>"
    visible_text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in visible_text)
