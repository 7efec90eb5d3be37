"""Findings -> words and tables for a terminal; pages and figures, which need more packages, are made by page.py."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TypeVar

from ..edit.findings import Ablation
from ..measure import history
from ..measure.calibrate import rules
from ..measure.findings import (
    Anatomy,
    CheckpointEntry,
    CoOccurrence,
    DataEntry,
    Episode,
    Findings,
    HistoryRow,
    KeyDimensions,
    Measures,
    Overlap,
    PromptFindings,
    SideStats,
    SinkFindings,
    Skipped,
    Vocabulary,
)
from ..measure.rules import BEST_HEAD, Rule
from ..measure.sinks import HEAD_SHARE, PRIMARY_SINK_EPSILON, PRIMARY_SINK_RULE, SINK_RULES, needed_heads
from ..measure.spikes import PRIMARY_SPIKE_RULE, SPIKE_RULES
from . import ablation_text
from .text import Column, Table, grid, interval, number, table, turned, visible

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------- in words


def conditions(checkpoint: CheckpointEntry, data: DataEntry, nats: bool = True) -> str:
    """Under what conditions every number of findings was measured; without `nats`, the loss in bits per byte alone."""
    digest = (checkpoint.sha256 or "unknown")[:12]
    ragged = "up to " if data.tokens < data.n_seq * data.seq_len else ""
    step = "" if checkpoint.step is None else f"step {checkpoint.step}, "
    start = "each starting with BOS" if data.bos else "no BOS"
    if data.n_register:
        start += f", after {data.n_register} registers (positions count from the first register)"
    losses = [f"{data.loss:.3f} nats per token"] if nats else []
    if data.bits_per_byte is not None:
        losses.append(f"{data.bits_per_byte:.3f} bits per byte")
    elif data.predicted_bytes == 0:
        losses.append("no bits per byte, as the text of its tokens is not at hand")
    loss = f"loss {', '.join(losses)}" + ("" if data.loss_of == "the next token" else f" (of {data.loss_of})")
    if math.isnan(data.loss):
        loss = "no language-model head: no loss"
    return (
        f"{data.n_seq} sequences of {ragged}{data.seq_len} tokens of {data.name}, {start}, {data.dtype}; "
        f"{step}sha256 {digest}; {loss}"
    )


def verdict_lines(findings: Findings) -> list[str]:
    """A line per phenomenon: present, absent or underpowered, and why."""
    return [f"{name}: {of.verdict.upper()}. {of.reason}." for name, of in findings.verdicts.by_name.items()]


def summary(findings: Findings) -> list[str]:
    """What was found, a sentence each for spikes, sinks and co-occurrence, with the numbers."""
    sinks = findings.sinks
    gu = sinks.at(PRIMARY_SINK_EPSILON)
    best = gu.best_eligible
    strongest = f"is position {best.position}, {best.rate:.1%}" if best else "is none: no key has as many"
    return [
        _spike_sentences(findings),
        f"Sinks: Gu et al.'s Sink_1 at epsilon {gu.epsilon} is {gu.first:.1%} {interval(gu.first_ci95, '.1%')} of "
        f"heads; the strongest key with at least T/4 queries {strongest}. Position 0 holds "
        f"{sinks.share[0]:.1%} of all attention; {sinks.share_uniform[0]:.1%} if every query spread it evenly over "
        f"all that it may see. A token is called a sink if it is one in at least {sinks.heads_needed} of the "
        f"{sum(map(len, sinks.alpha_first))} heads." + _windows(sinks),
        _overlap_sentence(findings.co_occurrence),
    ]


def _spike_sentences(findings: Findings) -> str:
    spikes, top = findings.spikes, findings.spikes.tokens[0]
    here, layer = spikes.sum, findings.layers[top.index]
    usual = layer.usual.layer  # 0 where most of the stream is
    lines = [
        f"Spikes: {here.tokens} tokens ({here.fraction:.2%}) are spikes, in {here.sequences:.0%} of sequences; they "
        f"are {here.states} different {'state' if here.states == 1 else 'states'}.",
        f"The rule: {spikes.primary_rule.threshold}.",
        f"The strongest is {visible(top.text)} at position {top.position}: |h| {top.magnitude:.4g} in channel "
        f"{top.channel} after {layer.name}, {number(top.magnitude / usual if usual else None, '.0f')} x the median "
        f"there and {top.strength:.1f} x the threshold, with {number(top.energy_share, '.0%')} of the token's energy "
        f"and {number(top.norm_ratio)} x a typical token's norm.",
    ]
    if here.in_embedding:
        lines.append(
            f"{here.in_embedding:.0%} of them are spikes in the embedding already: there a spike is a parameter."
        )
    if spikes.read:
        read = spikes.read
        lines.append(
            f"Behind the norms, as sub-layers read the stream, {read.tokens} tokens ({read.fraction:.2%}) are, in "
            f"{read.sequences:.0%} of sequences."
        )
    if here.last is not None:
        lines.append(f"At the last tap, which no attention reads, {here.last:.2%} of tokens are.")
    outliers = ", ".join(
        f"{of.channel} ({of.ratio:.0f}x, {of.layers:.0%} of layers)" for of in spikes.outlier_channels[:5]
    )
    if outliers:
        lines.append(f"Outlier channels, large in nearly every token and so no spikes: {outliers}.")
    lines.append(f"The absolute rule of Sun et al. marks {spikes.rules['massive'].tokens} tokens.")
    return " ".join(lines)


def _windows(sinks: SinkFindings) -> str:
    """Which layers cannot have a sink."""
    names = [seam.name for seam, possible in zip(sinks.seams, sinks.possible, strict=True) if not possible]
    return (
        f" In {', '.join(names)} the window is too short for a sink: fewer than T/4 queries see a key." if names else ""
    )


def _overlap_sentence(both: CoOccurrence) -> str:
    if not (both.spike_tokens and both.sink_tokens):
        return (
            f"Co-occurrence: undefined, with {both.spike_tokens} spike tokens and {both.sink_tokens} sink tokens "
            "by these rules."
        )
    ci = both.ci95
    if both.by_construction:
        return (
            f"Co-occurrence: P(sink | spike) {both.p_sink_given_spike:.0%}, P(spike | sink) "
            f"{both.p_spike_given_sink:.0%}; the spikes or the sinks are one state, the same in every sequence, so "
            "this is one observation, and that position explains it is so by construction. "
            + _without_first(both.without_first)
        )
    return (
        f"Co-occurrence: P(sink | spike) {both.p_sink_given_spike:.0%} {interval(ci.p_sink_given_spike, '.0%')}, "
        f"P(spike | sink) {both.p_spike_given_sink:.0%} {interval(ci.p_spike_given_sink, '.0%')}, lift over what "
        f"position alone explains {' '.join((number(both.lift, '.2f'), interval(ci.lift, '.2f'))).strip()}, p "
        f"{both.p_permutation:.3g}. {_without_first(both.without_first)}"
    )


def _without_first(rest: Overlap) -> str:
    if not (rest.spike_tokens and rest.sink_tokens):
        return f"Without position 0: {rest.spike_tokens} spike tokens, {rest.sink_tokens} sink tokens."
    return (
        f"Without position 0: P(sink | spike) {rest.p_sink_given_spike:.0%}, "
        f"lift {number(rest.lift, '.2f')}, p {rest.p_permutation:.3g}."
    )


def anatomy_lines(of: Anatomy | None) -> list[str]:
    """How the spike is made, and what the sinks' keys look like, in sentences."""
    if of is None:
        return []
    up, down = of.step_up, of.step_down
    lines = [
        f"Anatomy ({of.of}: {of.tokens} in {of.n_seq} sequences, {of.distinct_tokens} distinct). Step-up "
        f"at {up.name} for {up.tokens:.0%} of them ({up.part_of_peak:.0%} of the peak); "
        + (
            f"step-down at {down.name} for {down.tokens:.0%} ({down.part_of_peak:+.0%} of the peak)."
            if down
            else "no step-down (none loses a tenth of its peak)."
        ),
        "Shared channels: "
        + ", ".join(
            f"{c.channel} ({c.value:+.4g}, {c.ratio:+.2f} +- {c.ratio_std:.2f} of the first)" for c in of.channels[:4]
        )
        + ".",
    ]
    if of.episodes:
        lines.append("Episodes: " + "; ".join(map(_episode, of.episodes)) + ".")
    cosines = [(row.spikes, row) for row in of.normed_cosine if row.spikes is not None]
    if cosines:
        cosine, most = max(cosines, key=lambda pair: pair[0])
        lines.append(
            f"Normalised, these tokens are most alike at the input of {most.name}: mean cosine "
            f"{cosine:.2f}, {number(most.others, '.2f')} between other tokens."
        )
    heads = [head for row in of.key_subspace for head in row.heads if head.dims95]
    return lines + ([_key_sentence(heads)] if heads else []) + _form_lines(of)


