"""Turns the findings of an ablation into answers in words, and into tables."""

from collections.abc import Callable, Iterable
from typing import Any

from ..edit import findings
from ..edit.findings import Ablation, Cause, Effect, Entry, Unavailable
from ..measure.findings import Interval
from .text import Table, format_interval, number, with_interval


def _format_effect(effect: Effect) -> str:
    """Returns a change of the loss or of the output states with its interval, such as '34.1% [32.0%, 36.3%]'."""
    form = ".1%" if effect.output else "+.4f"
    return with_interval(*effect.change, form)


def _in_words(name: str) -> str:
    return name.replace("_", " ")


def _with_controls(entry: Entry) -> str:
    """Returns what an intervention and its controls do to the loss, or to the output states, in words."""
    controls = "; ".join(f"{_in_words(one.name)} {_format_effect(one)}" for one in entry.controls_that_edited)
    change = _format_effect(entry)
    words = f"moves the output states by {change}" if entry.output else f"changes the loss by {change} nats per token"
    return words + (f" (controls: {controls})" if controls else "")


QUESTIONS = {
    "spike_zero": "What are the spikes for? Zeroing them {}.",
    "spike_scale": "Does the size of spikes matter? Scaling the tokens to the median norm {}.",
    "spike_direction": "Does the direction of spikes matter? Turning the tokens at equal norm {}.",
    "spike_mean": "Do the values of spikes matter? Setting each to its mean on other text {}.",
    "spike_constant": "Are spikes constants? Giving the tokens one constant state per layer {}.",
    "sink_mask": "What are the sinks for? Masking them {}.",
}


def answers(ablation: Ablation) -> list[str]:
    """Returns sentences: what spikes and sinks do, whether they need each other, where heads look without sinks."""
    entries = [entry for name in QUESTIONS for entry in ablation.entries if entry.name == name]
    lines = [QUESTIONS[entry.name].format(_with_controls(entry)) for entry in entries if entry.edited]
    kinds = dict.fromkeys(entry.kind for entry in entries if not entry.edited)
    lines += [f"The model has no {kind}s on this text." for kind in kinds]
    causes = [cause for cause in ablation.causes if cause.edited and cause.there]
    return [*lines, *map(cause_in_words, causes), *_disagreement(causes), *_short_range(ablation.attention)]


def cause_in_words(cause: Cause) -> str:
    """Returns an intervention's verdict on whether sinks need spikes, or spikes sinks, with its reason."""
    return f"Do {cause.asked} need {cause.removed}? By {cause.by}: {cause.verdict}, {cause.reason}."


def cause_tables(ablation: Ablation) -> list[tuple[str, Table | None]]:
    """Returns [(sentence, table)] with the numbers behind the verdicts on causes; nothing if none could be judged."""
    share = lambda part, form: with_interval(part.share, part.ci95, form)
    rows = []
    for one in (cause for cause in ablation.causes if cause.judged):
        judged = f"{one.judged:,} of {one.there:,}", f"{one.sequences:,}", f"{one.states:,}"
        ends = f"{one.left:,} of {one.judged:,}", f"{one.still:,} of {one.edited:,}"
        rows.append([f"{one.asked}, {one.by}: {one.verdict}", share(one.lost, "z.1%"), "", *judged, *ends])
        for control in one.control:
            lost = share(control.lost, "z.1%"), share(control.beyond, "+z.1%")
            rows.append([f"  control: {control.name}", *lost, *[""] * 5])
    words = (
        "How much of their attention do sinks lose, or spikes of their |h|? Only those downstream of the edit are "
        "judged. beyond it: how much more the edit takes than this control. states: how many different ones their "
        "tokens have; equal first tokens have one. removal failed: of what was edited; a spike counts if a tenth of "
        "its |h| is there afterwards. Smaller ones may come up again: spikes left, below, counts them too."
    )
    header = ["", "lost", "beyond it", "judged", "in sequences", "states", "still count", "removal failed"]
    return [(words, Table(header, rows))] if rows else []


def _disagreement(causes: list[Cause]) -> list[str]:
    """Returns a sentence if interventions give different answers about the very same sinks."""
    sinks = [one for one in causes if one.asked == "sinks" and one.verdict in ("yes", "partly", "no")]
    answers = {(one.judged, one.sequences, one.verdict) for one in sinks}
    differ = len(answers) > len({a[:2] for a in answers})
    return ["The answers about the same sinks differ, as the edits leave different states behind."] if differ else []


def _short_range(attention: findings.AttentionChange) -> list[str]:
    if not attention.sequences:
        return []
    changes = ("entropy", "nats", attention.entropy), ("mean distance", "tokens", attention.distance)
    parts = [
        f"the {kind} goes from {number(maps.with_sink, '.2f')} to {number(maps.without_sink, '.2f')} {unit} (change "
        f"{with_interval(maps.change, maps.ci95, '+.2f')}; without as many random keys "
        f"{number(maps.control.change, '+.2f')})"
        for kind, unit, maps in changes
    ]
    return [f"Where do heads look without their sinks? Of the attention in heads with sinks, {', '.join(parts)}."]


