"""The commands detect, ablate, sample and export: they parse flags, call the library, print and write files.

The scripts of a clone run the same commands with the clone's own model and datasets.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from . import api, schema
from .api import folder_of
from .edit import choices, interventions
from .errors import Flags, UserError
from .files import check_writable
from .measure import prompt
from .measure.findings import Comparison
from .measure.observe import ORDINARY_SEQUENCES, Ordinary
from .models import checkpoint, hf
from .models.lab import Lab, open_lab
from .options import Options, Sampling, add_flags, from_flags, option
from .show import report
from .show.ablation_text import samples_in_words
from .show.text import printable

NO_PAGE = "none: it needs pip install 'spikesink[pages]'"


@dataclass(frozen=True)
class Outputs:
    """Where the findings go."""

    json: str | None = option("the numbers (default: beside the checkpoint)", metavar="FILE", group="output")
    html: str | None = option("the page (default: beside the checkpoint)", metavar="FILE", group="output")
    figures: str | None = option("every figure too, as SVG and PNG, for a paper", metavar="DIR", group="output")

    def paths(self, beside: str | Path, json_name: str, html_name: str) -> tuple[Path, Path]:
        """Where the JSON and the page go: as given, or beside a checkpoint, or here for a model of the hub.

        Raises UserError unless they can be written, each one a file of its own.
        """
        files = Path(self.json or folder_of(beside) / json_name), Path(self.html or folder_of(beside) / html_name)
        for file in files:
            check_writable(file)
        if files[0].resolve() == files[1].resolve():
            raise UserError(f"--json and --html both name {files[0]}")
        return files

    def write(
        self,
        paths: tuple[Path, Path],
        files: Mapping[Path, Any],
        say: Callable[[], str],
        draw: Callable[[ModuleType], Any],
    ) -> None:
        """Writes the findings in `files` as JSON, the page and the figures, and prints what say() returns and where
        they are. draw(show.page) writes the page, and returns the tables of its figures. Raises UserError."""
        for path, findings in files.items():
            schema.save(path, findings)
        page = pages(self)
        figures = draw(page) if page else []
        print(say())
        if page and self.figures:
            print(f"\n{page.figure_files(self.figures, *figures)}")
        print(f"\nfindings: {paths[0]}\npage:     {paths[1] if page else NO_PAGE}")


def pages(outputs: Outputs) -> ModuleType | None:
    """show.page; None where the packages that it needs are missing. Raises UserError if figures are wanted then."""
    try:
        from .show import page
    except UserError:
        if outputs.figures:
            raise
        return None
    return page


def parser_of(description: str) -> Flags:
    """The flags that say which model is looked at, on what, and where the findings go."""
    parser = Flags(description=description)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="ckpt.pt or the folder that holds it, or a Hugging Face folder or hub name, or a GGUF file",
    )
    add_flags(parser, Options)
    add_flags(parser, Outputs)
    return parser


# ------------------------------------------------------------------------------------------------------- detect


def detect(argv: Sequence[str], description: str, lab: Lab | None = None) -> None:
    """The command `detect`. Raises UserError."""
    parser = parser_of(description)
    asking = parser.add_argument_group("other questions, one at a time")
    asking.add_argument("--prompt", metavar="TEXT", help="one text, token by token")
    asking.add_argument("--compare", nargs="+", metavar="CKPT", help="several checkpoints side by side")
    asking.add_argument("--revisions", metavar="A,B,...", help="several revisions of it side by side: over training")
    asking.add_argument("--vocab", action="store_true", help="every token of the vocabulary too: which of them spike?")
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.compare:
        raise UserError("which checkpoint? Give ckpt.pt, a Hugging Face folder or hub name, or --compare A B")
    asked = [name for name in ("prompt", "compare", "revisions", "vocab") if getattr(args, name) not in (None, False)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two questions: ask one at a time")
    options, outputs = from_flags(Options, args), from_flags(Outputs, args)
    if args.prompt is not None:
        _prompt(args.checkpoint, args.prompt, options, outputs, lab)
    elif args.compare:
        targets = ([args.checkpoint] if args.checkpoint else []) + args.compare
        _compare([(target, options) for target in targets], outputs, lab)
    elif args.revisions is not None:
        _compare(revisions_of(args.checkpoint, args.revisions, options), outputs, lab)
    else:
        _detect(args.checkpoint, args.vocab, options, outputs, lab)


def _detect(target: str, vocab: bool, options: Options, outputs: Outputs, lab: Lab | None) -> None:
    """One checkpoint on many sequences; with `vocab`, every token of its vocabulary too."""
    pages(outputs)  # what is missing is said before anything is measured
    with api.open(target, options, lab=lab) as look:
        paths = outputs.paths(look.loaded.checkpoint.path, "detect.json", "detect.html")
        findings = api.detect(look)
        if vocab:
            encoder = next((subject for subject in look.subjects if subject.part == "encoder"), look.subjects[0])
            part = dict(findings.all_parts)[encoder.part]
            vocabulary = prompt.vocabulary(encoder, part, look.ids, look.vocab_size)
            findings = dataclasses.replace(findings, vocabulary=vocabulary)
    say = lambda: report.terminal(findings)
    outputs.write(paths, {paths[0]: findings}, say, lambda page: page.detection_page(paths[1], findings))


def _prompt(target: str, text: str, options: Options, outputs: Outputs, lab: Lab | None) -> None:
    """--prompt: one text, token by token."""
    pages(outputs)
    other_text = next((flag for flag in ("data", "text", "tokens") if getattr(options, flag) is not None), None)
    if other_text:
        raise UserError(f"--prompt is the text; --{other_text} is another")
    loaded = api.load(target, options, lab=lab)
    ids = loaded.reader.prompt(text)
    paths = outputs.paths(loaded.checkpoint.path, "prompt.json", "prompt.html")
    ordinary_ids = loaded.reader.ordinary(options, ORDINARY_SEQUENCES).ids
    first, *others = (
        prompt.inspect(
            subject,
            ids,
            loaded.checkpoint,
            loaded.model,
            Ordinary.from_ids(subject, ordinary_ids),
            loaded.reader.predicted_bytes(ids, subject.shift),
        )
        for subject in loaded.subjects
    )
    findings = dataclasses.replace(first, parts={part.part: part for part in others} or None)
    say = lambda: report.prompt_terminal(findings)
    outputs.write(paths, {paths[0]: findings}, say, lambda page: page.prompt_page(paths[1], findings))


def revisions_of(target: str, listed: str, options: Options) -> list[tuple[str, Options]]:
    """--revisions: what is opened for each of a list with commas. Raises UserError, before anything is measured."""
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if options.revision is not None or not names:
        raise UserError("--revisions lists several, as in step0,step1000; --revision names one")
    for name in names:
        hf.Source.locate(target, name)
    return [(target, dataclasses.replace(options, revision=name)) for name in names]


def _compare(targets: list[tuple[str, Options]], outputs: Outputs, lab: Lab | None) -> None:
    """--compare, --revisions: several checkpoints side by side, each on the text that its flags give."""
    pages(outputs)
    paths = outputs.paths("", "compare.json", "compare.html")
    findings = []
    for target, options in tqdm(targets, desc="checkpoints", disable=None, leave=False):
        with api.open(target, options, lab=lab) as look:
            findings.append(dataclasses.replace(api.detect(look), examples=None))  # a page of one checkpoint has them
    names = short_names([str(Path(target, options.revision or "")) for target, options in targets])
    say = lambda: report.comparison_terminal(names, findings)
    comparison = Comparison(names=names, findings=findings)
    outputs.write(paths, {paths[0]: comparison}, say, lambda page: page.comparison_page(paths[1], names, findings))


def short_names(paths: Sequence[str]) -> list[str]:
    """Names of checkpoints: their paths without ckpt.pt, and without the folders that all of them share."""
    split = [Path(path).parts or Path(path).resolve().parts for path in paths]
    split = [parts[:-1] if parts[-1] == "ckpt.pt" and len(parts) > 1 else parts for parts in split]
    while len({parts[0] for parts in split}) == 1 and all(len(parts) > 1 for parts in split):
        split = [parts[1:] for parts in split]
    return ["/".join(parts) for parts in split]


# ------------------------------------------------------------------------------------------------------- ablate


def ablate(argv: Sequence[str], description: str, lab: Lab | None = None) -> None:
    """The command `ablate`. Raises UserError."""
    parser = parser_of(description)
    names = [*interventions.INTERVENTIONS, *interventions.REMOVALS]
    part = parser.add_argument_group("some of it")
    part.add_argument("--only", nargs="+", choices=names, default=[], metavar="NAME", help=f"of {', '.join(names)}")
    part.add_argument(
        "--probes", action=argparse.BooleanOptionalAction, default=True, help="BLiMP and linear probes (default: yes)"
    )
    part.add_argument("--choices", metavar="FILE", help="multiple choice too: a JSONL file in HellaSwag's form")
    args = parser.parse_args(argv)
    if not args.checkpoint:
        raise UserError("which checkpoint? Give ckpt.pt, or a Hugging Face folder or hub name")
    options, outputs = from_flags(Options, args), from_flags(Outputs, args)
    pages(outputs)
    with api.open(args.checkpoint, options, lab=lab, calibration=True) as look:
        paths = outputs.paths(look.loaded.checkpoint.path, "ablate.json", "report.html")
        if args.choices:
            choices.questions(args.choices)
        if paths[0].name == "detect.json":
            raise UserError(f"--json {paths[0]}: what detect finds on the same text goes there; name another file")
        findings = api.detect(look)
        ablation = api.ablate(look, args.only, args.probes, args.choices)
    say = lambda: f"measured on {report.conditions(findings)}\n\n{report.ablation_terminal(ablation)}"
    files = {paths[0]: ablation, paths[0].with_name("detect.json"): findings}
    outputs.write(paths, files, say, lambda page: page.detection_page(paths[1], findings, ablation))


# ------------------------------------------------------------------------------------------------------- sample


def sample(argv: Sequence[str], description: str, lab: Lab | None = None) -> None:
    """The command `sample`. Raises UserError."""
    names = [*interventions.INTERVENTIONS, *interventions.REMOVALS]
    parser = Flags(description=description)
    parser.add_argument("checkpoint", help="as detect's: ckpt.pt, or a Hugging Face folder or hub name, or a GGUF file")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what is continued")
    parser.add_argument(
        "--with", dest="edit", choices=names, metavar="NAME", help=f"again under one of {', '.join(names)}"
    )
    add_flags(parser, Sampling)
    add_flags(parser, Options, ("data", "text", "bos", "special", "bpe", "device", "revision", "max_memory", "model"))
    args = parser.parse_args(argv)
    options, drawing = from_flags(Options, args), from_flags(Sampling, args)
    last: list[tuple[str, int]] = []

    def show(name: str, number: int, piece: str) -> None:
        if (name, number) not in last:
            title = f"== {name}, sample {number + 1} ==\n" if args.edit or drawing.n_samples > 1 else ""
            print(("\n\n" if last else "") + title + printable(args.prompt), end="")
            last.append((name, number))
        print(printable(piece), end="", flush=True)

    loaded = api.load(args.checkpoint, options, lab=lab)
    samples = api.sample(loaded, args.prompt, drawing, args.edit, show, options)
    print(f"\n\n{samples_in_words(samples)}" if samples.edit else "")


# ------------------------------------------------------------------------------------------------------- export


def export(argv: Sequence[str], description: str) -> None:
    """The command `export`. Raises UserError."""
    from .models.export import export

    flags = Flags(description=description)
    flags.add_argument("checkpoint", help="ckpt.pt of train.py or nanoGPT")
    flags.add_argument("folder", help="where the Hugging Face folder goes; must not exist")
    flags.add_argument("--bpe", metavar="FILE", help="local file of GPT-2's BPE ranks")
    flags.add_argument("--model", metavar="FILE", help="the model.py that made it (default: the clone's)")
    args = flags.parse_args(argv)
    if Path(args.folder).exists():
        raise UserError(f"{args.folder} exists already; name a new folder")
    content = checkpoint.load(args.checkpoint)
    lab = open_lab(args.model, args.checkpoint) if args.model or content.maker == "spikesink" else None
    if lab:
        content.check_contract(lab.contract, args.checkpoint)
    done = export(content, args.folder, args.bpe, lab.build if lab else None)
    print(f"{args.folder}: {done}; open it with transformers' from_pretrained, or detect it")
