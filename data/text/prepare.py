"""Prepares local text: .txt, .jsonl, each also as .xz or .gz. In .txt, a line <|endoftext|> ends a document.

  python data/text/prepare.py --name=wiki --tokenizer=gpt2 --bpe=gpt2.tiktoken articles-*.txt.xz
  python train.py prenorm --dataset=wiki

A document of more than 65,536 characters is cut at line ends, so that a single plain file is enough. Documents without
text are left out and counted. Text is streamed. After an interruption the same command continues after the last
complete file.
"""

import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DATA.parent))

from data.writer import DatasetWriter, Tokenizer, identities, progress
from spikesink.errors import Flags, UserError, cli
from spikesink.text.tokenizers import GPT2_SIZE, TOKENIZERS, split_documents

PIECE = 2**16  # characters
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def jsonl_texts(lines: Iterable[str], column: str) -> Iterator[str]:
    """The texts in lines of JSON; null gives ''. Raises UserError with the number of a line that has no text."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
            if not isinstance(text, str | None):
                raise TypeError(f"{column} is {text!r}"[:80])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = f"has no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f'line {number} is no JSON object with its text in "{column}" ({why}): --column=NAME'
            ) from None
        yield text or ""


def documents(path: Path, column: str = "text") -> Iterator[str]:
    """The documents of one file. Raises UserError naming the file, and the line, that cannot be read."""
    kind = Path(path.stem).suffix if path.suffix in OPENERS else path.suffix
    if kind not in (".txt", ".jsonl"):
        raise UserError(f"{path}: know .txt and .jsonl, also as .xz or .gz, not {path.name!r}")
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as lines:
            yield from jsonl_texts(lines, column) if kind == ".jsonl" else split_documents(lines)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not in UTF-8 ({error.reason})") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def new_folder(name: str, overwrite: bool) -> Path:
    """The folder data/NAME. Raises UserError if NAME is taken or is no plain name."""
    folder = DATA / name
    if not re.fullmatch(r"[\w-]+", name) or ((folder / "prepare.py").exists() and name != "text"):
        raise UserError(f"--name={name} is taken or is no plain name; choose another")
    if all((folder / file).exists() for file in ("meta.json", "train.bin", "val.bin")) and not overwrite:
        raise UserError(f"{folder.name} is prepared already: --overwrite replaces it, --name=OTHER goes elsewhere")
    return folder


def pieces(documents: Iterable[str]) -> Iterator[str]:
    """The documents; those of more than PIECE characters are cut at line ends, so that one plain file makes many."""
    for document in documents:
        if len(document) <= PIECE:
            yield document
            continue
        piece = ""
        for line in document.splitlines(keepends=True):
            piece += line
            if len(piece) >= PIECE:
                yield piece
                piece = ""
        if piece:
            yield piece


def prepare(files: list[Path], folder: Path, tokenizer: Tokenizer, val_every: int, column: str = "text") -> None:
    """Writes {train,val}.bin and meta.json to `folder`; every `val_every`-th document is validation."""
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no file {file}")
    with DatasetWriter(folder, tokenizer, val_every, {"files": identities(files), "column": column}) as writer:
        for done, file in enumerate(files):
            if done >= writer.source:
                writer.add(progress(pieces(documents(file, column)), desc=file.name, unit=" documents"))
                writer.mark(done + 1)
        writer.finish(files=[file.name for file in files])


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("files", nargs="+", type=Path, help="text files")
    flags.add_argument("--name", default="text", help="name of the dataset: data/NAME")
    flags.add_argument("--tokenizer", choices=TOKENIZERS, default="gpt2")
    flags.add_argument("--column", default="text", help="the key of the text in the JSON objects of .jsonl")
    flags.add_argument("--bpe", help="local file of GPT-2's BPE ranks, if tiktoken cannot download them")
    vocab = "take only the first N ids of GPT-2's BPE (the last is the end)"
    flags.add_argument("--vocab", type=int, default=GPT2_SIZE, metavar="N", help=vocab)
    flags.add_argument("--val_every", type=int, default=200, help="every n-th document is validation")
    flags.add_argument("--overwrite", action="store_true", help="replace a dataset of that name")
    args = flags.parse_args()
    if args.val_every < 2:
        raise UserError(f"--val_every={args.val_every} must be at least 2")
    if args.tokenizer != "gpt2" and args.vocab != GPT2_SIZE:
        raise UserError(f"--vocab is GPT-2's, not --tokenizer={args.tokenizer}'s")
    folder = new_folder(args.name, args.overwrite)
    prepare(args.files, folder, TOKENIZERS[args.tokenizer](args.bpe, args.vocab), args.val_every, args.column)


if __name__ == "__main__":
    cli(main)
