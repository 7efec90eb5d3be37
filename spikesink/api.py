"""What `import spikesink` and the commands call: open a model, detect, ablate, edit.

import spikesink

with spikesink.open("gpt2", n_seq=20) as look:
    findings = spikesink.detect(look)
    with spikesink.spike_zero(look):
        print(look.loss())
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .edit import interventions, outcomes, probes, quantise
from .errors import UserError
from .files import file_hash
from .measure import history
from .measure.anatomy import anatomy
from .measure.calibrate import nulls
from .measure.examples import Examples
from .measure.findings import CheckpointEntry, Findings, TextEntry
from .measure.observe import observe
from .measure.summarise import summarise
from .models import checkpoint, disk_weights, hf
from .models.lab import Lab, open_lab
from .models.subject import Subject, gpt_in
from .models.views import as_it_was
from .options import Options
from .text import default_text
from .text.sequences import PADDING, Reader
from .text.token_files import NANOGPT_META
from .text.tokenizers import NoTokenizer, TextTokenizer, tokenizer_of

N_SEQ = 100  # sequences, unless asked for otherwise: Gu et al.'s

# ----------------------------------------------------------------------------------------------- opening a model


@dataclass
class Loaded:
    """A model as the instruments and the findings need it."""

    subjects: list[Subject]  # one, or the parts of an encoder-decoder: decoder, encoder, cross
    reader: Reader  # how it reads text
    checkpoint: dict[str, Any]  # the findings' entry: path, sha256, step, tokens of training
    model: dict[str, Any]  # the findings' entry: its architecture
    probe_data: Path  # where BLiMP and the treebank are prepared


NO_CHECKPOINT = (".py", ".jsonl", ".html", ".txt", ".md", ".npy", ".csv")


def load(target: str | Path | nn.Module, options: Options, tokenizer: object = None, lab: Lab | None = None) -> Loaded:
    """The model that `target` names, or is. Raises UserError where it cannot be had, or not observed."""
    if isinstance(target, nn.Module):
        return _in_memory(target, tokenizer)
    path = Path(target)
    if path.suffix in (".json", ".safetensors") and path.is_file():
        raise UserError(f"{path} is a part of a folder; give the folder, {path.parent}")
    if path.suffix in NO_CHECKPOINT and path.is_file():
        raise UserError(f"{path} is no checkpoint; give the ckpt.pt of a run, or the folder that holds it")
    if path.is_file() or path.suffix == ".pt" or (path / "ckpt.pt").is_file():
        return _checkpoint(path / "ckpt.pt" if path.is_dir() else path, options, lab)
    if path.is_dir() and not (path / "config.json").is_file():
        runs = ", ".join(str(run.parent) for run in sorted(path.glob("*/ckpt.pt"))[:5])
        raise UserError(
            f"{path} holds neither a ckpt.pt nor a Hugging Face config.json" + (f"; these do: {runs}" if runs else "")
        )
    return _transformers(str(target), options)


def _checkpoint(path: Path, options: Options, lab: Lab | None) -> Loaded:
    """A checkpoint of train.py, which needs its model.py, or of nanoGPT, which needs transformers or a model.py."""
    content = checkpoint.load(path)
    if lab is None and (options.model is not None or checkpoint.is_ours(content)):
        lab = open_lab(options.model, path)
    try:
        model = lab.build(content) if lab else hf.of_nanogpt(content)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not hold a model of this version: {str(error).splitlines()[0]}") from None
    model = hf.to_device(model, options.device)
    trained, meta, args = content.get("config", {}), content.get("data", NANOGPT_META), content["model_args"]
    tokenizer = tokenizer_of(meta, options.bpe)
    dataset = trained.get("dataset", "openwebtext")
    prefix_ids = (getattr(tokenizer, "bos_id", meta.get("bos_id")),) if trained.get("bos", False) else ()
    about = {
        "path": str(path),
        "sha256": file_hash(path),
        "step": content.get("step", content.get("iter_num")),
        "tokens": content.get("tokens"),  # of training; None where unknown
    }
    if lab:
        split, config = lab.split, model.config
        subjects = [Subject.of_gpt(model, tokenizer.decode)]
        architecture = {**dataclasses.asdict(config), "parameters": model.num_params()}
        block_size, vocab_size = config.block_size, config.vocab_size
        data = lab.data
    else:
        split, data = Reader.split, Path("data")
        subjects = hf.subjects_of(model, tokenizer.decode)
        architecture = {**args, "parameters": disk_weights.parameter_count(model)}
        block_size, vocab_size = args["block_size"], args["vocab_size"]
    return Loaded(
        subjects,
        Reader(tokenizer, meta, dataset, prefix_ids, (), block_size, vocab_size, split),
        about,
        architecture,
        data,
    )


def _transformers(name: str, options: Options) -> Loaded:
    """A model of the Hugging Face hub or of a folder; its default text is Python's own documentation."""
    model = hf.open_model(name, options.device, disk_weights.free_bytes(options.max_memory))
    about = {"path": name, "sha256": hf.weights_hash(name), "step": None, "tokens": None}
    return _of_transformers(model, hf.Tokenizer.of(name) or NoTokenizer(), about)