def _episode(of: Episode) -> str:
    return (
        f"{of.start.name} to {of.end.name} ({of.tokens:.0%} of the spike tokens; |h| {of.magnitude:.4g} at its "
        f"largest, {of.ratio:.0f} x the median, most often in channel {of.channel})"
    )


def _key_sentence(heads: list[KeyDimensions]) -> str:
    mean = lambda counts: sum(count or 0 for count in counts) / len(heads)
    return (
        f"Sink keys: 95% of their energy in {mean(head.dims95 for head in heads):.1f} dimensions on average over "
        f"{len(heads)} heads, {mean(head.others_dims95 for head in heads):.1f} for as many other keys."
    )


def _form_lines(of: Anatomy) -> list[str]:
    form = of.quadratic_form
    if form is None:
        return []
    listed = lambda channels: ", ".join(f"{c.channel} ({c.norm:.2f}x, {c.dominance:.2f})" for c in channels)
    return [
        f"Quadratic form of ffn {form.layer} (norm over the median channel's, part held by one direction): "
        f"shared channels {listed(form.channels)}; random channels {listed(form.others)}."
    ]


# ------------------------------------------------------------------------------------------------ tables

Sides = tuple[SideStats, SideStats | None]  # a tap's sum, and what is read of it
_of_sum = lambda key: lambda sides: attrgetter(key)(sides[0])
_of_read = lambda key: lambda sides: None if sides[1] is None else attrgetter(key)(sides[1])
LAYER = (
    Column("after", _of_sum("name")),
    Column("top1", _of_sum("top1"), ".4g"),
    Column("median", _of_sum("median"), ".4g"),
    Column("top1/median", _of_sum("ratio"), ".1f"),
    Column("kurtosis", _of_sum("kurtosis")),
    Column("max", _of_sum("max"), ".4g"),
    Column("spike tokens", _of_sum("spike_tokens"), ".2%"),
    Column("outlier channels", lambda sides: len(sides[0].usual.outlier_channels), "d"),
    Column("as read: top1/median", _of_read("ratio"), ".1f"),
    Column("spike tokens", _of_read("spike_tokens"), ".2%"),
)
# title -> of the sinks, numbers by layer and head (L, H)
HEAD: dict[str, Callable[[SinkFindings], list[list[float]]]] = {
    f"Sink_1 ({PRIMARY_SINK_EPSILON})": lambda sinks: sinks.at(PRIMARY_SINK_EPSILON).by_head,
    "alpha_1": attrgetter("alpha_first"),
    "any sink": attrgetter("any_sink_by_head"),
    "argmax=1": attrgetter("first_argmax"),
    "|v_1|/mean": attrgetter("first_value_norm_ratio"),
    "|v_sink|/mean": attrgetter("sink_value_norm_ratio"),
    "to the slot": attrgetter("slot_share"),
    "entropy": attrgetter("entropy"),
    "distance": attrgetter("distance"),
    "without sinks": attrgetter("distance_without_sinks"),
}
LARGEST_TOKEN = (
    Column("strongest tokens", lambda token: visible(token.text)),
    Column("position", attrgetter("position"), "d"),
    Column("occurrences", attrgetter("occurrences"), "d"),
    Column("|h|", attrgetter("magnitude"), ".4g"),
    Column("x threshold", attrgetter("strength"), ".2f"),
    Column("channel", attrgetter("channel"), "d"),
    Column("energy there", attrgetter("energy_share"), ".0%"),
    Column("norm/typical", attrgetter("norm_ratio"), ".3g"),
    Column("layers", attrgetter("persistence"), ".0%"),
    Column("rules", lambda token: ", ".join(token.rules)),
)
HISTORY = (
    Column("step", attrgetter("step"), ","),
    *(Column(title, attrgetter(key), ".4g") for key, (title, _) in history.COLUMNS.items()),
)
VOCABULARY_TOKEN = (
    Column("token", lambda token: visible(token.text)),
    Column("id", attrgetter("id"), "d"),
    Column("|h|/median", attrgetter("ratio"), ".1f"),
    Column("x threshold", attrgetter("strength"), ".2f"),
    Column("channel", attrgetter("channel"), "d"),
    Column("after", attrgetter("place.name")),
)


