"""The default text comes with every Python: language reference topics, docstrings, comments, then source code.

It needs no network and no file, and takes seconds. Another version of Python, or a distribution without some modules,
gives another text. The split of a topic or module depends only on its name, so that the validation text of one version
is never in the training text of another.
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

NAME = "stdlib"  # its name in findings
MEGABYTES, VAL_EVERY = 8, 20  # the size of the text; about 1 name in 20 is validation
ABOUT = {"python": platform.python_version(), "split": "by name"}  # its entries in meta.json
# not part of the documented library, or different from machine to machine
EXCLUDED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


def split_of(name: str) -> str:
    """The split, train or val, of all text of a topic or module."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "train" if number % VAL_EVERY else "val"


def sources() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of every module of the standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in tqdm(sorted(root.rglob("*.py")), desc="standard library", disable=None, leave=False):
        parts = path.relative_to(root).parts
        if not (EXCLUDED & set(parts) or parts[0].startswith("config-") or path.name.startswith("_sysconfigdata")):
            name = path.relative_to(root).with_suffix("").as_posix()
            yield name, path.read_text(encoding="utf-8", errors="replace")


def docstrings(source: str) -> str:
    """The docstrings of a module, joined."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes))
    return "\n\n".join(text for text in texts if text)


def comments(source: str) -> str:
    """The comments of a module, one per line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)


def documents(megabytes: float = MEGABYTES) -> Iterator[tuple[str, str]]:
    """Yields (name of the topic or module, document), prose first, until they add up to `megabytes` MiB of UTF-8."""
    limit, n_bytes = megabytes * 2**20, 0
    for name, text in _all_documents():
        if n_bytes >= limit:
            return
        yield name, text
        n_bytes += len(text.encode("utf-8", "replace"))


def _all_documents() -> Iterator[tuple[str, str]]:
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
    """The validation split as data/stdlib/prepare.py writes it: bytes, with id 256 (BOS) after each document."""
    tokenizer = ByteTokenizer
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, **ABOUT}
    return Windows(_validation_tokens(), meta, NAME, block_size, bos)


def titled(name: str, meta: Meta, trained: Meta) -> str:
    """The name of a text, with the version of Python if it is Python's text. A line on stderr warns if the training
    data, of meta.json `trained`, is of another Python or split."""
    if "python" not in meta:
        return name
    version_of = lambda text: f"Python {text.get('python')}, split {text.get('split', 'by number')}"
    if "python" in trained and version_of(meta) != version_of(trained):
        seen = f"may have seen some of this text, which is of {version_of(meta)}"
        say_once(f"the model was trained on {name} of {version_of(trained)}, and {seen}")
    return f"{name} of Python {meta['python']}"
