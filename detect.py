"""What does this checkpoint do? Massive activations and attention sinks, in one streaming pass.

  python detect.py out/quickstart/ckpt.pt
  python detect.py ckpt.pt --data wikitext103 --seq_len 1024 --json findings.json --html findings.html

Reads checkpoints of train.py and of nanoGPT; nothing in them is executed.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from data.loader import NANOGPT_META, Tokens
from data.tokenizer import tokenizer_of
from model import GPT
from spikesink import checkpoint, findings, report
from spikesink.errors import Flags, UserError, run
from spikesink.observe import observe
from spikesink.subject import Subject


def count(text):
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def flags(description):
    """The flags that say which model is looked at, on what, and where the findings go."""
    parser = Flags(description=description)
    parser.add_argument("checkpoint", help="ckpt.pt, or the folder that holds it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="NAME", help="dataset whose val split is used; default: the training data's")
    source.add_argument("--text", metavar="FILE", help="a text file, encoded as the training data was")
    source.add_argument("--tokens", metavar="FILE.npy", help="integer ids [n_seq, seq_len], used as they are")
    parser.add_argument(
        "--seq_len", type=count, metavar="N", help="tokens in a sequence, with BOS (default: 64, Gu et al.'s)"
    )
    parser.add_argument("--n_seq", type=count, metavar="N", help="number of sequences (default: 100)")
    parser.add_argument("--batch_size", type=count, default=8, metavar="N", help="sequences at a time (default: 8)")
    parser.add_argument("--bpe", metavar="FILE", help="local file of GPT-2's BPE ranks")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda ...")
    parser.add_argument("--json", metavar="FILE", help="where the JSON goes (default: beside the checkpoint)")
    parser.add_argument("--html", metavar="FILE", help="where the page goes (default: beside the checkpoint)")
    return parser


@dataclasses.dataclass
class Opened:
    """A checkpoint ready for the instruments, and what the findings say of it."""

    subject: Subject
    ids: torch.Tensor  # (N, T), what it is observed on
    other_ids: torch.Tensor  # (N', T), other text of the same kind, to calibrate on; empty unless asked for
    about: dict  # the findings' entries checkpoint, model, data

    def beside(self, given, name):
        """A path that was given, or `name` in the checkpoint's folder."""
        return Path(given or Path(self.about["checkpoint"]["path"]).parent / name)


def open_checkpoint(args, calibration=False):
    """The model and the sequences that the command line names; with `calibration`, as many again of other text.

    Raises UserError.
    """
    path = Path(args.checkpoint)
    path = path / "ckpt.pt" if path.is_dir() else path
    content = checkpoint.load(path)
    try:
        model = GPT.from_checkpoint(content).to(args.device)
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
        raise UserError(f"{path} does not hold a model of this version: {str(error).splitlines()[0]}") from None
    trained = content.get("config", {})
    meta = content.get("data", NANOGPT_META)
    tokenizer = tokenizer_of(meta, args.bpe)
    bos = bool(trained.get("bos", False)) and not args.tokens
    wanted = None if args.tokens and args.n_seq is None else (args.n_seq or 100) * (2 if calibration else 1)
    if args.tokens:
        name, ids = args.tokens, ids_of_array(args)
    else:
        seq_len = args.seq_len or min(64, model.config.block_size)
        check_length(seq_len, model.config.block_size)
        if args.text:
            name, ids = args.text, ids_of_text(args.text, tokenizer, seq_len, bos)
        else:
            name = args.data or trained.get("dataset", "openwebtext")
            ids = ids_of_dataset(name, meta, seq_len, bos, wanted)
    check_length(ids.size(1), model.config.block_size)
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise UserError(f"{name} holds token {int(ids.max())}, outside the vocabulary of {model.config.vocab_size}")
    if args.n_seq and len(ids) < wanted:
        raise UserError(f"{name} has {len(ids)} sequences of {ids.size(1)} tokens, fewer than the {wanted} needed")
    ids = ids[:wanted]
    ids, other_ids = (ids[::2], ids[1::2]) if calibration else (ids, ids[:0])
    if calibration and len(other_ids) == 0:
        raise UserError(f"{name} has {len(ids)} sequence; means are taken on other text, so at least 2 are needed")
    about = {
        "checkpoint": {
            "path": str(path),
            "sha256": checkpoint.file_hash(path),
            "step": content.get("step", content.get("iter_num")),
        },
        "model": {**dataclasses.asdict(model.config), "parameters": model.num_params()},
        "data": {
            "name": str(name),
            "n_seq": len(ids),
            "seq_len": ids.size(1),
            "tokens": ids.numel(),
            "bos": bos,
            "dtype": "float32",
        },
    }
    return Opened(Subject.of_gpt(model, tokenizer.decode), ids, other_ids, about)


def check_length(seq_len, block_size):
    """Raises UserError for a sequence that the model cannot take, or that is too short to say anything."""
    if seq_len > block_size:
        raise UserError(f"a sequence of {seq_len} tokens is longer than the model's block_size={block_size}")
    if seq_len < 8:
        raise UserError(f"sequences of {seq_len} tokens are too short to measure anything; use at least 8")


def ids_of_array(args):
    """int64 ids (N, T) of --tokens. Raises UserError if the file is not a 2-D integer array."""
    try:
        array = np.load(args.tokens, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read --tokens {args.tokens}: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iu" or array.size == 0:
        raise UserError(f"--tokens {args.tokens} is not an integer array [n_seq, seq_len]")
    return torch.from_numpy(array.astype(np.int64))[:, : args.seq_len]


def ids_of_text(path, tokenizer, seq_len, bos):
    """int64 ids (N, T) of a text file, cut into sequences. Raises UserError if it is too short."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --text {path}: {error}") from None
    (ids,) = tokenizer.encode([text])
    taken = seq_len - bos
    n = len(ids) // taken
    if n == 0:
        raise UserError(f"--text {path} has {len(ids)} tokens, fewer than one sequence of {taken}")
    ids = torch.from_numpy(ids[: n * taken].astype(np.int64)).view(n, taken)
    return torch.cat([torch.full((n, 1), tokenizer.bos_id), ids], dim=1) if bos else ids


def ids_of_dataset(name, meta, seq_len, bos, wanted):
    """int64 ids (up to `wanted`, T) from all over the val split. Raises UserError if the vocabulary is another one."""
    data = Tokens(name, "val", seq_len, bos)
    if data.meta["vocab_size"] != meta["vocab_size"]:
        raise UserError(
            f"dataset {name} has a vocabulary of {data.meta['vocab_size']}, the checkpoint was trained on one of "
            f"{meta['vocab_size']}"
        )
    windows = np.linspace(0, data.n_windows - 1, min(wanted, data.n_windows)).astype(np.int64)
    return data.read(windows)[0]


def detect(opened, batch_size):
    """Findings of an opened checkpoint."""
    observation = observe(opened.subject, opened.ids, batch_size)
    return findings.detection(opened.subject, observation, **opened.about)


def main():
    args = flags(__doc__).parse_args()
    opened = open_checkpoint(args)
    found = detect(opened, args.batch_size)
    json_path, html_path = opened.beside(args.json, "detect.json"), opened.beside(args.html, "detect.html")
    findings.save(json_path, found)
    report.page(html_path, found)
    print(report.terminal(found))
    print(f"\nfindings: {json_path}\npage:     {html_path}")


if __name__ == "__main__":
    run(main)