def _of_transformers(model: Any, tokenizer: TextTokenizer, about: dict[str, Any]) -> Loaded:
    config = model.config
    prefix_ids, suffix_ids = getattr(tokenizer, "prefix_ids", ()), getattr(tokenizer, "suffix_ids", ())
    shown = [
        "model_type",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "vocab_size",
    ]
    architecture = {key: getattr(config, key) for key in shown if hasattr(config, key)}
    return Loaded(
        hf.subjects_of(model, tokenizer.decode),
        Reader(tokenizer, {}, default_text.NAME, prefix_ids, suffix_ids, hf.longest(config), config.vocab_size),
        about,
        {**architecture, "parameters": disk_weights.parameter_count(model)},
        Path("data"),
    )


def _in_memory(model: nn.Module, tokenizer: Any) -> Loaded:
    """A model that the caller holds: a GPT of a model.py, or one of transformers, on the device where it is."""
    wrapped: TextTokenizer = hf.Tokenizer(tokenizer) if callable(tokenizer) else tokenizer or NoTokenizer()
    about = {"path": f"a {type(model).__name__} in memory", "sha256": None, "step": None, "tokens": None}
    gpt, transformer = gpt_in(model), hf.found_in(model)
    if gpt is None and transformer is None:
        raise UserError(f"{type(model).__name__} is neither a model of transformers nor a GPT of a model.py")
    if gpt is None:
        return _of_transformers(transformer, wrapped, about)
    config = gpt.config
    reader = Reader(wrapped, {}, default_text.NAME, (), (), config.block_size, config.vocab_size)
    architecture = {**dataclasses.asdict(config), "parameters": gpt.num_params()}
    return Loaded([Subject.of_gpt(gpt, wrapped.decode)], reader, about, architecture, Path("data"))


