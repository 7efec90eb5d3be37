"""The text that comes with every Python: language reference topics, docstrings, comments, then source.

It needs no network and no file, and takes seconds. The same installation of Python gives the same text; another
version, or a distribution that leaves modules out, gives another. What is validation follows from the name of a topic
or module alone, so that no version's validation text is what another version trained on.
"""

import ast
import functools
import hashlib
import io
import platform
import pydoc_data.topics
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import say_once
from .token_files import Meta, Windows
from .tokenizers import ByteTokenizer

NAME = "stdlib"  # what findings call it
MEGABYTES, VAL_EVERY = 8, 20  # how much is taken, prose first; of every so many names about one is validation
ABOUT = {"python": platform.python_version(), "split": "by name"}  # what meta.json says of it
# not part of the documented library, or different from machine to machine
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


def split_of(name: str) -> str:
    """To which split all text of a topic or module belongs."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "train" if number % VAL_EVERY else "val"


def sources() -> Iterator[tuple[str, str]]:
    """(name, text) of every module of the standard library, in the order of its path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in tqdm(sorted(root.rglob("*.py")), desc="standard library", disable=None, leave=False):
        parts = path.relative_to(root).parts
        if not (LEFT_OUT & set(parts) or parts[0].startswith("config-") or path.name.startswith("_sysconfigdata")):
            name = path.relative_to(root).with_suffix("").as_posix()
            yield name, path.read_text(encoding="utf-8", errors="replace")


def docstrings(source: str) -> str:
    """The docstrings of a module, joined."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes))
    return "\n\n".join(text for text in found if text)


def comments(source: str) -> str:
    """The comments of a module, one a line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)


def documents(megabytes: float = MEGABYTES) -> Iterator[tuple[str, str]]:
    """(name of the topic or module, document) until they hold so many MiB of UTF-8.

    Prose first: topics, docstrings, comments; then the source.
    """
    limit, taken = megabytes * 2**20, 0
    for name, text in _everything():
        if taken >= limit:
            return
        yield name, text
        taken += len(text.encode("utf-8", "replace"))


def _everything() -> Iterator[tuple[str, str]]:
    yield from sorted(pydoc_data.topics.topics.items())
    modules = list(sources())
    for extract in (docstrings, comments, str):
        for name, source in modules:
            try:
                text = extract(source)
            except (SyntaxError, tokenize.TokenError):
                continue
            if text.strip():
                yield name, text


@functools.cache
def _validation_tokens() -> np.ndarray:
    tokenizer = ByteTokenizer()
    texts = [text for name, text in documents() if split_of(name) == "val"]
    return np.concatenate([np.append(ids, tokenizer.bos_id).astype("<u2") for ids in tokenizer.encode(texts)])


def validation(block_size: int, bos: bool = False) -> Windows:
    """The validation split as data/stdlib/prepare.py writes it: bytes, id 256 (BOS) after each document."""
    kind = ByteTokenizer
    meta = {"tokenizer": kind.name, "vocab_size": kind.vocab_size, "bos_id": kind.bos_id, **ABOUT}
    return Windows(_validation_tokens(), meta, NAME, block_size, bos)


def titled(name: str, meta: Meta, trained: Meta) -> str:
    """What a text is called: with its Python, where it is Python's. `trained`: the meta.json that the model was trained
    on; where that is of another Python or split, this is said on stderr."""
    if "python" not in meta:
        return name
    here, there = (f"Python {of.get('python')}, split {of.get('split', 'by number')}" for of in (meta, trained))
    if "python" in trained and here != there:
        say_once(f"the model was trained on {name} of {there}, and may have seen some of this: it is of {here}")
    return f"{name} of Python {meta['python']}"
