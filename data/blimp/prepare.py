"""BLiMP (Warstadt et al. 2020, CC BY 4.0): 67 paradigms of 1,000 minimal pairs of English grammar, for ablate.py.

  python data/blimp/prepare.py [--archive=FILE]

Reads the release from GitHub, or a local archive or folder of its .jsonl files. Writes data/blimp/blimp.jsonl.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.archive import members
from spikesink.errors import Flags, UserError, cli
from spikesink.files import write_atomic

URL = "https://github.com/alexwarstadt/blimp/archive/refs/heads/master.zip"
FIELDS = ("UID", "field", "linguistics_term", "sentence_good", "sentence_bad")


def pairs(name: str, content: bytes) -> Iterator[dict[str, str]]:
    """The pairs of one file, as dicts of FIELDS. Raises UserError naming a line that is no pair."""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
            pair = {key: record[key] for key in FIELDS}
        except (ValueError, KeyError, TypeError):
            pair = {}
        if not pair or not all(isinstance(value, str) for value in pair.values()):
            raise UserError(f"line {number} of {name} is no pair of BLiMP")
        yield pair


def prepare(folder: Path, archive: str | None = None) -> tuple[int, int]:
    """Writes blimp.jsonl to `folder`. Returns (paradigms, pairs)."""
    files = members(archive, "*.jsonl", URL)
    all_pairs = [pair for name in sorted(files) for pair in pairs(name, files[name])]
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in all_pairs)
    write_atomic(Path(folder) / "blimp.jsonl", lambda file: file.write(text.encode()))
    return len({pair["UID"] for pair in all_pairs}), len(all_pairs)


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--archive", help="local .zip, .tar.gz, .tar.xz or folder")
    paradigms, n_pairs = prepare(FOLDER, flags.parse_args().archive)
    print(f"{n_pairs:,} pairs of {paradigms} paradigms (the release has 67,000 of 67): {FOLDER / 'blimp.jsonl'}")


if __name__ == "__main__":
    cli(main)
