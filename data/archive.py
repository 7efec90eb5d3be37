"""Files of a release: from a network archive, a local .zip or .tar.*, or a folder. Nothing is ever unpacked to disk."""

import fnmatch
import io
import lzma
import tarfile
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from spikesink.errors import UserError

TIMEOUT = 30  # seconds without an answer


def fetch(url: str) -> bytes:
    """The bytes behind a URL. Raises UserError naming --archive, the way without a network."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return answer.read()
    except OSError as error:
        raise UserError(f"cannot fetch {url} ({error}); copy the release here and give --archive=FILE") from None


def members(archive: str | None, pattern: str, url: str) -> dict[str, bytes]:
    """{file name: bytes} of every file whose name matches `pattern`, from `archive` or, without one, from `url`.

    Folders inside an archive do not matter, and never become paths here. Raises UserError.
    """
    source = Path(archive) if archive else None
    if source and source.is_dir():
        found = [path for path in sorted(source.rglob(pattern)) if path.is_file() and matches(path.name, pattern)]
        files = {path.name: path.read_bytes() for path in found}
    else:
        if source and not source.is_file():
            raise UserError(f"there is no archive {archive}")
        content = io.BytesIO(source.read_bytes() if source else fetch(url))
        try:
            files = _zip(content, pattern) if zipfile.is_zipfile(content) else _tar(content, pattern)
        except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            raise UserError(f"{archive or url} is no archive that can be read: {error}") from None
    if not files:
        raise UserError(f"{archive or url} holds no {pattern}")
    return files


def _zip(content: io.BytesIO, pattern: str) -> dict[str, bytes]:
    with zipfile.ZipFile(content) as archive:
        names = [name for name in archive.namelist() if matches(name, pattern)]
        return {PurePosixPath(name).name: archive.read(name) for name in names}


def _tar(content: io.BytesIO, pattern: str) -> dict[str, bytes]:
    content.seek(0)
    with tarfile.open(fileobj=content) as archive:
        found = ((m.name, archive.extractfile(m)) for m in archive if m.isfile() and matches(m.name, pattern))
        return {PurePosixPath(name).name: file.read() for name, file in found if file}


def matches(name: str, pattern: str) -> bool:
    """True if the last part of a path matches, and it is no hidden file."""
    last = PurePosixPath(name).name
    return fnmatch.fnmatch(last, pattern) and not last.startswith(".")
