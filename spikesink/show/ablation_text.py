"""Ablation findings -> answers in words, and tables."""

from collections.abc import Callable, Iterable
from typing import Any

from ..edit.findings import (
    Ablation,
    AttentionChange,
    Blimp,
    Cause,
    Choices,
    ClassChange,
    Effect,
    Entry,
    Int8,
    Linear,
    LossChange,
    RemainingShare,
    Samples,
    Unavailable,
)
from ..measure.findings import Interval
from .text import interval, number

NOTHING = "nothing to edit"
Table = tuple[list[str], list[list[str]]]  # (header, rows)


def _cost(change: LossChange) -> str:
    """'+0.0409 [+0.0336, +0.0486]'."""
    return f"{change.delta_loss:+.4f} {interval(change.ci95, '+.4f')}".strip()


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _beside(entry: Entry) -> str:
    """An effect beside its controls, in words."""
    words = "; ".join(f"{_spoken(control.name)} {_cost(control)}" for control in entry.controls_that_edited)
    return f"{_cost(entry)} nats per token" + (f" (controls: {words})" if words else "")


QUESTIONS = {
    "spike_zero": "What are the spikes for? Zeroing them changes the loss by {}.",
    "spike_scale": "Is it their size? Scaling spike tokens to the median norm changes it by {}.",
    "spike_direction": "Is it their direction? States as large that point elsewhere change it by {}.",
    "spike_mean": "Does their value matter? Setting each to its mean on other text changes it by {}.",
    "spike_constant": "Are spike tokens constants? Giving them one constant state per layer changes it by {}.",
    "sink_mask": "What are the sinks for? Masking them changes the loss by {}.",
}


def answers(found: Ablation) -> list[str]:
    """What spikes do, what sinks do, whether one needs the other, whether sinks make attention short-ranged."""
    by_name = {entry.name: entry for entry in found.entries}
    asked = [by_name[name] for name in QUESTIONS if name in by_name]
    lines = [QUESTIONS[entry.name].format(_beside(entry)) for entry in asked if entry.edited]
    kinds = dict.fromkeys(entry.kind for entry in asked if not entry.edited)
    lines += [f"The model has no {kind}s on this text." for kind in kinds]
    causes = [cause for cause in found.causes if cause.edited and cause.there]
    return [*lines, *map(cause_in_words, causes), *_disagreement(causes), *_short_range(found.attention)]


def cause_in_words(cause: Cause) -> str:
    """Does one need the other, by one intervention? The verdict, its reason, and the numbers."""
    start = f"Do {cause.asked} need {cause.removed}? By {cause.by}: {cause.verdict}, {cause.reason}."
    if not cause.judged or cause.lost.share is None:
        return start
    share, ci95 = cause.lost.share, cause.lost.ci95
    gain = share < 0 and (ci95 is None or ci95[1] < 0)
    shown = f"{-share:z.0%} {interval(ci95 and [-ci95[1], -ci95[0]], 'z.0%')}" if gain else None
    shown = shown or f"{share:z.0%} {interval(ci95, 'z.0%')}"
    what = {"sinks": "attention", "spikes": "|h|"}[cause.asked]
    controls = ", ".join(f"{_spoken(control.name)} {number(control.lost.share, 'z.0%')}" for control in cause.control)
    states = "one state" if cause.states == 1 else f"{cause.states:,} states"
    return (
        f"{start} {cause.judged:,} of {cause.there:,} {cause.asked} lie downstream, on {states} in {cause.sequences} "
        f"sequences. They {'gain' if gain else 'lose'} {shown} of their {what}"
        f"{f' (lost under controls: {controls})' if controls else ''}; by the rule {cause.left:,} are left. Of "
        f"{cause.edited:,} removed {cause.removed} {cause.still:,} are still there."
    )


def _disagreement(causes: list[Cause]) -> list[str]:
    """A sentence where interventions give different answers on the very same sinks."""
    answers: dict[tuple[int, int], set[str]] = {}
    for cause in causes:
        if cause.asked == "sinks" and cause.verdict in ("yes", "partly", "no"):
            answers.setdefault((cause.judged, cause.sequences), set()).add(cause.verdict)
    differ = any(len(verdicts) > 1 for verdicts in answers.values())
    words = (
        "The answers on the same sinks differ by intervention: what an edit leaves of the state decides, not the spike"
    )
    return [f"{words} alone."] if differ else []


