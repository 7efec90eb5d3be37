"""Runs everything that ablate measures on one model, or on one part of an encoder-decoder."""

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
    "The clean model on the same text determines what is edited: spikes are the entries that the primary rule marks, "
    "at every tap of the residual stream where an edit reaches all that follows; sinks are keys with alpha > 0.3 that "
    "at least T/4 queries see, in one head. edited: how many entries, tokens, keys, heads or sub-layers, over all "
    "sequences. Means, directions and the step-up come from other text. spikes left, sinks left: the share of the "
    "very same spikes or sinks that remain, in the sequences that had what was edited; a spike token counts if it has "
    "any spike at any tap, of any size. dose: how far a control moves states from the clean ones (squared), or how "
    "much attention its keys get, relative to its intervention. Intervals: 95%, paired bootstrap over sequences. "
    + quantise.NOTE
)
NOTE_HEADLESS = (
    "The model has no language-model head, so there is no loss. Instead we measure how far its output states o move: "
    "the mean |o' - o| / |o| over tokens, and 1 - cos between the mean output state of a sequence before and after."
)
# with these sizes an interval is about +- 3% wide, and all probes take a minute for the quickstart's model
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
    """Runs every intervention, its controls, int8 and the probes on ids (N, T), int64.

    `reference` comes from other_ids (N', T). `about` has the findings' entries checkpoint, model and data. `only`:
    names of interventions, by default all. With a `reader`, the PROBES run that `probe_files` names (name -> the path
    that it reads). Raises UserError for an unknown name.
    """
    table, removals = chosen_tables(subject, about["data"].bos, only)
    conditions = outcomes.conditions_of(table | removals, reference)
    description = f"ablate {subject.part}".strip()
    results = outcomes.measure_outcomes(subject, ids, conditions, batch_size, description, reference.ordinary)
    results.predicted_bytes = about["data"].predicted_bytes
    entries = outcomes.table_entries(table, results)
    return Ablation(
        **about,
        part=subject.part,
        calibration=Calibration(n_seq=len(other_ids)),
        note=" ".join((NOTE, *([] if subject.has_loss else [NOTE_HEADLESS]), *subject.whole_passes)).strip(),
        taps=[Place(layer=tap.layer, kind=tap.kind) for tap in subject.streams],
        baseline=outcomes.baseline(results),
        interventions=entries,
        removals=outcomes.table_entries(removals, results),
        causes=outcomes.causes_of(table, results),
        attention=outcomes.attention_change(results),
        int8=int8(subject, ids, other_ids, batch_size),
        probes=(
            run_probes(subject, reader, probe_files, entries, conditions, reference.ordinary)
            if reader and probe_files and subject.part != "cross"
            else Probes()
        ),
    )


def chosen_tables(
    subject: Subject, bos: bool, only: Sequence[str] = ()
) -> tuple[dict[str, Intervention], dict[str, Intervention]]:
    """Returns the rows of INTERVENTIONS and of REMOVALS that `only` names, by default all. `bos`: whether the sequences
    start with BOS. Raises UserError for an unknown name."""
    for name in only:
        interventions.intervention_named(name)
    table = dict(interventions.INTERVENTIONS)
    if not has_bos(subject, bos):
        table["bos_remove"] = table["bos_remove"]._replace(edit=interventions.nothing)
    select = lambda table: {name: row for name, row in table.items() if not only or name in only}
    return select(table), select(interventions.REMOVALS)


def has_bos(subject: Subject, bos: bool) -> bool:
    """Whether there is a BOS to remove, in the sequences or as the decoder's start token."""
    return bos or subject.start is not None


def int8(subject: Subject, ids: Tensor, other_ids: Tensor, batch_size: int) -> dict[str, Int8] | Unavailable:
    """Returns the loss in 8 and 4 bits by quantise.SCHEMES, or why it cannot be measured."""
    if not subject.has_loss:
        return Unavailable(reason="the model has no language-model head, so there is no loss")
    try:
        return quantise.quantised_losses(subject, ids, other_ids, batch_size)
    except UserError as error:
        return Unavailable(reason=str(error))


# ------------------------------------------------------------------------------------------------------- probes


def changed_conditions(entries: list[Entry]) -> list[str]:
    """Returns the clean model, then the interventions that changed something, each with its first control."""
    changed = (entry for entry in entries if entry.edited)
    return ["none", *(name for e in changed for name in (e.name, *(f"{e.name}/{c.name}" for c in e.control[:1])))]


def blimp(subject: Subject, reader: Reader, folder: Path, conditions: Conditions, ordinary: Ordinary) -> Blimp:
    """Runs BLiMP under every condition. Raises UserError."""
    pairs = probes.minimal_pairs(prepared(folder, "blimp", "blimp.jsonl"), PAIRS)
    return probes.blimp(subject, reader, pairs, outcomes.on_texts(subject, conditions, True, ordinary))


def linear(subject: Subject, reader: Reader, folder: Path, conditions: Conditions, ordinary: Ordinary) -> Linear:
    """Runs linear probes on UD English EWT under every condition. Raises UserError."""
    train, test = (probes.sentences(prepared(folder, "ud_ewt", f"{s}.conllu"), n) for s, n in SENTENCES.items())
    return probes.linear(subject, reader, train, test, outcomes.on_texts(subject, conditions, False, ordinary))


def choices(subject: Subject, reader: Reader, path: Path, conditions: Conditions, ordinary: Ordinary) -> Choices:
    """Runs multiple choice under every condition. Raises UserError."""
    return multiple_choice(subject, reader, questions(path), outcomes.on_texts(subject, conditions, True, ordinary))


PROBES: dict[str, Callable[[Subject, Reader, Path, Conditions, Ordinary], Blimp | Linear | Choices]] = {
    "blimp": blimp,
    "linear": linear,
    "choices": choices,
}


def run_probes(
    subject: Subject,
    reader: Reader,
    files: Mapping[str, Path],
    entries: list[Entry],
    conditions: Conditions,
    ordinary: Ordinary,
) -> Probes:
    """Runs the probes that `files` names under every condition that changed something."""
    conditions = {"none": interventions.nothing} | dict(conditions)
    conditions = {name: conditions[name] for name in changed_conditions(entries)}
    results: dict[str, Any] = {}
    for name, path in files.items():
        try:
            results[name] = PROBES[name](subject, reader, path, conditions, ordinary)
        except UserError as error:
            results[name] = Unavailable(reason=str(error))
    return Probes(**results)


def prepared(folder: Path, dataset: str, file: str) -> Path:
    """Returns the path of a prepared file. Raises UserError naming the command that prepares it."""
    path = folder / dataset / file
    if not path.is_file():
        raise UserError(f"{dataset} is not prepared: in a clone, python data/{dataset}/prepare.py")
    return path