@dataclass
class Look:
    """An open model and the sequences that it is looked at on. Leave it with `close`, or use it in a `with` block.

    `subjects`: one, or the parts of an encoder-decoder, the decoder first. `ids` (N, T): int64, -100 where a shorter
    sequence has no token. `edits`: those within whose blocks this is called, the outermost first.
    """

    loaded: Loaded
    options: Options
    ids: torch.Tensor
    data: dict[str, Any]  # the findings' entry: which text, how much, whether BOS starts each sequence
    edits: list[Callable[..., interventions.Edit]] = field(default_factory=list)
    _other_ids: torch.Tensor | None = None
    _exit: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def subjects(self) -> list[Subject]:
        """The Subjects under observation."""
        return self.loaded.subjects

    @property
    def about(self) -> dict[str, Any]:
        """The findings' entries checkpoint, model and data."""
        return {"checkpoint": self.loaded.checkpoint, "model": self.loaded.model, "data": self.data}

    @property
    def vocab_size(self) -> int:
        """Ids from which null texts are drawn: those that the training data had, where that is known."""
        return self.loaded.reader.meta.get("vocab_size", self.loaded.reader.vocab_size)

    @functools.cached_property
    def other_ids(self) -> torch.Tensor:
        """(N', T): other text of the same kind, to take means from. Raises UserError where there is none."""
        if self._other_ids is None:
            wanted = 2 * len(self.ids) - 1 if len(self.ids) > 1 else 2
            read = self.loaded.reader.sequences(dataclasses.replace(self.options, n_seq=None), wanted)
            if read.ids[::2].shape != self.ids.shape or not torch.equal(read.ids[::2], self.ids):
                raise UserError(
                    f"{read.name} holds no other text than the {len(self.ids)} sequences that are looked at: open "
                    "the model with a smaller n_seq"
                )
            self._other_ids = read.ids[1::2]
        return self._other_ids

    @functools.cached_property
    def references(self) -> list[interventions.Reference]:
        """What the other text says of each Subject's spikes and sinks."""
        return [interventions.Reference(s, self.other_ids, self.options.batch_size) for s in self.subjects]

    @torch.no_grad()
    def losses(self) -> torch.Tensor:
        """The mean loss of each sequence within the `edits`, in nats per token: (N,), float64. First part only."""
        subject = self.subjects[0]
        if not self.edits:
            return quantise.sequence_losses(subject, self.ids, self.options.batch_size)
        return outcomes.edited_losses(subject, self.ids, self.edits, self.references[0], self.options.batch_size)

    def loss(self) -> float:
        """The mean of `losses`, in nats per token."""
        return self.losses().mean().item()

    def close(self) -> None:
        """Gives a model that the caller holds back as it was: training mode, attention implementation, dropout."""
        self._exit.close()

    def __enter__(self) -> "Look":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open(
    target: str | Path | nn.Module,
    options: Options | None = None,
    *,
    tokenizer: object = None,
    lab: Lab | None = None,
    calibration: bool = False,
    **changes: Any,
) -> Look:
    """Opens a model and reads the sequences that it will be looked at on.

    `target`: a checkpoint (train.py's or nanoGPT's ckpt.pt, or the folder of it), a transformers folder or hub name, or
    a model in memory, whose `tokenizer` is then transformers' or has encode and decode. `changes`: fields of Options,
    as in open("gpt2", n_seq=20). `calibration`: at once reads as many sequences again of other text, of fewer than were
    asked for if need be. Raises UserError; a model in memory is then as it was.
    """
    options = dataclasses.replace(options or Options(), **changes)
    with contextlib.ExitStack() as stack:
        if isinstance(target, nn.Module):
            stack.enter_context(as_it_was(target))
        loaded = load(target, options, tokenizer, lab)
        look = _read(loaded, options, calibration)
        look._exit = stack.pop_all()
    return look


def _read(loaded: Loaded, options: Options, calibration: bool) -> Look:
    """The Look on a loaded model: the first text of `options`, and with `calibration` the other."""
    n_seq = options.n_seq or N_SEQ
    # of 2n - 1 evenly spread sequences every second one: the n that detect takes, and those in between
    read = loaded.reader.sequences(options, 2 * n_seq - 1 if calibration and n_seq > 1 else n_seq + calibration)
    ids, other_ids = (read.ids[::2], read.ids[1::2]) if calibration else (read.ids, None)
    if other_ids is not None and len(other_ids) == 0:
        raise UserError(f"{read.name} has {len(ids)} sequence; means are taken on other text, so at least 2 are needed")
    data = {
        "name": str(read.name),
        "n_seq": len(ids),
        "seq_len": ids.size(1),
        "tokens": int((ids != PADDING).sum()),
        "bos": read.bos,
        "dtype": loaded.subjects[0].dtype,
    }
    return Look(loaded, options, ids, data, _other_ids=other_ids)


# ------------------------------------------------------------------------------------------------------- detect


def detect(look: Look) -> Findings:
    """Findings of an open model; of an encoder-decoder, the decoder's, with the other `parts` beside them."""
    first, *others = (_detect_part(subject, look) for subject in look.subjects)
    path, step = first.checkpoint.path, first.checkpoint.step
    rows = None if step is None else history.of_log(folder_of(path) / "log.jsonl", step)  # of a run of train.py
    return dataclasses.replace(first, history=rows, parts={found.part: found for found in others} or None)