def _short_range(attention: AttentionChange) -> list[str]:
    if not attention.sequences:
        return []
    parts = [
        f"{kind} {number(of.with_sink, '.2f')} -> {number(of.without_sink, '.2f')} {unit} (change "
        f"{number(of.change, '+.2f')} {interval(of.ci95, '+.2f')}; random keys {number(of.control.change, '+.2f')})"
        for kind, unit, of in (
            ("entropy", "nats", attention.entropy),
            ("mean distance", "tokens", attention.distance),
        )
    ]
    return [f"What do heads look at without their sink keys? In heads that have sinks: {', '.join(parts)}."]


def _quantised(int8: dict[str, Int8] | Unavailable) -> tuple[str, Table | None]:
    """What 8 and 4 bits cost: a row for each way of sharing scales."""
    if isinstance(int8, Unavailable):
        return f"Does int8 break it? Not tried: {int8.reason}.", None
    table = []
    for name, of in int8.items():
        read = f"{of.activation_bits} bits, {of.activations}" if of.activation_bits else "float"
        costs = [_cost(change) if change else "–" for change in (of, of.weights_only, of.activations_only)]
        table.append([_spoken(name), f"{of.weight_bits} bits, {of.weights}", read, *costs])
    header = ["int8 and int4", "weights", "activations", "delta loss", "of weights alone", "of activations alone"]
    return "What do 8 and 4 bits cost? Nats per token; with static scales the stream is rounded too.", (header, table)


def _labelled(found: Ablation) -> Iterable[tuple[str, Effect, str]]:
    """(label, effect, a control's dose as a part of its intervention's) of every intervention, each followed by its
    controls if it edited something."""
    for entry in found.entries:
        yield entry.name, entry, ""
        for control in entry.control if entry.edited else ():
            dose = number(control.dose / entry.dose, ".3g") if control.dose and entry.dose else "–"
            yield f"  control: {control.name}", control, f"x{dose}" if dose != "–" else dose


def rows(found: Ablation) -> Table:
    """(header, rows) of the interventions, each followed by its controls."""
    header = [
        "intervention",
        "edited",
        "dose",
        "loss",
        "ppl",
        "bits/byte",
        "delta loss",
        "95% interval",
        "spikes left",
        "sinks left",
    ]
    base = found.baseline
    share: Callable[[RemainingShare], str] = lambda left: number(left.same, ".0%")
    table = [
        ["none (baseline)", "", "", f"{base.loss:.4f}", f"{base.ppl:.3f}", number(base.bits_per_byte, ".4f"), *[""] * 4]
    ]
    for label, effect, dose in _labelled(found):
        what = [NOTHING, "", "", ""]
        if effect.edited:
            what = [f"{effect.delta_loss:+.4f}", interval(effect.ci95, "+.4f")]
            what += [share(effect.spikes_left), share(effect.sinks_left)]
        loss = [f"{effect.loss:.4f}", f"{effect.ppl:.3f}", number(effect.bits_per_byte, ".4f")]
        table.append([label, f"{effect.edited:,}", dose, *loss, *what])
    return header, table


def class_rows(found: Ablation) -> Table:
    """(header, rows): the change of the loss of predictions made at each class of tokens."""
    classes = found.baseline.by_class
    header = ["intervention", *(f"at {name} ({of.tokens:,})" for name, of in classes.items())]

    def cell(of: ClassChange) -> str:
        return "–" if of.delta_loss is None else f"{of.delta_loss:+.4f} {interval(of.ci95, '+.3f')}"

    table = [["loss, clean", *(number(of.loss, ".4f") for of in classes.values())]]
    table += [[entry.name, *map(cell, entry.by_class.values())] for entry in found.entries if entry.edited]
    return header, table


def probe_tables(found: Ablation) -> list[tuple[str, Table | None]]:
    """[(sentence, (header, rows))] of int8 and the probes; no table for one that was not run, but the reason."""
    make: dict[type, Callable[[Any], tuple[str, Table | None]]] = {
        Unavailable: lambda of: (f"Not probed: {of.reason}.", None),
        Blimp: _blimp_table,
        Linear: _linear_table,
        Choices: _choices_table,
    }
    of_probes = found.probes.blimp, found.probes.linear, found.probes.choices
    probes = [make[type(of)](of) for of in of_probes if of is not None]
    return [_quantised(found.int8), *probes]


