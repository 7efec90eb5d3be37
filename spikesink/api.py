"""What `import spikesink` and the commands call: open a model, detect, ablate, edit."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .edit import interventions, outcomes, quantise, sampling
from .edit.ablation import ablate_subject, has_bos
from .edit.choices import questions
from .edit.clean_pass import Reference
from .edit.findings import Ablation, Samples
from .errors import UserError
from .files import file_hash
from .measure import history
from .measure.anatomy import anatomy
from .measure.calibrate import nulls
from .measure.examples import Examples
from .measure.findings import CheckpointEntry, Findings, TextEntry
from .measure.monitor import Monitor, MonitorCallback  # noqa: F401, names of the API
from .measure.observe import Ordinary, observe
from .measure.summarise import summarise
from .models import checkpoint, disk_weights, hf
from .models.export import trained_on
from .models.lab import Lab, open_lab
from .models.subject import Subject, gpt_in
from .models.views import as_it_was
from .options import Options, Sampling
from .text import default_text
from .text.sequences import PADDING, Reader, bos_of
from .text.token_files import Meta, meta_of
from .text.tokenizers import NoTokenizer, TextTokenizer, fingerprint, tokenizer_of

N_SEQ = 100  # sequences, unless asked for otherwise: Gu et al.'s

# ----------------------------------------------------------------------------------------------- opening a model


@dataclass
class Loaded:
    """A model as the instruments and the findings need it."""

    subjects: list[Subject]  # one, or the parts of an encoder-decoder: decoder, encoder, cross
    reader: Reader  # how it reads text
    checkpoint: CheckpointEntry
    model: dict[str, Any]  # the findings' entry: its architecture
    probe_data: Path = Path("data")  # where BLiMP and the treebank are prepared


NO_CHECKPOINT = (".py", ".jsonl", ".html", ".txt", ".md", ".npy", ".csv")


def load(target: str | Path | nn.Module, options: Options, tokenizer: object = None, lab: Lab | None = None) -> Loaded:
    """The model that `target` names, or is. Raises UserError where it cannot be had, or not observed."""
    loaded = _load(target, options, tokenizer, lab)
    loaded.reader = dataclasses.replace(loaded.reader, special=options.special).starting(options.bos)
    return loaded


def _load(target: str | Path | nn.Module, options: Options, tokenizer: object, lab: Lab | None) -> Loaded:
    no_revision = UserError("--revision goes with a Hugging Face folder or hub name")
    if isinstance(target, nn.Module):
        if options.revision is not None:
            raise no_revision
        return _in_memory(target, tokenizer)
    if tokenizer is not None:
        raise UserError(f"tokenizer= goes with a model in memory; {target} has its own")
    path = Path(target)
    if path.suffix.lower() == ".gguf":
        return _transformers(path, options)
    if path.suffix in (".json", ".safetensors") and path.is_file():
        raise UserError(f"{path} is a part of a folder; give the folder, {path.parent}")
    if path.suffix in NO_CHECKPOINT and path.is_file():
        raise UserError(f"{path} is no checkpoint; give the ckpt.pt of a run, or the folder that holds it")
    if path.is_file() or path.suffix == ".pt" or (path / "ckpt.pt").is_file():
        if options.revision is not None:
            raise no_revision
        return _checkpoint(path / "ckpt.pt" if path.is_dir() else path, options, lab)
    if path.is_dir() and options.revision is None and not (path / "config.json").is_file():
        revisions = hf.revisions_in(path)
        if revisions:
            raise UserError(f"{path} holds several models: give --revision with one of {', '.join(revisions)}")
        runs = ", ".join(str(run.parent) for run in sorted(path.glob("*/ckpt.pt"))[:5])
        raise UserError(
            f"{path} holds neither a ckpt.pt nor a Hugging Face config.json" + (f"; these do: {runs}" if runs else "")
        )
    return _transformers(target, options)


def _checkpoint(path: Path, options: Options, lab: Lab | None) -> Loaded:
    """A checkpoint of train.py, which needs its model.py, or of nanoGPT, which needs transformers or a model.py."""
    content = checkpoint.load(path)
    trained, args = content.config, content.model_args
    if lab is None and (options.model is not None or content.maker == "spikesink"):
        lab = open_lab(options.model, path)
    if lab:
        content.check_contract(lab.contract, path)
    try:
        model = lab.build(content) if lab else hf.nanogpt_model(args, content.model)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not hold a model of this version: {str(error).splitlines()[0]}") from None
    model = hf.to_device(model, options.device)
    meta = content.meta or _meta_of_data(options.data, args.get("vocab_size"))
    tokenizer = tokenizer_of(meta, options.bpe)
    dataset = trained.get("dataset", "openwebtext")
    prefix_ids: tuple[Any, ...] = (bos_of(tokenizer, meta),) if trained.get("bos", False) else ()
    about = CheckpointEntry(path=str(path), sha256=file_hash(path), step=content.step, tokens=content.tokens)
    if lab:
        subjects, parameters = [Subject.from_gpt(model, tokenizer.decode)], model.num_params()
        args, sizes = dataclasses.asdict(model.config), (model.config.block_size, model.config.vocab_size)
    else:
        sizes = args["block_size"], args["vocab_size"]
        subjects, parameters = hf.subjects_of(model, tokenizer.decode), disk_weights.parameter_count(model)
    split, data = (lab.split, lab.data) if lab else (Reader.split, Loaded.probe_data)
    reader = Reader(tokenizer, meta, dataset, prefix_ids, (), *sizes, split)
    return Loaded(subjects, reader, about, {**args, "parameters": parameters}, data)


def _meta_of_data(name: str | Path | None, vocab_size: int | None) -> Meta:
    """What the folder of data that was asked for says of a vocabulary of this size, for a checkpoint of nanoGPT, which
    does not say; empty where it has another."""
    meta = meta_of(name) if name is not None and Path(name).is_dir() else {}
    return meta if meta.get("vocab_size") == vocab_size else {}


def _transformers(target: str | Path, options: Options) -> Loaded:
    """A model of the Hugging Face hub, of a folder or a GGUF file; its default text is Python's own documentation."""
    source = hf.Source.locate(target, options.revision)
    opened = hf.load(source, options.device, disk_weights.free_bytes(options.max_memory))
    about = CheckpointEntry(path=source.name, sha256=hf.weights_hash(source.name), step=hf.step_of(options.revision))
    loaded = _of_transformers(opened.model, hf.Tokenizer.load(source) or NoTokenizer(), about)
    return dataclasses.replace(loaded, model=loaded.model | opened.about)


