"""Reads the sequences that a model is observed on, from a dataset's val split, a text file, or an array of ids."""

import dataclasses
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import UserError, say_once
from ..options import Options
from . import default_text
from .token_files import Meta, TokenFile, Windows, other_ids
from .tokenizers import END, NoTokenizer, TextTokenizer, n_bytes, split_documents, tokenizer_of

DEFAULT_LENGTH = 64  # as in Gu et al.
SHORTEST = 8
PADDING = -100  # marks the positions in ids that have no token


class Sequences(NamedTuple):
    """The sequences of token ids, and their source."""

    ids: torch.Tensor  # int64 (N, T), with PADDING after a shorter sequence
    name: str  # of the dataset or file
    bos: bool  # every sequence starts with BOS, or with the special tokens that the tokenizer puts there


Split = Callable[[str, int, bool], Windows]  # (name of a dataset, block_size, bos) -> its validation split


def validation_split(name: str, block_size: int, bos: bool = False) -> Windows:
    """Opens the validation split of the default text, or of a dataset's folder. Raises UserError."""
    if name == default_text.NAME:
        return default_text.validation(block_size, bos)
    if Path(name).is_dir():
        return TokenFile(name, "val", block_size, bos)
    raise UserError(f"there is no dataset {name!r} here: give --data FOLDER, with a val.bin in it, or --text FILE")


def bos_of(tokenizer: TextTokenizer, meta: Meta) -> int | None:
    """The id of BOS in the tokenizer or the description of the data; None if neither has one."""
    return getattr(tokenizer, "bos_id", meta.get("bos_id"))


