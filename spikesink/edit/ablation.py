"""Everything that ablate measures of one model, or of one part of an encoder-decoder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..measure.findings import Place
from ..measure.observe import Ordinary
from ..models.subject import Subject
from ..text.sequences import Reader
from . import interventions, outcomes, probes, quantise
from .choices import multiple_choice, questions
from .clean_pass import Reference
from .findings import Ablation, Blimp, Calibration, Choices, Entry, Int8, Linear, Probes, Unavailable
from .interventions import Intervention
from .outcomes import Conditions

NOTE = (
    "What is edited is fixed by the clean model on the same text: spikes are the entries that the primary rule marks, "
    "at every tap of the residual stream where an edit reaches all that follows; sinks are keys with alpha > 0.3 that "
    "T/4 queries see, head by head. edited: entries, tokens, keys, heads or sub-layers, over all sequences. Means, "
    "directions and the step-up come from other text. spikes left, sinks left: how many of the very same are still "
    "there, in the sequences that had what was edited; of a spike token, any spike at any tap, of any size. dose: of "
    "a control, how far it moves states from the clean ones (squared), or how much attention its keys get, as part of "
    "its intervention's. Intervals: 95%, paired bootstrap over sequences. " + quantise.NOTE
)
# sizes at which an interval is some +- 3% wide, and all of it takes a minute for the quickstart's model
PAIRS, SENTENCES = 12, {"train": 600, "test": 300}  # pairs of each paradigm; sentences


def ablate_subject(
    subject: Subject,
    reference: Reference,
    ids: Tensor,
    other_ids: Tensor,
    about: Mapping[str, Any],
    *,
    only: Sequence[str] = (),
    batch_size: int = 8,
    reader: Reader | None = None,
    probe_files: Mapping[str, Path] | None = None,
) -> Ablation:
    """Every intervention, its controls, int8 and the probes on ids (N, T), int64; `reference` is of other_ids (N', T).

    `about`: the findings' entries checkpoint, model and data. `only`: names of interventions, by default all. With a
    `reader` also those of PROBES that `probe_files` names, each with what it reads. Raises UserError for an unknown
    name.
    """
    table, removals = chosen(subject, about["data"].bos, only)
    conditions = outcomes.conditions_of(table | removals, reference)
    measured = outcomes.measure(
        subject, ids, conditions, batch_size, f"ablate {subject.part}".strip(), reference.ordinary
    )
    measured.predicted_bytes = about["data"].predicted_bytes
    entries = outcomes.table_entries(table, measured)
    return Ablation(
        **about,
        part=subject.part,
        calibration=Calibration(n_seq=len(other_ids)),
        note=" ".join((NOTE, *subject.whole_passes)).strip(),
        taps=[Place(layer=tap.layer, kind=tap.kind) for tap in subject.streams],
        baseline=outcomes.baseline(measured),
        interventions=entries,
        removals=outcomes.table_entries(removals, measured),
        causes=outcomes.causes_of(table, measured),
        attention=outcomes.attention_change(measured),
        int8=int8(subject, ids, other_ids, batch_size),
        probes=(
            probed(subject, reader, probe_files, entries, conditions, reference.ordinary)
            if reader and probe_files and subject.part != "cross"
            else Probes()
        ),
    )


def chosen(
    subject: Subject, bos: bool, only: Sequence[str] = ()
) -> tuple[dict[str, Intervention], dict[str, Intervention]]:
    """The interventions that are wanted, and those on whole tokens, heads and sub-layers.

    `bos`: whether the sequences start with one. Raises UserError for an unknown name.
    """
    for name in only:
        interventions.intervention_named(name)
    table = dict(interventions.INTERVENTIONS)
    if not has_bos(subject, bos):
        table["bos_remove"] = table["bos_remove"]._replace(edit=interventions.nothing)
    keep = lambda table: {name: one for name, one in table.items() if not only or name in only}
    return keep(table), keep(interventions.REMOVALS)


def has_bos(subject: Subject, bos: bool) -> bool:
    """Whether there is a BOS to remove: in the sequences, or as the decoder's start token."""
    return bos or subject.start is not None


def int8(subject: Subject, ids: Tensor, other_ids: Tensor, batch_size: int) -> dict[str, Int8] | Unavailable:
    """What 8 bits cost, by granularity, or why that cannot be tried."""
    try:
        return quantise.quantised_losses(subject, ids, other_ids, batch_size)
    except UserError as error:
        return Unavailable(reason=str(error))


# ------------------------------------------------------------------------------------------------------- probes


def changed_conditions(entries: list[Entry]) -> list[str]:
    """The conditions that changed something, each intervention with its first control; the clean model before all."""
    changed = (entry for entry in entries if entry.edited)
    return ["none", *(name for e in changed for name in (e.name, *(f"{e.name}/{c.name}" for c in e.control[:1])))]


def blimp(subject: Subject, reader: Reader, folder: Path, conditions: Conditions, ordinary: Ordinary) -> Blimp:
    """BLiMP under every condition. Raises UserError."""
    pairs = probes.minimal_pairs(prepared(folder, "blimp", "blimp.jsonl"), PAIRS)
    return probes.blimp(subject, reader, pairs, outcomes.on_texts(subject, conditions, True, ordinary))


def linear(subject: Subject, reader: Reader, folder: Path, conditions: Conditions, ordinary: Ordinary) -> Linear:
    """Linear probes on UD English EWT under every condition. Raises UserError."""
    train, test = (probes.sentences(prepared(folder, "ud_ewt", f"{s}.conllu"), n) for s, n in SENTENCES.items())
    return probes.linear(subject, reader, train, test, outcomes.on_texts(subject, conditions, False, ordinary))


def choices(subject: Subject, reader: Reader, path: Path, conditions: Conditions, ordinary: Ordinary) -> Choices:
    """Multiple choice under every condition. Raises UserError."""
    return multiple_choice(subject, reader, questions(path), outcomes.on_texts(subject, conditions, True, ordinary))


PROBES: dict[str, Callable[[Subject, Reader, Path, Conditions, Ordinary], Blimp | Linear | Choices]] = {
    "blimp": blimp,
    "linear": linear,
    "choices": choices,
}


def probed(
    subject: Subject,
    reader: Reader,
    files: Mapping[str, Path],
    entries: list[Entry],
    conditions: Conditions,
    ordinary: Ordinary,
) -> Probes:
    """What the probes that `files` names say under every condition that changed something."""
    conditions = {"none": interventions.nothing} | dict(conditions)
    conditions = {name: conditions[name] for name in changed_conditions(entries)}
    found: dict[str, Any] = {}
    for name, path in files.items():
        try:
            found[name] = PROBES[name](subject, reader, path, conditions, ordinary)
        except UserError as error:
            found[name] = Unavailable(reason=str(error))
    return Probes(**found)


def prepared(folder: Path, dataset: str, file: str) -> Path:
    """The path of a prepared file. Raises UserError naming what prepares it."""
    path = folder / dataset / file
    if not path.is_file():
        raise UserError(f"{dataset} is not prepared: in a clone, python data/{dataset}/prepare.py")
    return path
