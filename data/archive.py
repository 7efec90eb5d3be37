"""Reads the files of a release from a URL, a local .zip or .tar.*, or a folder, and datasets from the Hugging Face hub.

Nothing is ever unpacked to disk.
"""

import fnmatch
import io
import lzma
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from spikesink.errors import UserError
from spikesink.models import hf

TIMEOUT = 30  # seconds without an answer


def hub_files(name: str, config: str, split: str, revision: str | None = None) -> list[str]:
    """The addresses of a dataset's parquet shards on the hub, in order. Raises UserError, which names --parquet."""
    from datasets import load_dataset_builder

    try:
        if not hf.hub_answers():
            raise ConnectionError("no answer")
        return sorted(load_dataset_builder(name, config, revision=revision).config.data_files[split])
    except Exception as error:
        raise UserError(
            f"cannot reach {name} on the Hugging Face hub ({type(error).__name__}: {str(error)[:80]}); "
            "copy its parquet shards here and give --parquet=DIR"
        ) from None


def parquet_files(folder: str | Path, pattern: str = "*.parquet", column: str = "text") -> list[str]:
    """The parquet shards under a folder, in order. Raises UserError if one lacks that column or it is no text."""
    from pyarrow import ArrowException, parquet

    files = sorted(str(path) for path in Path(folder).glob(f"**/{pattern}"))
    if not files:
        raise UserError(f"there is no {pattern} under {folder}")
    for file in files:
        try:
            schema = parquet.read_schema(file)
        except (ArrowException, OSError) as error:
            raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from None
        texts = [field.name for field in schema if str(field.type) in ("string", "large_string", "string_view")]
        if column not in texts:
            raise UserError(
                f"{file} has no text in a column {column!r}; its columns of text: {', '.join(texts) or 'none'}"
            )
    return files


def parquet_texts(files: list[str], column: str = "text") -> Iterator[str]:
    """Streams the texts of parquet shards; an empty cell gives ''. Raises UserError naming files it cannot read."""
    from datasets import load_dataset
    from pyarrow import ArrowException

    try:
        for row in load_dataset("parquet", data_files=files, split="train", streaming=True):
            yield row[column] or ""
    except (ArrowException, OSError) as error:
        raise UserError(f"cannot read {' '.join(files)}: {str(error).splitlines()[0]}") from None


def fetch(url: str) -> bytes:
    """The bytes behind a URL. Raises UserError, which names --archive, if there is no network."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return answer.read()
    except OSError as error:
        raise UserError(f"cannot fetch {url} ({error}); copy the release here and give --archive=FILE") from None


def members(archive: str | None, pattern: str, url: str) -> dict[str, bytes]:
    """{file name: bytes} of every file whose name matches `pattern`, from `archive`, or from `url` if it is None.

    Hidden files are left out, and folders inside an archive are ignored. Raises UserError.
    """
    if archive and not Path(archive).exists():
        raise UserError(f"there is no archive {archive}")
    try:
        readers = {PurePosixPath(path).name: read for path, read in entries(archive, url)}
        files = {name: read() for name, read in readers.items() if fnmatch.fnmatch(name, pattern) and name[0] != "."}
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{archive or url} is no archive that can be read: {error}") from None
    if not files:
        raise UserError(f"{archive or url} holds no {pattern}")
    return files


def entries(archive: str | None, url: str) -> list[tuple[str, Callable[[], bytes]]]:
    """[(path, function that reads it)] of the files in a folder, a .zip or a .tar.*, or behind `url` if it is None."""
    if archive and Path(archive).is_dir():
        return [(path.name, path.read_bytes) for path in sorted(Path(archive).rglob("*")) if path.is_file()]
    content = io.BytesIO(Path(archive).read_bytes() if archive else fetch(url))
    if zipfile.is_zipfile(content):
        packed = zipfile.ZipFile(content)
        return [(info.filename, partial(packed.read, info)) for info in packed.infolist() if not info.is_dir()]
    content.seek(0)
    tar = tarfile.open(fileobj=content)
    opened = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
    return [(name, file.read) for name, file in opened if file]