def _of_transformers(model: Any, tokenizer: TextTokenizer, about: CheckpointEntry) -> Loaded:
    config = hf.text_config(model.config)
    meta = trained_on(model.config, getattr(tokenizer, "bos_id", None))
    if isinstance(tokenizer, NoTokenizer):
        tokenizer = tokenizer_of(meta) if meta.get("tokenizer") in ("byte", "chars") else tokenizer
    suffix_ids = getattr(tokenizer, "suffix_ids", ())
    prefix_ids = getattr(tokenizer, "prefix_ids", (meta["bos_id"],) if meta.get("bos") and "bos_id" in meta else ())
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")
    architecture = {key: getattr(config, key) for key in ("model_type", *sizes) if hasattr(config, key)}
    architecture["parameters"] = disk_weights.parameter_count(model)
    subjects, longest = hf.subjects_of(model, tokenizer.decode), hf.longest(model)
    reader = Reader(tokenizer, meta, default_text.NAME, prefix_ids, suffix_ids, longest, config.vocab_size)
    return Loaded(subjects, reader, about, architecture)


def _in_memory(model: nn.Module, tokenizer: Any) -> Loaded:
    """A model that the caller holds: a GPT of a model.py, or one of transformers, on the device where it is."""
    wrapped: TextTokenizer = hf.Tokenizer(tokenizer) if callable(tokenizer) else tokenizer or NoTokenizer()
    about = CheckpointEntry(path=f"a {type(model).__name__} in memory")
    gpt, transformer = gpt_in(model), hf.transformers_in(model)
    if gpt is None and transformer is None:
        raise UserError(f"{type(model).__name__} is neither a model of transformers nor a GPT of a model.py")
    if gpt is None:
        return _of_transformers(transformer, wrapped, about)
    config, prefix_ids = gpt.config, getattr(wrapped, "prefix_ids", ())
    reader = Reader(wrapped, {}, default_text.NAME, prefix_ids, (), config.block_size, config.vocab_size)
    architecture = {**dataclasses.asdict(config), "parameters": gpt.num_params()}
    return Loaded([Subject.from_gpt(gpt, wrapped.decode)], reader, about, architecture)


