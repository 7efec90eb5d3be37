"""The text that comes with every Python: language reference topics, docstrings, comments, then source.

It needs no network and no file, and takes seconds. The same installation of Python gives the same text; another
version, or a distribution that leaves modules out, gives another.
"""

import ast
import functools
import io
import itertools
import pydoc_data.topics
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .token_files import Windows
from .tokenizers import ByteTokenizer

NAME = "stdlib"  # what findings call it
MEGABYTES, VAL_EVERY = 8, 20  # how much is taken, prose first; every so many documents one is validation
# not part of the documented library, or different from machine to machine
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


def sources() -> Iterator[str]:
    """Text of every module of the standard library, in the order of its path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in tqdm(sorted(root.rglob("*.py")), desc="standard library", disable=None, leave=False):
        parts = path.relative_to(root).parts
        if not (LEFT_OUT & set(parts) or parts[0].startswith("config-") or path.name.startswith("_sysconfigdata")):
            yield path.read_text(encoding="utf-8", errors="replace")


def docstrings(source: str) -> str:
    """The docstrings of a module, joined."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes))
    return "\n\n".join(text for text in found if text)


def comments(source: str) -> str:
    """The comments of a module, one a line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)


def documents(megabytes: float = MEGABYTES) -> Iterator[str]:
    """Documents until they hold so many MiB of UTF-8. Prose first: topics, docstrings, comments; then the source."""
    limit, taken = megabytes * 2**20, 0
    for text in _everything():
        if taken >= limit:
            return
        yield text
        taken += len(text.encode("utf-8", "replace"))


def _everything() -> Iterator[str]:
    yield from (text for _, text in sorted(pydoc_data.topics.topics.items()))
    modules = list(sources())
    for extract in (docstrings, comments, str):
        for source in modules:
            try:
                text = extract(source)
            except (SyntaxError, tokenize.TokenError):
                continue
            if text.strip():
                yield text


@functools.cache
def _validation_tokens() -> np.ndarray:
    tokenizer = ByteTokenizer()
    texts = list(itertools.islice(documents(), 0, None, VAL_EVERY))
    return np.concatenate([np.append(ids, tokenizer.bos_id).astype("<u2") for ids in tokenizer.encode(texts)])


def validation(block_size: int, bos: bool = False) -> Windows:
    """The validation split as data/stdlib/prepare.py writes it: bytes, id 256 (BOS) after each document."""
    kind = ByteTokenizer
    meta = {"tokenizer": kind.name, "vocab_size": kind.vocab_size, "bos_id": kind.bos_id}
    return Windows(_validation_tokens(), meta, NAME, block_size, bos)