def layer_table(findings: Findings) -> Table:
    """A row per tap of the residual stream: its sum, and behind the norm, as the next sub-layer reads it."""
    reads = {row.index: row for row in findings.reads}
    return table(LAYER, [(row, reads.get(row.index)) for row in findings.layers])


def head_table(findings: Findings, strongest: int | None = None) -> Table:
    """A row per head, in order; or so many rows, those with the most attention on the first key, first."""
    sinks = findings.sinks
    numbers = {title: of(sinks) for title, of in HEAD.items()}
    at = lambda by_head: lambda head: by_head[head[0]][head[1]]
    name = lambda head: f"{sinks.seams[head[0]].name.removeprefix('attn ')}.{head[1]}"
    heads = [(layer, head) for layer, row in enumerate(sinks.alpha_first) for head in range(len(row))]
    if strongest is not None:
        heads = sorted(heads, key=at(sinks.alpha_first), reverse=True)[:strongest]
    return table([Column("head", name), *(Column(title, at(by_head)) for title, by_head in numbers.items())], heads)


def null_table(findings: Findings) -> Table:
    """The model beside its nulls; percentages of tokens, but of sequences where it says so."""
    measured = lambda of: lambda row: "" if isinstance(row[1], Skipped) else of(row[1])
    rate = lambda name, key: measured(lambda measures: getattr(measures.rules[name], key))
    columns = [
        Column("measured on", _null_name),
        Column("sequences", measured(attrgetter("n_seq")), "d"),
        Column("largest |h|/median", measured(attrgetter("largest_ratio")), ".4g"),
        Column("kurtosis", measured(attrgetter("kurtosis"))),
    ]
    for name, rule in rules().items():
        if name in findings.measures.rules:
            columns.append(Column(rule.heading, rate(name, "tokens"), ".2%"))
            if rule.curve and rule.curve.best_head:
                columns.append(Column("best head, of sequences", rate(name, BEST_HEAD), ".2%"))
    columns.append(Column("loss", measured(attrgetter("loss")), ".3f"))
    return table(columns, {"this model": findings.measures, **findings.nulls}.items())