def _quantised(int8: dict[str, findings.Int8] | Unavailable) -> tuple[str, Table | None]:
    """Returns what 8 and 4 bits cost, in a table with a row for each way of sharing scales."""
    if isinstance(int8, Unavailable):
        return f"Not quantised: {int8.reason}.", None
    rows = []
    for name, scheme in int8.items():
        activations = f"{scheme.activation_bits} bits, {scheme.activations}" if scheme.activation_bits else "float"
        changes = (scheme, scheme.weights_only, scheme.activations_only)
        costs = [with_interval(c.delta_loss, c.ci95, "+.4f") if c else "–" for c in changes]
        rows.append([_in_words(name), f"{scheme.weight_bits} bits, {scheme.weights}", activations, *costs])
    header = ["int8 and int4", "weights", "activations", "delta loss", "weights alone", "activations alone"]
    words = "What do 8 and 4 bits cost? In nats per token. Static scales round the residual stream too."
    return words, Table(header, rows)


def _effects(ablation: Ablation) -> Iterable[tuple[str, Effect, str]]:
    """Yields (label, effect, dose) of each intervention, followed by its controls if it edited something. The dose of a
    control is in units of its intervention's; interventions have none."""
    for entry in ablation.entries:
        yield entry.name, entry, ""
        for control in entry.control if entry.edited else ():
            dose = number(control.dose / entry.dose, ".3g") if control.dose and entry.dose else "–"
            yield f"  control: {control.name}", control, f"x{dose}" if dose != "–" else dose


def intervention_table(ablation: Ablation) -> Table:
    """Returns a table with a row per intervention, each followed by its controls."""
    level = lambda e: [f"{e.loss:.4f}", f"{e.ppl:.3f}", number(e.bits_per_byte, ".4f")]
    change = lambda e: [f"{e.delta_loss:+.4f}", format_interval(e.ci95, "+.4f")]
    header, rows = ["loss", "ppl", "bits/byte", "delta loss", "95% interval"], []
    if ablation.has_loss:
        rows.append(["none (baseline)", "", "", *level(ablation.baseline), *[""] * 4])
    else:
        header, level = ["output moves", "95% interval", "pooled: 1 - cos"], lambda e: []
        change = lambda e: [
            *(f"{e.output.change:.1%}", format_interval(e.output.ci95, ".1%")),
            with_interval(e.output.pooled, e.output.pooled_ci95, "z.3f"),
        ]
    for label, effect, dose in _effects(ablation):
        shares = [number(part.same, ".0%") for part in (effect.spikes_left, effect.sinks_left)]
        cells = [*change(effect), *shares] if effect.edited else ["nothing to edit", *[""] * (len(change(effect)) + 1)]
        rows.append([label, f"{effect.edited:,}", dose, *level(effect), *cells])
    return Table(["intervention", "edited", "dose", *header, "spikes left", "sinks left"], rows)


def class_table(ablation: Ablation) -> Table:
    """Returns how the loss changes when the model predicts at tokens of each class, or how far their outputs move."""
    classes = ablation.baseline.by_class
    header = ["intervention", *(f"at {name} ({loss.tokens:,})" for name, loss in classes.items())]
    edited = [entry for entry in ablation.entries if entry.edited]
    if not ablation.has_loss:
        moved = ([number(x, ".1%") for x in e.output.by_class.values()] for e in edited if e.output)
        return Table(header, [[entry.name, *cells] for entry, cells in zip(edited, moved, strict=True)])

    cell = lambda change: with_interval(change.delta_loss, change.ci95, "+.4f")
    rows = [["none (the loss itself)", *(number(loss.loss, ".4f") for loss in classes.values())]]
    rows += [[entry.name, *map(cell, entry.by_class.values())] for entry in edited]
    return Table(header, rows)


def probe_tables(ablation: Ablation) -> list[tuple[str, Table | None]]:
    """Returns [(sentence, table)] of quantisation and the probes. For a probe that was not run, the sentence says why,
    and there is no table."""
    makers: dict[type, Callable[[Any], tuple[str, Table | None]]] = {
        Unavailable: lambda probe: (f"Not probed: {probe.reason}.", None),
        findings.Blimp: _blimp_table,
        findings.Linear: _linear_table,
        findings.Choices: _choices_table,
    }
    probes = ablation.probes.blimp, ablation.probes.linear, ablation.probes.choices
    return [_quantised(ablation.int8), *(makers[type(probe)](probe) for probe in probes if probe is not None)]