@dataclass
class Look:
    """An open model and the sequences that it is looked at on. Leave it with `close`, or use it in a `with` block.

    `subjects`: one, or the parts of an encoder-decoder, the decoder first. `ids` (N, T): int64, -100 where a shorter
    sequence has no token. `edits`: those within whose blocks this is called, the outermost first.
    """

    loaded: Loaded
    options: Options
    ids: torch.Tensor
    data: TextEntry
    edits: list[outcomes.Condition] = field(default_factory=list)
    closed: bool = False
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
        reader = self.loaded.reader
        return min(reader.meta.get("vocab_size", reader.vocab_size), reader.vocab_size)

    @functools.cached_property
    def other_ids(self) -> torch.Tensor:
        """(N', T): other text of the same kind, to take means from. Raises UserError where there is none."""
        if self._other_ids is None:
            n, whole = len(self.ids), self.options.text is not None or self.options.tokens is not None
            everything = dataclasses.replace(self.options, n_seq=None)
            read = self.loaded.reader.sequences(everything, 2 * n - 1 if n > 1 and not whole else 2 * n)
            # of a dataset those in between; of a text or an array, whose first ones are taken, the next ones
            mine, self._other_ids = (read.ids[:n], read.ids[n : 2 * n]) if whole else (read.ids[::2], read.ids[1::2])
            if len(self._other_ids) == 0 or mine.shape != self.ids.shape or not torch.equal(mine, self.ids):
                raise UserError(
                    f"{read.name} holds no other text than the {len(self.ids)} sequences that are looked at: open "
                    "the model with a smaller n_seq"
                )
        return self._other_ids

    @functools.cached_property
    def references(self) -> list[Reference]:
        """What the other text says of each Subject's spikes and sinks."""
        each = zip(self.subjects, self.ordinary, strict=True)
        return [Reference(s, self.other_ids, self.options.batch_size, ordinary) for s, ordinary in each]

    @functools.cached_property
    def ordinary(self) -> list[Ordinary]:
        """What is usual in each Subject on this text, with which spikes are compared."""
        return [Ordinary.from_ids(s, self.ids, self.options.batch_size) for s in self.subjects]

    @torch.no_grad()
    def losses(self) -> torch.Tensor:
        """The mean loss of each sequence within the `edits`, in nats per token: (N,), float64. First part only."""
        self.check_open()
        self.check_loss()
        subject = self.subjects[0]
        if not self.edits:
            return quantise.sequence_losses(subject, self.ids, self.options.batch_size)
        return outcomes.edited_losses(subject, self.ids, self.edits, self.options.batch_size, self.ordinary[0])

    def loss(self) -> float:
        """The mean of `losses`, in nats per token."""
        return self.losses().mean().item()

    def check_open(self, unedited: bool = False) -> None:
        """Raises UserError if the model was given back; with `unedited`, also within the block of an edit."""
        if self.closed:
            raise UserError("the model was closed; open it again")
        if unedited and self.edits:
            raise UserError("detect and ablate look at the model as it is: call them outside the blocks of edits")

    def check_loss(self) -> None:
        """Raises UserError if the model has no language-model head."""
        if not self.subjects[0].has_loss:
            raise UserError(
                f"{self.loaded.checkpoint.path} has no language-model head, so no loss: detect and ablate measure it "
                "without one"
            )

    def close(self) -> None:
        """Gives a model that the caller holds back as it was: training mode, attention implementation, dropout."""
        self.closed = True
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
        look = _read(load(target, options, tokenizer, lab), options, calibration)
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
    data = TextEntry(
        name=str(read.name),
        n_seq=len(ids),
        seq_len=ids.size(1),
        tokens=int((ids != PADDING).sum()),
        bos=read.bos,
        dtype=loaded.subjects[0].dtype,
        predicted_bytes=loaded.reader.predicted_bytes(ids, loaded.subjects[0].shift),
        tokenizer=fingerprint(loaded.reader.tokenizer),
    )
    return Look(loaded, options, ids, data, _other_ids=other_ids)


