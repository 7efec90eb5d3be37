"""What does this checkpoint do?    python detect.py CHECKPOINT [--flag ...]

  python detect.py out/quickstart                        a run of train.py
  python detect.py gpt2                                  of the Hugging Face hub
  python detect.py out/quickstart --prompt "The cat."    one text, by token
  python detect.py out/quickstart --data wikitext103     on other text
  python detect.py --compare out/prenorm out/postnorm    side by side

Massive activations and attention sinks, in one streaming pass. Reads
checkpoints of train.py, nanoGPT and transformers; nothing in them is executed.
Writes detect.json and detect.html beside the checkpoint.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import torch
from tqdm import tqdm

from data.loader import NANOGPT_META
from model import GPT
from spikesink import files
from spikesink.errors import Flags, UserError, cli
from spikesink.measure import findings, history, prompt
from spikesink.measure.anatomy import anatomy
from spikesink.measure.calibrate import nulls
from spikesink.measure.examples import Examples
from spikesink.measure.observe import observe
from spikesink.models import checkpoint, disk_weights, hf
from spikesink.models.subject import Subject
from spikesink.show import figures, report
from spikesink.text.sequences import PADDING, Reader
from spikesink.text.tokenizers import NoTokenizer, tokenizer_of


def whole(text, least=0):
    """A whole number of at least `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


count = functools.partial(whole, least=1)


def flags(description):
    """The flags that say which model is looked at, on what, and where the findings go."""
    parser = Flags(description=description)
    parser.add_argument(
        "checkpoint", nargs="?", help="ckpt.pt or the folder that holds it, or a Hugging Face folder or hub name"
    )
    text = parser.add_argument_group("on which text (default: the validation split of what it was trained on)")
    source = text.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="NAME", help="the validation split of this dataset")
    source.add_argument("--text", metavar="FILE", help="a text file, encoded as the training data was")
    source.add_argument(
        "--tokens", metavar="FILE.npy", help="integer ids [n_seq, seq_len], used as they are; -100 is padding"
    )
    text.add_argument(
        "--seq_len", type=count, metavar="N", help="tokens in a sequence, with BOS (default: 64, Gu et al.'s)"
    )
    text.add_argument("--n_seq", type=count, metavar="N", help="number of sequences (default: 100)")
    text.add_argument("--bpe", metavar="FILE", help="local file of GPT-2's BPE ranks")
    output = parser.add_argument_group("where the findings go")
    output.add_argument("--json", metavar="FILE", help="the numbers (default: beside the checkpoint)")
    output.add_argument("--html", metavar="FILE", help="the page (default: beside the checkpoint)")
    output.add_argument("--figures", metavar="DIR", help="every figure too, as SVG and PNG, for a paper")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1 ...")
    how.add_argument("--batch_size", type=count, default=8, metavar="N", help="sequences at a time (default: 8)")
    how.add_argument("--nulls", type=whole, metavar="N", help="sequences of each null, 0 for none (default: up to 16)")
    how.add_argument(
        "--max_memory",
        type=count,
        metavar="GiB",
        help="on the CPU, a Hugging Face model that needs more is read from disk as it runs (default: what is free)",
    )
    return parser


@dataclasses.dataclass
class Loaded:
    """A model as the instruments and the findings need it."""

    subjects: list[Subject]  # one, or the parts of an encoder-decoder
    reader: Reader  # how it reads text
    checkpoint: dict  # the findings' entry: path, sha256, step
    model: dict  # the findings' entry: its architecture


NO_CHECKPOINT = (".py", ".jsonl", ".html", ".txt", ".md", ".npy", ".csv")


def load(args):
    """The model of the command line: a checkpoint file, or a Hugging Face folder or hub name. Raises UserError."""
    path = Path(args.checkpoint)
    if path.suffix in (".json", ".safetensors") and path.is_file():
        raise UserError(f"{path} is a part of a folder; give the folder, {path.parent}")
    if path.suffix in NO_CHECKPOINT and path.is_file():
        raise UserError(f"{path} is no checkpoint; give the ckpt.pt of a run, or the folder that holds it")
    if path.is_file() or path.suffix == ".pt" or (path / "ckpt.pt").is_file():
        return load_ours(path / "ckpt.pt" if path.is_dir() else path, args)
    if path.is_dir() and not (path / "config.json").is_file():
        runs = ", ".join(str(run.parent) for run in sorted(path.glob("*/ckpt.pt"))[:5])
        raise UserError(
            f"{path} holds neither a ckpt.pt nor a Hugging Face config.json" + (f"; these do: {runs}" if runs else "")
        )
    return load_hf(args)


def load_ours(path, args):
    """A checkpoint of train.py or of nanoGPT."""
    content = checkpoint.load(path)
    try:
        model = GPT.from_checkpoint(content)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not hold a model of this version: {str(error).splitlines()[0]}") from None
    model = hf.to_device(model, args.device)
    trained, meta, config = content.get("config", {}), content.get("data", NANOGPT_META), model.config
    tokenizer = tokenizer_of(meta, args.bpe)
    dataset = trained.get("dataset", "openwebtext")
    before = (getattr(tokenizer, "bos_id", meta.get("bos_id")),) if trained.get("bos", False) else ()
    return Loaded(
        [Subject.of_gpt(model, tokenizer.decode)],
        Reader(tokenizer, meta, dataset, before, (), config.block_size, config.vocab_size),
        {
            "path": str(path),
            "sha256": files.file_hash(path),
            "step": content.get("step", content.get("iter_num")),
            "tokens": content.get("tokens"),  # of training; None where unknown
        },
        {**dataclasses.asdict(config), "parameters": model.num_params()},
    )


def load_hf(args):
    """A language model of transformers; its default text is Python's own documentation."""
    name = args.checkpoint
    model = hf.open_model(name, args.device, disk_weights.room(args.max_memory))
    config = model.config
    tokenizer = hf.Tokenizer.of(name) or NoTokenizer()
    before, after = getattr(tokenizer, "before", ()), getattr(tokenizer, "after", ())
    shown = (
        "model_type",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "vocab_size",
    )
    return Loaded(
        hf.subjects_of(model, tokenizer.decode),
        Reader(tokenizer, {}, "stdlib", before, after, hf.longest(config), config.vocab_size),
        {"path": str(name), "sha256": hf.weights_hash(name), "step": None, "tokens": None},
        {
            **{key: getattr(config, key) for key in shown if hasattr(config, key)},
            "parameters": disk_weights.count(model),
        },
    )


@dataclasses.dataclass
class Opened:
    """A model, the sequences it is observed on, and what the findings say of both."""

    subjects: list[Subject]
    ids: torch.Tensor  # (N, T)
    other_ids: torch.Tensor  # (N', T), other text of the same kind, to calibrate on; empty unless asked for
    about: dict  # the findings' entries checkpoint, model, data
    vocab_size: int
    reader: Reader


def output_paths(path, args, json_name, html_name):
    """Where the JSON and the page go: as given, or beside the checkpoint `path`, or here for a model of the hub.

    Raises UserError unless they can be written, each one a file of its own.
    """
    paths = Path(args.json or folder_of(path) / json_name), Path(args.html or folder_of(path) / html_name)
    for file in paths:
        files.check_writable(file)
    if paths[0].resolve() == paths[1].resolve():
        raise UserError(f"--json and --html both name {paths[0]}")
    return paths


def folder_of(path):
    """The folder that findings on a checkpoint go to."""
    path = Path(path)
    return path.parent if path.is_file() else path if path.is_dir() else Path()


def open_checkpoint(args, calibration=False):
    """The model and the sequences that the command line names; with `calibration`, as many again of other text.

    Raises UserError.
    """
    loaded = load(args)
    n_seq = args.n_seq or 100
    # of 2n - 1 evenly spread sequences every second one: the n that detect takes, and those in between
    read = loaded.reader.sequences(args, 2 * n_seq - 1 if calibration and n_seq > 1 else n_seq + calibration)
    ids, other_ids = (read.ids[::2], read.ids[1::2]) if calibration else (read.ids, read.ids[:0])
    if calibration and len(other_ids) == 0:
        raise UserError(f"{read.name} has {len(ids)} sequence; means are taken on other text, so at least 2 are needed")
    data = {
        "name": str(read.name),
        "n_seq": len(ids),
        "seq_len": ids.size(1),
        "tokens": int((ids != PADDING).sum()),
        "bos": read.bos,
        "dtype": "float32",
    }
    about = {"checkpoint": loaded.checkpoint, "model": loaded.model, "data": data}
    return Opened(
        loaded.subjects,
        ids,
        other_ids,
        about,
        loaded.reader.meta.get("vocab_size", loaded.reader.vocab_size),
        loaded.reader,
    )


def detect(opened, args):
    """Findings of an opened checkpoint; of an encoder-decoder, the decoder's, with the other `parts` beside them."""
    first, *others = (detect_part(subject, opened, args) for subject in opened.subjects)
    path, step = opened.about["checkpoint"]["path"], opened.about["checkpoint"]["step"]
    if step is not None:  # a run of ours: its log lies beside it
        first["history"] = history.of_log(folder_of(path) / "log.jsonl", step)
    return {**first, "parts": {found["part"]: found for found in others}} if others else first


def detect_part(subject, opened, args):
    """Findings of one Subject: the observation, its nulls, its anatomy."""
    observation = observe(subject, opened.ids, args.batch_size, examples=Examples())
    no_init = disk_weights.no_copy(subject.model, disk_weights.room(args.max_memory))
    null = nulls(subject, opened.ids, opened.vocab_size, args.nulls, args.batch_size, no_init=no_init)
    parts = anatomy(subject, opened.ids, observation, args.batch_size)
    return findings.detection(subject, observation, **opened.about, null=null, anatomy=parts)


def look_at_prompt(args):
    """--prompt: one text, token by token."""
    given = [flag for flag in ("data", "text", "tokens") if getattr(args, flag) is not None]
    if given:
        raise UserError(f"--prompt is the text; --{given[0]} is another")
    loaded = load(args)
    ids = loaded.reader.prompt(args.prompt)
    json_path, html_path = output_paths(loaded.checkpoint["path"], args, "prompt.json", "prompt.html")
    looked = [prompt.inspect(subject, ids, loaded.checkpoint, loaded.model) for subject in loaded.subjects]
    found = {**looked[0], **({"parts": {one["part"]: one for one in looked[1:]}} if looked[1:] else {})}
    files.save_json(json_path, found)
    report.prompt_page(html_path, found)
    print(report.prompt_terminal(found))
    if args.figures:
        print(f"\n{report.figure_files(args.figures, (figures.PROMPT, found))}")
    return json_path, html_path


def compare(args):
    """--compare: several checkpoints side by side, each on the text that its flags give."""
    paths = ([args.checkpoint] if args.checkpoint else []) + args.compare
    json_path, html_path = output_paths("", args, "compare.json", "compare.html")
    found = []
    for path in tqdm(paths, desc="checkpoints", disable=None, leave=False):
        args.checkpoint = path
        found.append({**detect(open_checkpoint(args), args), "examples": {}})  # of one checkpoint, for its own page
    names = short_names(paths)
    files.save_json(json_path, {"schema": findings.COMPARISON_SCHEMA, "names": names, "findings": found})
    report.comparison_page(html_path, names, found)
    print(report.grid(*report.comparison_rows(names, found)))
    header, rows = report.architecture_rows(names, found)
    if rows:
        print("\nwhat differs in their architecture\n" + report.grid(header, rows))
    if args.figures:
        pairs = list(zip(names, found, strict=True))
        print(f"\n{report.figure_files(args.figures, (figures.COMPARISON, pairs))}")
    return json_path, html_path


def short_names(paths):
    """Names of checkpoints: their paths without ckpt.pt, and without the folders that all of them share."""
    split = [Path(path).parts for path in paths]
    split = [parts[:-1] if parts[-1] == "ckpt.pt" and len(parts) > 1 else parts for parts in split]
    while len({parts[0] for parts in split}) == 1 and all(len(parts) > 1 for parts in split):
        split = [parts[1:] for parts in split]
    return ["/".join(parts) for parts in split]


def look_at_checkpoint(args):
    """One checkpoint on many sequences; with --vocab, every token of its vocabulary too."""
    opened = open_checkpoint(args)
    json_path, html_path = output_paths(opened.about["checkpoint"]["path"], args, "detect.json", "detect.html")
    found = detect(opened, args)
    if args.vocab:
        encoder = next((subject for subject in opened.subjects if subject.part == "encoder"), opened.subjects[0])
        of_part = dict(report.parts_of(found))[encoder.part]
        found["vocabulary"] = prompt.vocabulary(encoder, of_part, opened.ids, opened.vocab_size)
    files.save_json(json_path, found)
    report.page(html_path, found)
    print(report.terminal(found))
    if args.vocab:
        print(f"\n{report.vocabulary_terminal(found['vocabulary'])}")
    if args.figures:
        print(f"\n{report.figure_files(args.figures, (figures.DETECTION, found))}")
    return json_path, html_path


def main():
    parser = flags(__doc__)
    asking = parser.add_argument_group("other questions, one at a time")
    asking.add_argument("--prompt", metavar="TEXT", help="one text, token by token")
    asking.add_argument("--compare", nargs="+", metavar="CKPT", help="several checkpoints side by side")
    asking.add_argument("--vocab", action="store_true", help="every token of the vocabulary too: which of them spike?")
    args = parser.parse_args()
    if not args.checkpoint and not args.compare:
        raise UserError("which checkpoint? Give ckpt.pt, a Hugging Face folder or hub name, or --compare A B")
    asked = [name for name in ("prompt", "compare", "vocab") if getattr(args, name) not in (None, False)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two questions: ask one at a time")
    look = look_at_prompt if args.prompt is not None else compare if args.compare else look_at_checkpoint
    json_path, html_path = look(args)
    print(f"\nfindings: {json_path}\npage:     {html_path}")


if __name__ == "__main__":
    cli(main)
