"""Universal Dependencies' English Web Treebank (CC BY-SA 4.0): words, tags and dependencies, for ablate.py's probes.

  python data/ud_ewt/prepare.py [--archive=FILE]

Reads the release from GitHub, or a local archive or folder of its .conllu files. Writes {train,dev,test}.conllu here.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.archive import members
from spikesink.errors import Flags, UserError, cli
from spikesink.files import save_bytes

URL = "https://github.com/UniversalDependencies/UD_English-EWT/archive/refs/heads/master.zip"
SPLITS = ("train", "dev", "test")


def check(name: str, content: bytes) -> None:
    """Raises UserError if a line of a file is not a comment, empty, or a word in ten columns."""
    for number, line in enumerate(content.splitlines(), 1):
        if line and not line.startswith(b"#") and line.count(b"\t") != 9:
            raise UserError(f"line {number} of {name} is not CoNLL-U")


def prepare(folder: Path, archive: str | None = None) -> None:
    """Writes {train,dev,test}.conllu to `folder`, as they are in the release. Raises UserError."""
    files = members(archive, "en_ewt-ud-*.conllu", URL)
    missing = [split for split in SPLITS if f"en_ewt-ud-{split}.conllu" not in files]
    if missing:
        raise UserError(f"{archive or URL} holds no en_ewt-ud-{missing[0]}.conllu")
    for name, content in files.items():
        check(name, content)
    for split in SPLITS:
        save_bytes(Path(folder) / f"{split}.conllu", files[f"en_ewt-ud-{split}.conllu"])


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--archive", help="local .zip, .tar.gz, .tar.xz or folder")
    prepare(FOLDER, flags.parse_args().archive)
    print(f"{', '.join(f'{split}.conllu' for split in SPLITS)}: {FOLDER}")


if __name__ == "__main__":
    cli(main)