# ------------------------------------------------------------------------------------------------------- detect


def detect(look: Look) -> Findings:
    """Findings of an open model; of an encoder-decoder, the decoder's, with the other `parts` beside them."""
    look.check_open(unedited=True)
    first, *others = (_detect_part(*pair, look) for pair in zip(look.subjects, look.ordinary, strict=True))
    path, step = first.checkpoint.path, first.checkpoint.step
    rows = None if step is None else history.log_rows(folder_of(path) / "log.jsonl", step)  # of a run of train.py
    return dataclasses.replace(first, history=rows, parts={part.part: part for part in others} or None)


def _detect_part(subject: Subject, ordinary: Ordinary, look: Look) -> Findings:
    """Findings of one Subject: the observation, its nulls, its anatomy."""
    options = look.options
    observation = observe(subject, look.ids, options.batch_size, examples=Examples(), ordinary=ordinary)
    no_init = disk_weights.why_no_second_copy(subject.model, disk_weights.free_bytes(options.max_memory))
    null = nulls(
        subject, look.ids, look.vocab_size, options.nulls, options.batch_size, no_init=no_init, ordinary=ordinary
    )
    parts = anatomy(subject, look.ids, observation, options.batch_size)
    return summarise(subject, observation, **look.about, null=null, anatomy=parts)


def folder_of(path: str | Path) -> Path:
    """The folder that findings on a checkpoint go to: its own, or the current one for a model of the hub."""
    path = Path(path)
    return path.parent if path.is_file() else path if path.is_dir() else Path()


# ------------------------------------------------------------------------------------------------------- ablate


def ablate(look: Look, only: Iterable[str] = (), probe: bool = True, choices: str | Path | None = None) -> Ablation:
    """Ablation findings of an open model; of an encoder-decoder, the decoder's, with the other `parts`.

    `only`: names of interventions, by default all. `probe`: BLiMP and linear probes too, where they are prepared.
    `choices`: a JSONL file of multiple choice, see edit.choices. Raises UserError for an unknown name, and where there
    is no other text to take means from.
    """
    look.check_open(unedited=True)
    files = dict.fromkeys(("blimp", "linear"), look.loaded.probe_data) if probe else {}
    if choices is not None:
        questions(choices)  # a mistake in it is said at once
        files["choices"] = Path(choices)
    first, *others = (
        ablate_subject(
            subject,
            reference,
            look.ids,
            look.other_ids,
            look.about,
            only=tuple(only),
            batch_size=look.options.batch_size,
            reader=look.loaded.reader,
            probe_files=files,
        )
        for subject, reference in zip(look.subjects, look.references, strict=True)
    )
    return dataclasses.replace(first, parts={part.part: part for part in others}) if others else first


# ------------------------------------------------------------------------------------------------------ samples

SAMPLE_REFERENCE = 24  # sequences that say what is usual


def sample(
    look: Look | Loaded,
    prompt: str,
    options: Sampling | None = None,
    edit: str | None = None,
    on_text: sampling.OnText | None = None,
    reference_text: Options | None = None,
) -> Samples:
    """What a model says after a prompt; and again, with the same seeds, under the intervention `edit`.

    A sample ends at a token that ends a text. The text of `reference_text` says what is usual, and gives the means that
    some edits need; by default it is what the model reads, else Python's documentation. `on_text` is called with
    ("clean" or `edit`, number of the sample, a piece of its text) as it comes. Raises UserError for a model that does
    not predict the next token, an empty prompt, an unknown `edit`, and where there is no BOS to remove.
    """
    if isinstance(look, Look):
        look.check_open(unedited=True)
        look = look.loaded
    subject, reader, options = look.subjects[0], dataclasses.replace(look.reader, suffix_ids=()), options or Sampling()
    intervention = interventions.intervention_named(edit) if edit else None
    if intervention and intervention.kind == "bos" and not reader.prefix_ids:
        raise UserError(f"{edit}: no BOS stands before the prompt; --bos puts one there")
    start = sampling.prompt_ids(subject, reader, prompt)
    read = reader.reference(reference_text or Options(), SAMPLE_REFERENCE) if intervention else None
    draw = functools.partial(sampling.continuations, subject, reader, start, options, on_text)
    samples = Samples(prompt=prompt, clean=draw("clean")[0])
    if edit is None or intervention is None or read is None:
        return samples
    ordinary = Ordinary.from_ids(subject, read.ids)
    reference = Reference(subject, read.ids, ordinary=ordinary) if intervention.needs_reference else None
    edited, n_edited = draw(edit, functools.partial(intervention.edit, reference=reference), ordinary)
    text = f"{len(read.ids)} sequences of {read.name}"
    return dataclasses.replace(samples, edit=edit, edited=edited, n_edited=n_edited, reference=text)