def _null_name(row: tuple[str, Measures | Skipped]) -> str:
    name, of = row
    return f"{name} (skipped: {of.skipped})" if isinstance(of, Skipped) else name.replace("_", " ")


def inner_table(of: Anatomy) -> Table:
    """The tensors off the stream, sub-layer by sub-layer."""
    by_name = {place: {row.name: row for row in rows} for place, rows in of.inner.items()}
    number_of = lambda place, key: lambda name: getattr(by_name[place][name], key) if name in by_name[place] else None
    columns = [Column("of", str)]
    for place in of.inner:
        columns.append(Column(f"{place} top1", number_of(place, "top1"), ".4g"))
        columns.append(Column(f"{place} top1/median", number_of(place, "ratio"), ".1f"))
    columns.append(Column("update kurtosis", number_of("update", "kurtosis")))
    return table(columns, by_name.get("update", ()))


def places_sentence(of: Anatomy) -> str:
    """What the columns of `inner_table` are, in words."""
    places = "; ".join(f"{place}: {text}" for place, text in of.places.items())
    return f"On the {of.n_seq} sequences that were dissected. {places}."


def history_table(rows: Iterable[HistoryRow]) -> Table:
    """What happened over training."""
    return table(HISTORY, rows)


# ----------------------------------------------------------------------------------------------- terminal


def by_part(parts: Sequence[tuple[str, T]], text: Callable[[T], str]) -> str:
    """The text of each part, under its name where there are several."""
    title = lambda name: f"== {name} ==\n\n" if len(parts) > 1 else ""
    return "\n\n".join(title(name) + text(of) for name, of in parts)


def terminal(findings: Findings) -> str:
    """The findings as text, part by part."""
    return by_part(findings.all_parts, _terminal_part)


def _terminal_part(findings: Findings, heads: int = 16) -> str:
    """One part; the `heads` heads with the most attention on the first key."""
    n_heads = sum(map(len, findings.sinks.alpha_first))
    more = f"\n({n_heads - heads} more heads in the JSON and the page)" if n_heads > heads else ""
    return "\n\n".join(
        [
            f"measured on {conditions(findings.checkpoint, findings.data)}",
            "\n".join(verdict_lines(findings)),
            grid(*layer_table(findings)),
            grid(*head_table(findings, heads)) + more,
            grid(*table(LARGEST_TOKEN, findings.spikes.tokens[:5])),
            *([grid(*null_table(findings))] if findings.nulls else []),
            *summary(findings),
            *anatomy_lines(findings.anatomy),
        ]
    )