def _detect_part(subject: Subject, look: Look) -> Findings:
    """Findings of one Subject: the observation, its nulls, its anatomy."""
    options = look.options
    observation = observe(subject, look.ids, options.batch_size, examples=Examples())
    no_init = disk_weights.why_no_second_copy(subject.model, disk_weights.free_bytes(options.max_memory))
    null = nulls(subject, look.ids, look.vocab_size, options.nulls, options.batch_size, no_init=no_init)
    parts = anatomy(subject, look.ids, observation, options.batch_size)
    checkpoint, text = CheckpointEntry(**look.loaded.checkpoint), TextEntry(**look.data)
    return summarise(subject, observation, checkpoint, look.loaded.model, text, null, parts)


def folder_of(path: str | Path) -> Path:
    """The folder that findings on a checkpoint go to: its own, or the current one for a model of the hub."""
    path = Path(path)
    return path.parent if path.is_file() else path if path.is_dir() else Path()


# ------------------------------------------------------------------------------------------------------- ablate

SCHEMA = "spikesink-ablation-1"
NOTE = (
    "What is edited is fixed by the clean model on the same text: spikes are the entries that the ratio rule marks, at "
    "every tap of the residual stream where an edit reaches all that follows; sinks are keys with alpha > 0.3 and at "
    "least T/4 queries, head by head. edited: entries, tokens, keys, heads or sub-layers, over all sequences. Means, "
    "directions and the step-up come from other text. spikes left, sinks left: how many of the very same are still "
    "there, in the sequences that had what was edited. Intervals: 95%, paired bootstrap over sequences. "
    + quantise.NOTE
)
# sizes at which an interval is some +- 3% wide, and all of it takes a minute for the quickstart's model
PAIRS, SENTENCES = 12, {"train": 600, "test": 300}  # pairs of each paradigm; sentences


def ablate(look: Look, only: Iterable[str] = (), probe: bool = True) -> dict:
    """Ablation findings of an open model; of an encoder-decoder, the decoder's, with the other `parts`.

    `only`: names of interventions, by default all. `probe`: BLiMP and linear probes too, where they are prepared.
    Raises UserError.
    """
    only = tuple(only)
    both = zip(look.subjects, look.references, strict=True)
    first, *others = (_ablate_part(subject, reference, look, only, probe) for subject, reference in both)
    return {**first, "parts": {found["part"]: found for found in others}} if others else first


def _ablate_part(
    subject: Subject, reference: interventions.Reference, look: Look, only: tuple[str, ...], probe: bool
) -> dict:
    """Ablation findings of one Subject."""
    table, removals = chosen(subject, look.data["bos"], only)
    conditions = outcomes.conditions_of(table | removals, reference)
    desc = f"ablate {subject.part}".strip()
    measured = outcomes.measure(subject, look.ids, conditions, look.options.batch_size, desc)
    entries = outcomes.entries(table, measured)
    return {
        "schema": SCHEMA,
        **look.about,
        "part": subject.part,
        "calibration": {"n_seq": len(look.other_ids)},
        "note": NOTE,
        "taps": [{"layer": tap.layer, "kind": tap.kind} for tap in subject.streams],
        "baseline": outcomes.baseline(measured),
        "interventions": entries,
        "removals": outcomes.entries(removals, measured),
        "two_by_two": outcomes.two_by_two(entries),
        "attention": outcomes.attention(measured),
        "int8": int8(subject, look),
        "probes": probed(subject, look, entries, conditions) if probe and subject.part != "cross" else {},
    }


def chosen(subject: Subject, bos: bool, only: tuple[str, ...]) -> tuple[dict, dict]:
    """The interventions that are wanted, and those on whole tokens, heads and sub-layers."""
    table, removals = interventions.INTERVENTIONS, interventions.REMOVALS
    if subject.start is None and not bos:  # there is no BOS to remove
        table = {**table, "bos_remove": table["bos_remove"]._replace(edit=interventions.nothing)}
    keep = lambda table: {name: one for name, one in table.items() if not only or name in only}
    return keep(table), keep(removals)