# -------------------------------------------------------------------------------------------------------- pages


def page(path: str | Path, findings: Findings, ablation: Ablation | None = None) -> None:
    """Writes one HTML file that needs no network: the findings, and what ablate found if that is given.

    Needs the extra `pages`. Raises UserError.
    """
    from .show.page import detection_page

    detection_page(path, findings, ablation)


def figures(folder: str | Path, findings: Findings, ablation: Ablation | None = None) -> str:
    """Writes every figure as SVG and PNG, in a paper's style, and captions.txt; returns which in a line.

    Needs the extra `pages`. Raises UserError.
    """
    from .show import page

    return page.figure_files(folder, *page.detection_figures(findings, ablation))


# -------------------------------------------------------------------------------------------------------- edits


def edited(look: Look, name: str, control: str | None = None) -> contextlib.AbstractContextManager[Look]:
    """A context manager: inside it, `look.loss` and `look.losses` are those of the edited model.

    `name`: of interventions.INTERVENTIONS or REMOVALS; `control`: one of its controls, in its place. The clean model
    fixes on each batch what is edited, so edits combine in any order. Raises UserError for an unknown name or control,
    where there is no BOS to remove, and where an edit needs other text and there is none.
    """
    intervention = interventions.intervention_named(name, control)
    if intervention.kind == "bos" and not has_bos(look.subjects[0], look.data.bos):
        raise UserError(f"{name}: the sequences of {look.data.name} do not start with BOS")
    reference = look.references[0] if intervention.needs_reference else None
    return _within(look, functools.partial(intervention.edit, reference=reference, control=control))


@contextlib.contextmanager
def _within(look: Look, edit: outcomes.Condition) -> Iterator[Look]:
    look.edits.append(edit)
    try:
        yield look
    finally:
        look.edits.remove(edit)


class NamedEdit(Protocol):
    """`edited` for one name."""

    def __call__(self, look: Look, control: str | None = None) -> contextlib.AbstractContextManager[Look]:
        """A context manager: inside it, the losses of `look` are those of the edited model."""


def _edit(name: str) -> NamedEdit:
    """The intervention as a function of a Look, with its own docstring."""

    def edit(look: Look, control: str | None = None) -> contextlib.AbstractContextManager[Look]:
        return edited(look, name, control)

    intervention = interventions.intervention_named(name)
    edit.__name__ = edit.__qualname__ = name
    edit.__doc__ = (
        f"{inspect.getdoc(intervention.edit)}\n\n`control`: {' or '.join(intervention.controls)}. See `edited`."
    )
    return edit


spike_zero, spike_mean, spike_clip = _edit("spike_zero"), _edit("spike_mean"), _edit("spike_clip")
spike_stepup, spike_project, spike_constant = _edit("spike_stepup"), _edit("spike_project"), _edit("spike_constant")
spike_scale, spike_direction, bos_ffn = _edit("spike_scale"), _edit("spike_direction"), _edit("bos_ffn")
sink_mask, sink_damp = _edit("sink_mask"), _edit("sink_damp")
sink_relocate, sink_null, bos_remove = _edit("sink_relocate"), _edit("sink_null"), _edit("bos_remove")
remove_sink_heads, remove_step_up = _edit("remove_sink_heads"), _edit("remove_step_up")