@dataclass
class Reader:
    """Turns texts into the ids that a model reads."""

    tokenizer: TextTokenizer
    meta: Meta  # describes the training data (vocab_size, tokenizer); empty if unknown
    dataset: str  # the dataset that is read by default
    prefix_ids: tuple[int, ...]  # special tokens before every sequence: (BOS,), BERT's ([CLS],), or none
    suffix_ids: tuple[int, ...]  # and after it: BERT's ([SEP],), T5's (</s>,), or none
    block_size: float  # length of the longest sequence, or infinity
    vocab_size: int  # number of ids that the model takes
    split: Split = validation_split
    special: bool = False  # read special tokens that a text spells as those tokens, not as plain text

    def starting(self, bos: bool | None) -> "Reader":
        """This reader with special tokens before every sequence (True), without them (False), or as it is (None).
        Raises UserError if the tokenizer has no BOS."""
        if bos is None or bos == bool(self.prefix_ids):
            return self
        bos_id = bos_of(self.tokenizer, self.meta) if bos else None
        if bos and bos_id is None:
            raise UserError("--bos: the model's tokenizer has no BOS")
        return dataclasses.replace(self, prefix_ids=() if bos_id is None else (bos_id,))

    def opened(self) -> tuple["Reader", str]:
        """This reader with a token before every text, so that its first token can be scored, and a phrase on it. That
        token is the prefix, else the separator of documents or BOS. The phrase also says if there is none of these."""
        prefix_ids, words = self.prefix_ids, "which starts every text"
        if not prefix_ids:
            if self.separator_id is None:
                return self, "without the first, as the vocabulary has nothing to put before it"
            prefix_ids, words = (self.separator_id,), "put before every sentence"
        shown = "".join(map(self.tokenizer.decode, prefix_ids))
        return dataclasses.replace(self, prefix_ids=prefix_ids), f"that of the first after {shown}, {words}"

    def sequences(self, options: Options, max_sequences: int) -> Sequences:
        """Reads at most `max_sequences` sequences, as `options` (data, text, tokens, seq_len, n_seq) say. Raises
        UserError, also if there are fewer and n_seq is set."""
        tokens, seq_len = options.tokens, options.seq_len
        if tokens is not None:
            name = str(tokens) if isinstance(tokens, (str, Path)) else "tokens"
            ids = ids_of_array(tokens, seq_len)
        else:
            seq_len = seq_len or int(min(DEFAULT_LENGTH, self.block_size))
            check_length(seq_len, self.block_size)
            if options.text is not None:
                name = str(options.text)
                ids = self.text_sequences(read_text(options.text), name, seq_len)
            else:
                name = self.dataset if options.data is None else options.data
                ids = self.dataset_sequences(name, seq_len, max_sequences)
                name = default_text.titled(name, self.split(name, seq_len, False).meta, self.meta)
        check_length(ids.size(1), self.block_size)
        self.check_ids(ids, name)
        if options.n_seq and len(ids) < max_sequences:
            found = f"{len(ids)} sequences of {ids.size(1)} tokens"
            raise UserError(f"{name} has {found}, fewer than the {max_sequences} needed")
        start = torch.tensor(self.prefix_ids, dtype=torch.int64)
        if not (ids[:, : len(start)] == start).all():
            bos = self.tokenizer.decode(int(start[0]))
            say_once(f"{name}: not every sequence starts with {bos}, as the model's text does")
        ids = ids if tokens is not None and not options.n_seq else ids[:max_sequences]
        return Sequences(ids, name, bool(self.prefix_ids) and tokens is None)

    def check_ids(self, ids: torch.Tensor, name: object) -> None:
        """Raises UserError for ids outside the model's embedding. Tokens that were added later can have such ids."""
        real = ids[ids != PADDING]
        if real.min() < 0 or real.max() >= self.vocab_size:
            worst = int(real.min() if real.min() < 0 else real.max())
            raise UserError(f"{name} holds token {worst}, outside the vocabulary of {self.vocab_size}")

    def ordinary(self, options: Options, max_sequences: int) -> Sequences:
        """Up to `max_sequences` of the default dataset, or if that fails of Python's text. Raises UserError."""
        plain = dataclasses.replace(options, data=None, text=None, tokens=None, n_seq=None)
        try:
            return self.sequences(plain, max_sequences)
        except UserError:
            return self.sequences(dataclasses.replace(plain, data=default_text.NAME), max_sequences)

    def reference(self, options: Options, max_sequences: int) -> Sequences:
        """Up to `max_sequences` of the text that the options name, else `ordinary` ones. Raises UserError."""
        named = options.data is not None or options.text is not None
        return self.sequences(options, max_sequences) if named else self.ordinary(options, max_sequences)

    def dataset_sequences(self, name: str, seq_len: int, max_sequences: int) -> torch.Tensor:
        """Reads up to `max_sequences`, evenly spaced in the val split: its windows, or their text encoded again.
        Raises UserError if the dataset has another vocabulary and there is no tokenizer to translate it."""
        data = self.split(name, seq_len, False)
        other = other_ids(data.meta, self.meta)
        same_ids = bool(self.meta) and not other
        if same_ids and self.prefix_ids:
            data = self.split(name, seq_len, True)
        # text that is encoded again gets 8 tokens of the dataset per token of the model, and is never used twice
        count = min(max_sequences, data.n_windows if same_ids else max(1, len(data.tokens) // (8 * seq_len) - 1))
        windows = np.arange(count) * (data.n_windows - 1) // max(1, count - 1)
        if same_ids:
            self._warn_if_unsure(name, data.meta)
            return data.read(windows)[0]
        text_of = getattr(tokenizer_of(data.meta), "text", None)
        if text_of is None or isinstance(self.tokenizer, NoTokenizer):
            sizes = f"a vocabulary of {data.meta['vocab_size']}, the model one of {self.vocab_size}"
            sizes += f" ({other})" if other else ""
            remedy = "there is no tokenizer to translate; give ids with --tokens FILE.npy"
            raise UserError(f"dataset {name} has {sizes}, and {remedy}")
        if other:
            say_once(f"{name} has other ids than the model ({other}): its text is encoded again")
        # the text comes from the same places
        starts = np.minimum(windows * seq_len, len(data.tokens) - 8 * seq_len).clip(0)
        texts = [text_of(data.tokens[start : start + 8 * seq_len]) for start in starts]
        return torch.cat([self.text_sequences(text, name, seq_len)[:1] for text in texts])

    def _warn_if_unsure(self, name: str, meta: Meta) -> None:
        """Prints a warning if the ids may be of another tokenizer, or the text may have changed since training."""
        if name != self.dataset and meta.get("tokenizer") is None:
            say_once(f"neither {name} nor the model names its tokenizer: we assume that their ids are the same")
        counts = [(key, meta[key], self.meta[key]) for key in meta.keys() & self.meta.keys() if key.endswith("_tokens")]
        changed = next((f"{key} is {now:,}, was {then:,}" for key, now, then in sorted(counts) if now != then), None)
        if name == self.dataset and "python" not in meta and changed:
            say_once(f"{name} has changed since training ({changed}): the model may have seen some of this text")

    @property
    def separator_id(self) -> int | None:
        """The id between documents; None if the vocabulary has none."""
        separator = getattr(self.tokenizer, "separator_id", bos_of(self.tokenizer, self.meta))
        return separator if separator is not None and 0 <= separator < self.vocab_size else None

    def encoded(self, text: str, name: str) -> torch.Tensor:
        """int64 ids (K,) of a text, without prefix and suffix.

        As in prepared data, a line <|endoftext|> ends a document, and becomes the separator. Other special tokens that
        the text spells are read as text, with a warning. With `special` they are read as tokens, and a prefix or suffix
        that the text spells is removed.
        """
        lines = [*io.StringIO(text)]
        separated = any(line.strip() == END for line in lines)
        documents = [d for d in split_documents(lines) if d.strip()] if separated else [text]
        separators = [self.separator_id] if separated else []
        ids = [i for document in documents for i in [*self._encode(document), *separators] if i is not None]
        special: dict[str, int] = getattr(self.tokenizer, "special_ids", {})
        spelled = {word: n for word in special if (n := sum(document.count(word) for document in documents))}
        if spelled and not self.special:
            words = ", ".join(f"{word} {n} times" for word, n in spelled.items())
            say_once(f"{name} spells special tokens, {words}: they are read as text; --special reads them as tokens")
        if self.special and ids[: len(self.prefix_ids)] == [*self.prefix_ids]:
            ids = ids[len(self.prefix_ids) :]
        if self.special and self.suffix_ids and ids[-len(self.suffix_ids) :] == [*self.suffix_ids]:
            ids = ids[: -len(self.suffix_ids)]
        return torch.tensor(ids, dtype=torch.int64)

    def _encode(self, text: str) -> list[int]:
        special: dict[str, int] = getattr(self.tokenizer, "special_ids", {}) if self.special else {}
        longest_first = "|".join(re.escape(word) for word in sorted(special, key=len, reverse=True))
        parts = re.split(f"({longest_first})", text) if special else [text]
        texts = [part for part in parts if part and part not in special]
        plain = iter(self.tokenizer.encode(texts) if texts else [])  # transformers' tokenizers fail on no text
        return [int(i) for part in parts if part for i in ([special[part]] if part in special else next(plain))]

    def text_sequences(self, text: str, name: str, seq_len: int) -> torch.Tensor:
        """Cuts a text into sequences: int64 ids (N, seq_len). Raises UserError if it is too short."""
        ids = self.encoded(text, name)
        n_text = seq_len - len(self.prefix_ids) - len(self.suffix_ids)
        n = len(ids) // n_text
        if n == 0:
            remedy = "give a longer text, or a smaller --seq_len"
            raise UserError(f"{name} has {len(ids)} tokens, fewer than one sequence of {n_text}: {remedy}")
        return self.framed(ids[: n * n_text].view(n, n_text))

    def prompt(self, text: str) -> torch.Tensor:
        """int64 ids (1, T) of a prompt, with prefix and suffix. Raises UserError if the model cannot read it."""
        if isinstance(self.tokenizer, NoTokenizer):
            raise UserError("the model has no tokenizer here, so it cannot read a prompt; give ids with --tokens")
        ids = self.encoded(text, "the prompt")
        if not len(ids):
            raise UserError("the prompt is empty")
        framed = self.framed(ids[None])
        if framed.size(1) < 2:
            raise UserError("the prompt is one token; it needs two")
        if framed.size(1) > self.block_size:
            raise UserError(f"the prompt's {framed.size(1)} tokens are more than the model's {self.block_size}")
        self.check_ids(framed, "the prompt")
        return framed

    @property
    def end_ids(self) -> set[int | None]:
        """The ids that end a text: what stands between documents, and the tokenizer's end-of-text token."""
        return {self.separator_id, getattr(self.tokenizer, "eos_id", None)} - {None}

    def predicted_bytes(self, ids: torch.Tensor, shift: int) -> int:
        """The number of UTF-8 bytes in the predicted text: ids (N, T) without the first `shift` of each sequence.
        Special tokens count 0 bytes, and so does every id of a model without a tokenizer."""
        if type(self.tokenizer) is NoTokenizer:
            return 0
        special_ids = getattr(self.tokenizer, "special_ids", {}).values()
        special = {*special_ids, *self.prefix_ids, *self.suffix_ids, bos_of(self.tokenizer, self.meta), PADDING}
        total = 0
        for row in ids.tolist():
            first = sum(i not in special for i in row[:shift])
            total += n_bytes(self.tokenizer, [i for i in row if i not in special], first)
        return total

    def framed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (N, T) with the prefix before and the suffix after each row."""
        repeated = lambda special: torch.tensor(special, dtype=torch.int64).expand(len(ids), -1)
        return torch.cat((repeated(self.prefix_ids), ids, repeated(self.suffix_ids)), dim=1)


def check_length(seq_len: int, block_size: float) -> None:
    """Raises UserError for a sequence that is too long for the model, or too short to measure anything."""
    if seq_len > block_size:
        limit = f"the model's block_size={block_size}"
        raise UserError(f"a sequence of {seq_len} tokens is longer than {limit}; take a --seq_len up to that")
    if seq_len < SHORTEST:
        raise UserError(f"sequences of {seq_len} tokens are too short to measure anything; use at least {SHORTEST}")


def ids_of_array(tokens: str | Path | np.ndarray | torch.Tensor, seq_len: int | None) -> torch.Tensor:
    """int64 ids (N, T) of a tensor or a .npy file, with all padding moved to the end of each row. Raises UserError if
    it is not a 2-D array of integers, or if a row is too short."""
    path = tokens if isinstance(tokens, (str, Path)) else type(tokens).__name__
    array: Any = tokens.numpy(force=True) if isinstance(tokens, torch.Tensor) else tokens
    if isinstance(tokens, (str, Path)):
        try:
            array = np.load(tokens, allow_pickle=False)
        except (ValueError, EOFError):
            what = "it is not a .npy file of integers; for text use --text"
            raise UserError(f"cannot read --tokens {path}: {what}") from None
        except OSError as error:
            raise UserError(f"cannot read --tokens {path}: {error.strerror}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iu" or array.size == 0:
        raise UserError(f"--tokens {path} is not an integer array [n_seq, seq_len]")
    ids = torch.from_numpy(array.astype(np.int64))
    real = ids != PADDING
    if (real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)).max() > 1:
        rule = "padding may only come before or after them"
        raise UserError(f"--tokens {path} has padding ({PADDING}) between tokens; {rule}")
    longest = min(seq_len or ids.size(1), int(real.sum(1).max()))
    ids = ids.gather(1, (~real).int().argsort(dim=1, stable=True))[:, :longest]
    shortest = int((ids != PADDING).sum(1).min())
    if shortest < SHORTEST <= ids.size(1):
        short = f"a sequence of only {shortest} tokens without padding ({PADDING})"
        raise UserError(f"--tokens {path} has {short}; it needs {SHORTEST}")
    return ids


def read_text(path: str | Path) -> str:
    """Reads a text file. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"cannot read {path}: it is not text in UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