def what_broke(found: Samples) -> str:
    """What an intervention did to the samples of a model, means over them."""
    if not found.edited or not found.n_edited:
        return f"{found.edit} found nothing to edit. What is usual is from {found.reference}."
    pairs = [*zip(found.clean, found.edited, strict=True)]
    mean = lambda values: sum(values) / len(pairs)
    alike = ([a == b for a, b in zip(one.ids, other.ids, strict=True)] for one, other in pairs)
    same = mean([*of, False].index(False) for of in alike)
    loss = [mean(one.loss for one in side) for side in (found.clean, found.edited)]
    repeated = [mean(one.repeated for one in side) for side in (found.clean, found.edited)]
    return (
        f"Under {found.edit} the first {same:g} of {len(found.clean[0].ids)} tokens are the same. The clean model's "
        f"loss is {loss[0]:.2f} nats per token on its own text, {loss[1]:.2f} on the edited model's. Of runs of four "
        f"tokens {repeated[0]:.0%} repeat an earlier one in the clean text, {repeated[1]:.0%} in the edited one. What "
        f"is usual, and any means, are from {found.reference}."
    )


def _label(name: str) -> str:
    """A condition's name in a table: a control stands below its intervention."""
    return f"  control: {name.split('/')[1]}" if "/" in name else name


def _starred(change: float, ci: Interval | None) -> str:
    """A change, with a star if its interval leaves out 0."""
    return f"{change:+.1%}" + ("*" if ci and (ci[0] > 0 or ci[1] < 0) else "")


STARS = "* the 95% interval leaves out 0, which one in twenty does by chance"


def _blimp_table(of: Blimp) -> tuple[str, Table]:
    """BLiMP: accuracy in all, then by field: first the clean model's, then changes."""
    clean, *others = of.conditions
    table = [
        [
            clean.name,
            f"{clean.accuracy:.1%}",
            interval(clean.ci95, ".1%"),
            *("", ""),
            *(f"{part.accuracy:.1%}" for part in clean.by_field.values()),
        ]
    ]
    for row in others:
        changed = [f"{row.change:+.1%}", interval(row.change_ci95, "+.1%")]
        cells = [_starred(row.by_field[name].change, row.by_field[name].change_ci95) for name in clean.by_field]
        table.append([_label(row.name), f"{row.accuracy:.1%}", interval(row.ci95, ".1%"), *changed, *cells])
    left_out = f", {of.left_out} left out as too long" if of.left_out else ""
    return (
        f"Grammar: BLiMP, {of.pairs} minimal pairs{left_out}; {of.normalisation}. Chance is 50%. By field: the "
        f"accuracy of the clean model, then changes; semantics holds quantifiers and NPIs. {STARS}.",
        (["BLiMP under", "accuracy", "95% interval", "change", "95% interval", *clean.by_field], table),
    )


def _choices_table(of: Choices) -> tuple[str, Table]:
    """Multiple choice: acc and acc_norm, each with its change against the clean model."""
    table = []
    for row in of.conditions:
        table.append([_label(row.name)])
        for part in (row, row.normalised):
            changed = [f"{part.change:+.1%}", interval(part.change_ci95, "+.1%")] if len(table) > 1 else ["", ""]
            table[-1] += [f"{part.accuracy:.1%}", interval(part.ci95, ".1%"), *changed]
    columns = ["95% interval", "change", "95% interval"]
    return (
        f"Multiple choice: {of.questions} questions, {of.left_out} left out as too long, {of.cropped} without the "
        "start of the context. As in lm-evaluation-harness, acc takes the ending of the largest log p, acc_norm "
        f"that of the largest log p per character. Chance is {of.chance:.0%}.",
        (["choices under", "acc", *columns, "acc_norm", *columns], table),
    )


def _linear_table(of: Linear) -> tuple[str, Table]:
    """Linear probes on the last tap: the clean model's accuracy and selectivity, then changes of both."""
    clean, *others = of.conditions
    header, first = ["linear probe under"], [clean.name]
    for task, taps in clean.tasks.items():
        header += [f"{task}: accuracy", "selectivity", "95% interval"]
        tap = taps[-1]
        first += [f"{tap.accuracy:.1%}", f"{tap.selectivity:.1%}", interval(tap.selectivity_ci95, ".1%")]
    table = [first]
    for row in others:
        table.append([_label(row.name)])
        for tap in (taps[-1] for taps in row.tasks.values()):
            table[-1] += [_starred(tap.accuracy_change, tap.accuracy_change_ci95)]
            table[-1] += [_starred(tap.change, tap.change_ci95), interval(tap.change_ci95, "+.1%")]
    last = next(iter(clean.tasks.values()))[-1]
    left_out = f", {of.left_out} of all words left out" if of.left_out else ""
    majority = ", ".join(f"{task} {value:.1%}" for task, value in of.majority.items())
    return (
        f"What can be read off the states after {last.name}: linear probes on UD English EWT, "
        f"{of.words.test} test words{left_out}; the commonest answer alone: {majority}. Selectivity: accuracy minus "
        f"that of a control task (Hewitt and Liang 2019). First the clean model, then changes. {STARS}.",
        (header, table),
    )