def int8(subject: Subject, look: Look) -> dict:
    """What 8 bits cost, by granularity; the `reason` where that cannot be tried."""
    try:
        return quantise.quantised_losses(subject, look.ids, look.other_ids, look.options.batch_size)
    except UserError as error:
        return {"reason": str(error)}


def changed_conditions(entries: list[dict]) -> list[str]:
    """The conditions that changed something, each intervention with its first control; the clean model before all."""
    changed = (e for e in entries if e["edited"])
    return ["none", *(name for e in changed for name in (e["name"], f"{e['name']}/{e['control'][0]['name']}"))]


def blimp(subject: Subject, loaded: Loaded, conditions: dict) -> dict:
    """BLiMP under every condition. Raises UserError."""
    pairs = probes.minimal_pairs(prepared(loaded, "blimp", "blimp.jsonl"), PAIRS)
    return probes.blimp(subject, loaded.reader, pairs, outcomes.on_texts(subject, conditions, shared=True))


def ud_ewt(subject: Subject, loaded: Loaded, conditions: dict) -> dict:
    """Linear probes on UD English EWT under every condition. Raises UserError."""
    train, test = (probes.sentences(prepared(loaded, "ud_ewt", f"{s}.conllu"), n) for s, n in SENTENCES.items())
    return probes.linear(subject, loaded.reader, train, test, outcomes.on_texts(subject, conditions, shared=False))


PROBES = {"blimp": blimp, "linear": ud_ewt}


def prepared(loaded: Loaded, dataset: str, file: str) -> Path:
    """The path of a prepared file. Raises UserError naming what prepares it."""
    path = loaded.probe_data / dataset / file
    if not path.is_file():
        raise UserError(f"{dataset} is not prepared: python data/{dataset}/prepare.py")
    return path


def probed(subject: Subject, look: Look, entries: list[dict], conditions: dict) -> dict:
    """What grammar and the states say under every condition; for a probe that cannot be run, the `reason`."""
    conditions = {"none": interventions.nothing} | conditions
    conditions = {name: conditions[name] for name in changed_conditions(entries)}
    found = {}
    for name, run_probe in PROBES.items():
        try:
            found[name] = run_probe(subject, look.loaded, conditions)
        except UserError as error:
            found[name] = {"reason": str(error)}
    return found


# -------------------------------------------------------------------------------------------------------- edits


@contextlib.contextmanager
def edited(look: Look, name: str, control: str | None = None) -> Iterator[Look]:
    """Within, `look.loss` and `look.losses` are of the model under an intervention, or one of its controls.

    `name`: of interventions.INTERVENTIONS or REMOVALS. What is edited is fixed by the clean model on each batch, so
    edits combine in any order. Raises UserError for a name or control that there is not.
    """
    table = interventions.INTERVENTIONS | interventions.REMOVALS
    if name not in table:
        raise UserError(f"there is no intervention {name!r}; known: {', '.join(table)}")
    if control is not None and control not in table[name].controls:
        raise UserError(f"{name} has no control {control!r}; known: {', '.join(table[name].controls)}")
    look.edits.append(functools.partial(table[name].edit, control=control))
    try:
        yield look
    finally:
        look.edits.pop()


def _edit(name: str) -> Callable[..., contextlib.AbstractContextManager[Look]]:
    def edit(look: Look, control: str | None = None) -> contextlib.AbstractContextManager[Look]:
        return edited(look, name, control)

    table = interventions.INTERVENTIONS | interventions.REMOVALS
    edit.__name__, edit.__doc__ = name, table[name].edit.__doc__
    return edit


spike_zero, spike_mean, spike_clip = _edit("spike_zero"), _edit("spike_mean"), _edit("spike_clip")
spike_stepup, spike_project, spike_constant = _edit("spike_stepup"), _edit("spike_project"), _edit("spike_constant")
sink_mask, sink_damp, sink_relocate, sink_null = map(_edit, ("sink_mask", "sink_damp", "sink_relocate", "sink_null"))
bos_remove, remove_sink_heads, remove_step_up = map(_edit, ("bos_remove", "remove_sink_heads", "remove_step_up"))