def samples_in_words(samples: findings.Samples) -> str:
    """Returns what an intervention did to the samples of a model; the numbers are means over the samples."""
    if not samples.edited or not samples.n_edited:
        return f"{samples.edit} had nothing to edit. {samples.reference} served as ordinary text, to compare with."
    pairs = [*zip(samples.clean, samples.edited, strict=True)]
    mean = lambda values: sum(values) / len(pairs)
    matches = ([a == b for a, b in zip(clean.ids, edited.ids, strict=True)] for clean, edited in pairs)
    same = mean([*match, False].index(False) for match in matches)
    loss = [mean(sample.loss for sample in side) for side in (samples.clean, samples.edited)]
    repeated = [mean(sample.repeated for sample in side) for side in (samples.clean, samples.edited)]
    return (
        f"Under {samples.edit} the first {same:g} of {len(samples.clean[0].ids)} tokens are the same. The clean "
        f"model's loss is {loss[0]:.2f} nats per token on its own text, {loss[1]:.2f} on the edited model's. Of "
        f"runs of four tokens {repeated[0]:.0%} repeat an earlier one in the clean text, {repeated[1]:.0%} in the "
        f"edited one. {samples.reference} served as ordinary text, to compare with and to take means from."
    )


def _label(name: str) -> str:
    """Returns a condition's name as a table shows it: a control stands below its intervention."""
    return f"  control: {name.split('/')[1]}" if "/" in name else name


def _starred(change: float, ci: Interval | None) -> str:
    """Returns a change, with a star if its interval excludes 0."""
    return f"{change:+.1%}" + ("*" if ci and (ci[0] > 0 or ci[1] < 0) else "")


STARS = "* the 95% interval excludes 0, which happens to one in twenty by chance"


def _blimp_table(probe: findings.Blimp) -> tuple[str, Table]:
    """Returns the accuracy on BLiMP, in total and by field: first of the clean model, then the changes."""
    clean, *others = probe.conditions
    first = [clean.name, f"{clean.accuracy:.1%}", format_interval(clean.ci95, ".1%"), "", ""]
    rows = [first + [f"{part.accuracy:.1%}" for part in clean.by_field.values()]]
    for row in others:
        change = [f"{row.change:+.1%}", format_interval(row.change_ci95, "+.1%")]
        cells = [_starred(row.by_field[name].change, row.by_field[name].change_ci95) for name in clean.by_field]
        rows.append([_label(row.name), f"{row.accuracy:.1%}", format_interval(row.ci95, ".1%"), *change, *cells])
    omitted = f" ({probe.left_out} were too long)" if probe.left_out else ""
    header = ["BLiMP under", "accuracy", "95% interval", "change", "95% interval", *clean.by_field]
    return (
        f"Grammar: BLiMP, {probe.pairs} minimal pairs{omitted}; {probe.normalisation}. Chance is 50%. The first row is "
        "the clean model; below it, the columns by field show changes. Semantics: quantifiers and negative polarity "
        f"items. {STARS}.",
        Table(header, rows),
    )


def _choices_table(probe: findings.Choices) -> tuple[str, Table]:
    """Returns acc and acc_norm on multiple choice, each with its change against the clean model."""
    rows = []
    for row in probe.conditions:
        rows.append([_label(row.name)])
        for part in (row, row.normalised):
            change = [f"{part.change:+.1%}", format_interval(part.change_ci95, "+.1%")] if len(rows) > 1 else ["", ""]
            rows[-1] += [f"{part.accuracy:.1%}", format_interval(part.ci95, ".1%"), *change]
    columns = ["95% interval", "change", "95% interval"]
    return (
        f"Multiple choice: {probe.questions} questions; {probe.left_out} were too long, and {probe.cropped} lost the "
        "start of their context. As in lm-evaluation-harness, acc takes the ending with the largest log p, acc_norm "
        f"the one with the largest log p per character. Chance is {probe.chance:.0%}.",
        Table(["choices under", "acc", *columns, "acc_norm", *columns], rows),
    )


def _linear_table(probe: findings.Linear) -> tuple[str, Table]:
    """Returns accuracy and selectivity of linear probes on the last tap: of the clean model, then their changes."""
    clean, *others = probe.conditions
    header, first = ["linear probe under"], [clean.name]
    for task, taps in clean.tasks.items():
        header += [f"{task}: accuracy", "selectivity", "95% interval"]
        tap = taps[-1]
        first += [f"{tap.accuracy:.1%}", f"{tap.selectivity:.1%}", format_interval(tap.selectivity_ci95, ".1%")]
    rows = [first]
    for row in others:
        rows.append([_label(row.name)])
        for tap in (taps[-1] for taps in row.tasks.values()):
            rows[-1] += [_starred(tap.accuracy_change, tap.accuracy_change_ci95)]
            rows[-1] += [_starred(tap.change, tap.change_ci95), format_interval(tap.change_ci95, "+.1%")]
    last = next(iter(clean.tasks.values()))[-1]
    omitted = f" ({probe.left_out} words were left out)" if probe.left_out else ""
    majority = ", ".join(f"{task} {value:.1%}" for task, value in probe.majority.items())
    return (
        f"What linear probes can read from the states after {last.name}: UD English EWT, {probe.words.test} test "
        f"words{omitted}. The most common answer alone would reach: {majority}. Selectivity: accuracy minus that of a "
        f"control task (Hewitt and Liang 2019). The first row is the clean model, the others are changes. {STARS}.",
        Table(header, rows),
    )