# ----------------------------------------------------------------------------------------------- a prompt

PROMPT_NOTE = (
    "|h|: the token's magnitude in the residual stream where it is most above the spike rule's threshold, after which "
    "sub-layer, and against that layer's median and the threshold on ordinary text. share: of all attention. alpha: "
    "mean attention from the queries that can see the token, in the head that gives it most; * fewer than T/4 queries, "
    "where ordinary local attention is large too."
)


def prompt_table(found: PromptFindings) -> Table:
    """A row per token."""
    named = lambda at: f"{visible(found.tokens[at].text)} @{at}"
    columns = (
        Column("token", lambda token: visible(token.text)),
        Column("position", attrgetter("position"), "d"),
        Column("|h|", attrgetter("magnitude"), ".4g"),
        Column("x median", attrgetter("ratio"), ".1f"),
        Column("x threshold", attrgetter("strength"), ".2f"),
        Column("channel", attrgetter("channel"), "d"),
        Column("after", attrgetter("after")),
        Column("rules", lambda token: ", ".join(token.rules)),
        Column("share", attrgetter("share"), ".1%"),
        Column("alpha", lambda token: number(token.alpha) + ("*" if token.few_queries else "")),
        Column("head", attrgetter("head")),
        Column("sink in", lambda token: f"{token.sink_heads} heads"),
        Column("most heads look at", lambda token: f"{named(token.looks_at.position)} ({token.looks_at.heads})"),
    )
    return table(columns, found.tokens)


def prompt_head_table(found: PromptFindings, strongest: int | None = None) -> Table:
    """The token each head attends to most, heads with the strongest such token first."""
    named = lambda at: f"{visible(found.tokens[at].text)} @{at}"
    alpha = lambda head: head.alpha[head.most_at]
    columns = (
        Column("head", attrgetter("head")),
        Column("attends most to", lambda head: named(head.most_at)),
        Column("alpha", alpha),
        Column(
            "queries with their maximum there",
            lambda head: f"{sum(to == head.most_at for to in head.looks_at)} of {len(found.tokens)}",
        ),
    )
    return table(columns, sorted(found.heads, key=alpha, reverse=True)[:strongest])


def prompt_sentence(found: PromptFindings) -> str:
    """What stands out in a prompt."""
    tokens = found.tokens
    place = lambda token: f"{visible(token.text)} at position {token.position}"
    peak, most = max(tokens, key=attrgetter("strength")), max(tokens, key=attrgetter("share"))
    spikes = sum(PRIMARY_SPIKE_RULE in token.rules for token in tokens)
    needed = needed_heads(len(found.heads))
    sinks = sum(token.sink_heads >= needed for token in tokens)
    return (
        f"Of {len(tokens)} tokens {spikes} {'is a spike' if spikes == 1 else 'are spikes'}, compared with what "
        f"is usual on ordinary text, and {sinks} {'a sink' if sinks == 1 else 'sinks'} (alpha > "
        f"{PRIMARY_SINK_EPSILON} in at least {HEAD_SHARE:.0%} of heads). Strongest: {place(peak)}, {peak.ratio:.1f} x "
        f"the median and {peak.strength:.2f} x the spike threshold. Most attention over all heads: {place(most)}, "
        f"{most.share:.1%}."
    )


def prompt_terminal(found: PromptFindings) -> str:
    """A prompt's findings as text, part by part."""
    text = lambda part: f"{grid(*prompt_table(part))}\n\n{grid(*prompt_head_table(part, 12))}"
    return f"{by_part(found.all_parts, text)}\n\n{PROMPT_NOTE}"


# ------------------------------------------------------------------------------------------- the vocabulary


def vocabulary_tables(found: Vocabulary) -> list[tuple[str, Table]]:
    """A sentence and a table for each place that a token stood in."""
    places = {"Standing first": found.first, f"Second, after {visible(found.before)}": found.second}
    return [
        (
            f"{words}: {of.spiking:,} of {found.vocab_size:,} tokens spike ({of.fraction:.2%}).",
            table(VOCABULARY_TOKEN, of.tokens[:12]),
        )
        for words, of in places.items()
    ]


def vocabulary_terminal(found: Vocabulary) -> str:
    """The vocabulary probe as text."""
    return "\n\n".join(f"{sentence}\n\n{grid(*of)}" for sentence, of in vocabulary_tables(found))


# --------------------------------------------------------------------------------------------- side by side


def tokens_differ(all_findings: Sequence[Findings]) -> str | None:
    """Why losses in nats per token do not stand side by side; None where all models have one tokenizer."""
    kinds = {f.data.tokenizer or f"unknown, of {f.model.get('vocab_size')} ids" for f in all_findings}
    if len(kinds) == 1:
        return None
    return (
        "Nats per token are left out, as the models have different tokenizers: a token of one is more text than one of "
        "another. Bits per byte compare them, on the same text."
    )


def comparison_table(names: Sequence[str], all_findings: Sequence[Findings]) -> Table:
    """Checkpoints side by side: a column each, so that many measures fit."""
    sink_1 = lambda rates: f"{rates.first:.1%} {interval(rates.first_ci95, '.1%')}"
    measures = [
        Column("part", lambda f: f.part or "–"),
        Column("step", attrgetter("checkpoint.step"), "d"),
        Column("parameters", lambda f: f"{f.model['parameters'] / 1e6:.4g}M"),
        Column("text", attrgetter("data.name")),
        Column("sequences x tokens", lambda f: f"{f.data.n_seq} x {f.data.seq_len}"),
        Column("bits per byte", attrgetter("data.bits_per_byte"), ".4f"),
        *([] if tokens_differ(all_findings) else [Column("loss, nats per token", attrgetter("data.loss"), ".4f")]),
        Column("of", attrgetter("data.loss_of")),
        Column("spike", attrgetter("verdicts.spike.verdict")),
        Column("sink", attrgetter("verdicts.sink.verdict")),
        Column("co-occurrence", attrgetter("verdicts.co_occurrence.verdict")),
        Column("largest |h|", lambda f: max(layer.max for layer in f.attended), ".4g"),
        Column("largest top1/median", attrgetter("largest_ratio"), ".1f"),
        Column("largest kurtosis", attrgetter("largest_kurtosis")),
        *_compared_rules(SPIKE_RULES),
        Column(
            "spike tokens as read, behind the norms", lambda f: f.spikes.read.fraction if f.spikes.read else None, ".2%"
        ),
        Column("spike tokens at the last tap", attrgetter("spikes.sum.last"), ".2%"),
        Column("outlier channels", lambda f: len(f.spikes.outlier_channels), "d"),
        Column(f"Sink_1 ({PRIMARY_SINK_EPSILON})", lambda f: sink_1(f.sinks.at(PRIMARY_SINK_EPSILON))),
        *_compared_rules(SINK_RULES),
        Column("best head, of sequences", lambda f: f.measures.rules[PRIMARY_SINK_RULE].best_head, ".0%"),
        Column("share of the first key", lambda f: f.sinks.share[0], ".1%"),
        Column("P(sink | spike)", attrgetter("co_occurrence.p_sink_given_spike"), ".0%"),
        Column("P(spike | sink)", attrgetter("co_occurrence.p_spike_given_sink"), ".0%"),
        Column("step-up", lambda f: f.anatomy.step_up.name if f.anatomy and f.spikes.primary_rule.tokens else "–"),
    ]
    return turned(names, measures, all_findings)


def _compared_rules(table: Mapping[str, Rule]) -> list[Column]:
    """The share of tokens that each rule marks."""
    fraction = lambda name: lambda f: {**f.spikes.rules, **f.sinks.rules}[name].fraction
    return [Column(rule.compared, fraction(name), ".2%") for name, rule in table.items() if rule.compared]


def architecture_table(names: Sequence[str], all_findings: Sequence[Findings]) -> Table:
    """The architecture's entries that differ between checkpoints."""
    keys = dict.fromkeys(key for f in all_findings for key in f.model if key != "parameters")
    entry = lambda key: lambda f: str(f.model.get(key, "–"))
    columns = [Column(key, entry(key)) for key in keys]
    header, rows = turned(names, columns, all_findings)
    return Table(header, [row for row in rows if len(set(row[1:])) > 1])


# ------------------------------------------------------------------------------------------------- ablation


def ablation_terminal(ablation: Ablation) -> str:
    """The answers, then the table of interventions, for a terminal."""
    lines = []
    for name, found in ablation.all_parts:
        lines += [f"== {name} =="] if name else []
        lines += [*ablation_text.answers(found), grid(*ablation_text.rows(found))]
        for sentence, probe in ablation_text.probe_tables(found):
            lines.append(f"{sentence}\n{grid(*probe)}" if probe else sentence)
    return "\n\n".join([*lines, ablation.note])
