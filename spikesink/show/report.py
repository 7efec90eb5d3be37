"""Turns findings into words and tables for a terminal. page.py makes pages and figures, which need more packages."""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import TypeVar

from ..edit.findings import Ablation
from ..measure import history
from ..measure.calibrate import rules
from ..measure.findings import Anatomy, CoOccurrence, Findings, PromptFindings, SinkFindings, Skipped, Vocabulary
from ..measure.rules import BEST_HEAD, Rule
from ..measure.sinks import HEAD_SHARE, PRIMARY_SINK_EPSILON, PRIMARY_SINK_RULE, SINK_RULES, needed_heads
from ..measure.spikes import PRIMARY_SPIKE_RULE, SPIKE_RULES
from . import ablation_text
from .text import Column, Table, grid, number, table, transposed_table, visible, with_interval

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------- in words


def conditions(findings: Findings, nats: bool = True) -> str:
    """Returns on what findings were measured, and the loss; without `nats`, the loss in bits per byte alone."""
    checkpoint, data = findings.checkpoint, findings.data
    digest = (checkpoint.sha256 or "unknown")[:12]
    up_to = "up to " if data.tokens < data.n_seq * data.seq_len else ""
    step = "" if checkpoint.step is None else f"step {checkpoint.step}, "
    start = "each of which starts with BOS" if data.bos else "without BOS"
    if data.n_register:
        start += f", after {data.n_register} registers (position 0 is the first register)"
    losses = [f"{data.loss:.3f} nats per token"] if nats else []
    if data.bits_per_byte is not None:
        losses.append(f"{data.bits_per_byte:.3f} bits per byte")
    elif data.predicted_bytes == 0:
        losses.append("no bits per byte, since the text of its tokens is not at hand")
    loss = f"loss {', '.join(losses)}" + ("" if data.loss_of == "the next token" else f" (of {data.loss_of})")
    if math.isnan(data.loss):
        loss = "no loss, since the model has no language-model head"
    return (
        f"{data.n_seq} sequences of {up_to}{data.seq_len} tokens of {data.name}, {start}, {data.dtype}; "
        f"{step}sha256 {digest}; {loss}"
    )


def summary(findings: Findings) -> list[str]:
    """Returns what the numbers say about spikes, sinks and co-occurrence: a paragraph each."""
    sinks = findings.sinks
    gu = sinks.at(PRIMARY_SINK_EPSILON)
    best = gu.best_eligible
    strongest = "No key is seen by at least T/4 queries"
    if best:
        place = f"position {best.position} ({best.rate:.1%})"
        strongest = f"Among keys that at least T/4 queries see, the strongest is {place}"
    narrow = [seam.name for seam, possible in zip(sinks.seams, sinks.possible, strict=True) if not possible]
    windows = f" In {', '.join(narrow)} the window is too short for sinks: too few queries see a key." if narrow else ""
    return [
        _spike_sentences(findings),
        f"Sinks: the first token is a sink in {with_interval(gu.first, gu.first_ci95, '.1%')} of heads (Gu et "
        f"al.'s Sink_1 at epsilon {gu.epsilon}). {strongest}. Position 0 gets "
        f"{sinks.share[0]:.1%} of all attention; it would get {sinks.share_uniform[0]:.1%} if every query spread "
        f"its attention evenly. A token is called a sink if it is one in at least {sinks.heads_needed} of the "
        f"{sum(map(len, sinks.alpha_first))} heads.{windows}",
        _overlap_sentence(findings.co_occurrence),
    ]


def _spike_sentences(findings: Findings) -> str:
    spikes, top = findings.spikes, findings.spikes.tokens[0]
    total, read, layer = spikes.sum, spikes.read, findings.layers[top.index]
    median = layer.usual.layer  # 0 if most of the stream is
    states = "the same state every time" if total.states == 1 else f"in {total.states} different states"
    lines = [
        f"Spikes: {total.tokens} tokens ({total.fraction:.2%}) are spikes{f', {states}' if total.tokens else ''}; "
        f"{total.sequences:.0%} of sequences have one.",
        f"The rule: {spikes.primary_rule.threshold}.",
        f"The strongest token is {visible(top.text)} at position {top.position}. Its |h| is {top.magnitude:.4g} in "
        f"channel {top.channel} after {layer.name}, {number(top.magnitude / median if median else None, '.0f')} x the "
        f"median there and {top.strength:.1f} x the threshold. That entry is {number(top.energy_share, '.0%')} of the "
        f"token's energy, and the token's norm is {number(top.norm_ratio)} x a typical one.",
    ]
    if total.in_embedding:
        lines.append(f"{total.in_embedding:.0%} of them are spikes in the embedding already: they are parameters.")
    if read:
        lines.append(
            f"Behind the norms, as the sub-layers read the stream, {read.tokens} tokens ({read.fraction:.2%}) are "
            f"spikes, in {read.sequences:.0%} of sequences."
        )
    if total.last is not None:
        lines.append(f"After the last sub-layer, which no attention reads, {total.last:.2%} of tokens are spikes.")
    outliers = ", ".join(f"{c.channel} ({c.ratio:.0f}x, {c.layers:.0%} of layers)" for c in spikes.outlier_channels[:5])
    if outliers:
        lines.append(f"Outlier channels are large in nearly every token, so they are no spikes: {outliers}.")
    lines.append(f"By the absolute rule of Sun et al., {spikes.rules['massive'].tokens} tokens are massive.")
    return " ".join(lines)


def _overlap_sentence(overlap: CoOccurrence) -> str:
    if not (overlap.spike_tokens and overlap.sink_tokens):
        return f"Co-occurrence: undefined, with {overlap.spike_tokens} spike and {overlap.sink_tokens} sink tokens."
    ci, sink_given, spike_given = overlap.ci95, overlap.p_sink_given_spike, overlap.p_spike_given_sink
    first = overlap.without_first
    rest = f"Without position 0 there are {first.spike_tokens} spike tokens and {first.sink_tokens} sink tokens."
    if first.spike_tokens and first.sink_tokens:
        rest = (
            f"Without position 0, P(sink | spike) is {first.p_sink_given_spike:.0%}, and the lift is "
            f"{number(first.lift, '.2f')}, p {first.p_permutation:.3g}."
        )
    if overlap.by_construction:
        return (
            f"Co-occurrence: P(sink | spike) is {sink_given:.0%}, P(spike | sink) {spike_given:.0%}. But the spikes or "
            "the sinks are the same state in every sequence, so this is a single observation, which position explains "
            f"by construction. {rest}"
        )
    lift = with_interval(overlap.lift, ci.lift, ".2f")
    return (
        f"Co-occurrence: P(sink | spike) is {with_interval(sink_given, ci.p_sink_given_spike, '.0%')}, "
        f"P(spike | sink) {with_interval(spike_given, ci.p_spike_given_sink, '.0%')}. The lift over what "
        f"position alone explains is {lift}, p {overlap.p_permutation:.3g}. {rest}"
    )


def anatomy_lines(anatomy: Anatomy | None) -> list[str]:
    """Returns sentences on how the spike is made, and on what the sinks' keys look like."""
    if anatomy is None:
        return []
    up, down = anatomy.step_up, anatomy.step_down
    ends = "no step-down (none loses a tenth of its peak)."
    if down:
        ends = f"a step-down at {down.name} for {down.tokens:.0%} ({down.part_of_peak:+.0%} of the peak)."
    channels = ", ".join(
        f"{c.channel} ({c.value:+.4g}, {c.ratio:+.2f} +- {c.ratio_std:.2f} of the first)" for c in anatomy.channels[:4]
    )
    lines = [
        f"Anatomy ({anatomy.of}): {anatomy.tokens} tokens in {anatomy.n_seq} sequences, {anatomy.distinct_tokens} "
        f"distinct. There is a step-up at {up.name} for {up.tokens:.0%} of them ({up.part_of_peak:.0%} of the peak), "
        f"and {ends}",
        f"They share channels: {channels}.",
    ]
    spans = [
        f"{span.start.name} to {span.end.name} ({span.tokens:.0%} of the spike tokens; |h| is {span.magnitude:.4g} at "
        f"most, {span.ratio:.0f} x the median, most often in channel {span.channel})"
        for span in anatomy.episodes
    ]
    if spans:
        lines.append(f"The spikes last from {'; from '.join(spans)}.")
    cosines = [(row.spikes, row) for row in anatomy.normed_cosine if row.spikes is not None]
    if cosines:
        cosine, row = max(cosines, key=lambda pair: pair[0])
        lines.append(
            f"Once normalised, these tokens are most alike at the input of {row.name}: their mean cosine is "
            f"{cosine:.2f}, against {number(row.others, '.2f')} between other tokens."
        )
    heads = [head for row in anatomy.key_subspace for head in row.heads if head.dims95]
    if heads:
        mean = lambda counts: sum(count or 0 for count in counts) / len(heads)
        lines.append(
            f"Sink keys have 95% of their energy in {mean(head.dims95 for head in heads):.1f} dimensions, as many "
            f"other keys in {mean(head.others_dims95 for head in heads):.1f} (means over {len(heads)} heads)."
        )
    form = anatomy.quadratic_form
    if form:
        in_words = lambda channels: ", ".join(f"{c.channel} ({c.norm:.2f}x, {c.dominance:.2f})" for c in channels)
        lines.append(
            f"The quadratic form of ffn {form.layer}, by channel (its norm over the median channel's; the part of it "
            f"in one direction): shared channels {in_words(form.channels)}; random channels {in_words(form.others)}."
        )
    return lines


# ------------------------------------------------------------------------------------------------ tables

# of a tap: (SideStats of the sum, those of what the next sub-layer reads of it, or None)
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
# title -> numbers by layer and head (L, H)
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
HISTORY = (  # of HistoryRows
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
    """Returns a row per tap of the residual stream: its sum, and what the next sub-layer reads behind the norm."""
    reads = {row.index: row for row in findings.reads}
    return table(LAYER, [(row, reads.get(row.index)) for row in findings.layers])


def head_table(findings: Findings, strongest: int | None = None) -> Table:
    """Returns a row per head; with `strongest`, only so many, those with the most attention on the first key first."""
    sinks = findings.sinks
    at = lambda by_head: lambda head: by_head[head[0]][head[1]]
    name = lambda head: f"{sinks.seams[head[0]].name.removeprefix('attn ')}.{head[1]}"
    heads = [(layer, head) for layer, row in enumerate(sinks.alpha_first) for head in range(len(row))]
    if strongest is not None:
        heads = sorted(heads, key=at(sinks.alpha_first), reverse=True)[:strongest]
    return table([Column("head", name), *(Column(title, at(values(sinks))) for title, values in HEAD.items())], heads)


def null_table(findings: Findings) -> Table:
    """Returns a row for the model and for each null. Percentages are of tokens unless a heading says otherwise."""
    is_skipped = lambda row: isinstance(row[1], Skipped)
    measured = lambda value: lambda row: "" if is_skipped(row) else value(row[1])
    rate = lambda name, key: measured(lambda measures: getattr(measures.rules[name], key))
    name_of = lambda row: f"{row[0]} (skipped: {row[1].skipped})" if is_skipped(row) else row[0].replace("_", " ")
    columns = [
        Column("measured on", name_of),
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


def inner_table(anatomy: Anatomy) -> Table:
    """Returns a row per sub-layer: the sizes of the tensors inside it, off the stream."""
    by_name = {place: {row.name: row for row in rows} for place, rows in anatomy.inner.items()}
    number_of = lambda place, key: lambda name: getattr(by_name[place][name], key) if name in by_name[place] else None
    columns = [Column("sub-layer", str)]
    for place in anatomy.inner:
        columns.append(Column(f"{place} top1", number_of(place, "top1"), ".4g"))
        columns.append(Column(f"{place} top1/median", number_of(place, "ratio"), ".1f"))
    columns.append(Column("update kurtosis", number_of("update", "kurtosis")))
    return table(columns, by_name.get("update", ()))


def places_sentence(anatomy: Anatomy) -> str:
    """Returns what the columns of `inner_table` are, in words."""
    places = "; ".join(f"{place}: {text}" for place, text in anatomy.places.items())
    return f"Measured on the {anatomy.n_seq} sequences of the anatomy. {places}."


def by_part(parts: Sequence[tuple[str, T]], text: Callable[[T], str]) -> str:
    """Returns the texts of the parts; if there are several, each under its name."""
    title = lambda name: f"== {name} ==\n\n" if len(parts) > 1 else ""
    return "\n\n".join(title(name) + text(part) for name, part in parts)


def terminal(findings: Findings) -> str:
    """Returns the findings as text, part by part, and those on the vocabulary if there are any."""
    tables = vocabulary_tables(findings.vocabulary) if findings.vocabulary else []
    parts = by_part(findings.all_parts, _terminal_part)
    return "\n\n".join([parts, *(f"{sentence}\n\n{grid(*rows)}" for sentence, rows in tables)])


def _terminal_part(findings: Findings, heads: int = 16) -> str:
    """Returns one part as text, with the `heads` heads that pay the most attention to the first key."""
    verdicts = [f"{name}: {v.verdict.upper()}. {v.reason}." for name, v in findings.verdicts.by_name.items()]
    n_heads = sum(map(len, findings.sinks.alpha_first))
    more = f"\n({n_heads - heads} more heads in the JSON and the page)" if n_heads > heads else ""
    return "\n\n".join(
        [
            f"measured on {conditions(findings)}",
            "\n".join(verdicts),
            grid(*layer_table(findings)),
            grid(*head_table(findings, heads)) + more,
            grid(*table(LARGEST_TOKEN, findings.spikes.tokens[:5])),
            *([grid(*null_table(findings))] if findings.nulls else []),
            *summary(findings),
            *anatomy_lines(findings.anatomy),
        ]
    )


PROMPT_NOTE = (
    "|h|: the token's largest magnitude in the residual stream, after the sub-layer where it is most above the "
    "threshold of the spike rule; x median and x threshold compare it with ordinary text. share: the token's share of "
    "all attention. alpha: the mean attention from the queries that can see the token, in the head that gives it the "
    "most. * marks tokens that fewer than T/4 queries see: there even ordinary local attention is large."
)


def prompt_table(findings: PromptFindings) -> Table:
    """Returns a row per token of a prompt."""
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
        Column("most heads look at", lambda t: f"{_token_at(findings, t.looks_at.position)} ({t.looks_at.heads})"),
    )
    return table(columns, findings.tokens)


def _token_at(findings: PromptFindings, position: int) -> str:
    return f"{visible(findings.tokens[position].text)} @{position}"


def prompt_head_table(findings: PromptFindings, strongest: int | None = None) -> Table:
    """Returns the token that each head attends to most, the heads with the most attention on it first."""
    alpha, n = lambda head: head.alpha[head.most_at], len(findings.tokens)
    columns = (
        Column("head", attrgetter("head")),
        Column("attends most to", lambda head: _token_at(findings, head.most_at)),
        Column("alpha", alpha),
        Column("queries with their maximum there", lambda head: f"{head.looks_at.count(head.most_at)} of {n}"),
    )
    return table(columns, sorted(findings.heads, key=alpha, reverse=True)[:strongest])


def prompt_sentence(findings: PromptFindings) -> str:
    """Returns what stands out in a prompt."""
    tokens = findings.tokens
    place = lambda token: f"{visible(token.text)} at position {token.position}"
    peak, target = max(tokens, key=attrgetter("strength")), max(tokens, key=attrgetter("share"))
    spikes = sum(PRIMARY_SPIKE_RULE in token.rules for token in tokens)
    needed = needed_heads(len(findings.heads))
    sinks = sum(token.sink_heads >= needed for token in tokens)
    return (
        f"Of {len(tokens)} tokens {spikes} {'is a spike' if spikes == 1 else 'are spikes'}, compared with ordinary "
        f"text, and {sinks} {'is a sink' if sinks == 1 else 'are sinks'} (alpha > {PRIMARY_SINK_EPSILON} in at least "
        f"{HEAD_SHARE:.0%} of heads). The strongest token is {place(peak)}: its |h| is {peak.ratio:.1f} x the median "
        f"and {peak.strength:.2f} x the spike threshold. Most attention goes to {place(target)}: {target.share:.1%}."
    )


def prompt_terminal(findings: PromptFindings) -> str:
    """Returns a prompt's findings as text, part by part."""
    text = lambda part: f"{grid(*prompt_table(part))}\n\n{grid(*prompt_head_table(part, 12))}"
    return f"{by_part(findings.all_parts, text)}\n\n{PROMPT_NOTE}"


def vocabulary_tables(vocabulary: Vocabulary) -> list[tuple[str, Table]]:
    """Returns a sentence and a table for each place in which the tokens were tried."""
    places = {"first": vocabulary.first, f"second, after {visible(vocabulary.before)}": vocabulary.second}
    return [
        (
            f"Placed {words}, {place.spiking:,} of {vocabulary.vocab_size:,} tokens are spikes ({place.fraction:.2%}).",
            table(VOCABULARY_TOKEN, place.tokens[:12]),
        )
        for words, place in places.items()
    ]


def nats_note(all_findings: Sequence[Findings]) -> str | None:
    """Returns why losses in nats per token cannot be compared; None if all models have the same tokenizer."""
    kinds = {f.data.tokenizer or f"unknown, of {f.model.get('vocab_size')} ids" for f in all_findings}
    if len(kinds) == 1:
        return None
    return (
        "The models have different tokenizers, so a token is more text in some of them than in others, and losses in "
        "nats per token are left out. Bits per byte can be compared, on the same text."
    )


def comparison_table(names: Sequence[str], all_findings: Sequence[Findings]) -> Table:
    """Returns a table with a column per checkpoint and a row per measure."""
    sink_1 = lambda rates: with_interval(rates.first, rates.first_ci95, ".1%")
    measures = [
        Column("part", lambda f: f.part or "–"),
        Column("step", attrgetter("checkpoint.step"), "d"),
        Column("parameters", lambda f: f"{f.model['parameters'] / 1e6:.4g}M"),
        Column("text", attrgetter("data.name")),
        Column("sequences x tokens", lambda f: f"{f.data.n_seq} x {f.data.seq_len}"),
        Column("bits per byte", attrgetter("data.bits_per_byte"), ".4f"),
        *([] if nats_note(all_findings) else [Column("loss, nats per token", attrgetter("data.loss"), ".4f")]),
        Column("the loss is of", attrgetter("data.loss_of")),
        Column("spike", attrgetter("verdicts.spike.verdict")),
        Column("sink", attrgetter("verdicts.sink.verdict")),
        Column("co-occurrence", attrgetter("verdicts.co_occurrence.verdict")),
        Column("largest |h|", lambda f: max(layer.max for layer in f.attended), ".4g"),
        Column("largest top1/median", attrgetter("largest_ratio"), ".1f"),
        Column("largest kurtosis", attrgetter("largest_kurtosis")),
        *_compared_rules(SPIKE_RULES),
        Column("spike tokens as read, behind the norms", lambda f: f.spikes.read and f.spikes.read.fraction, ".2%"),
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
    return transposed_table(names, measures, all_findings)


def _compared_rules(table: Mapping[str, Rule]) -> list[Column]:
    """Returns columns with the share of tokens that each rule marks."""
    fraction = lambda name: lambda f: {**f.spikes.rules, **f.sinks.rules}[name].fraction
    return [Column(rule.compared, fraction(name), ".2%") for name, rule in table.items() if rule.compared]


def architecture_table(names: Sequence[str], all_findings: Sequence[Findings]) -> Table:
    """Returns the entries of the architecture that differ between checkpoints."""
    keys = dict.fromkeys(key for f in all_findings for key in f.model if key != "parameters")
    entry = lambda key: lambda f: str(f.model.get(key, "–"))
    columns = [Column(key, entry(key)) for key in keys]
    header, rows = transposed_table(names, columns, all_findings)
    return Table(header, [row for row in rows if len(set(row[1:])) > 1])


def comparison_terminal(names: Sequence[str], all_findings: Sequence[Findings]) -> str:
    """Returns checkpoints side by side as text."""
    lines = [grid(*comparison_table(names, all_findings)), nats_note(all_findings)]
    differences = architecture_table(names, all_findings)
    if differences.rows:
        lines.append("what differs in their architecture\n" + grid(*differences))
    return "\n\n".join(filter(None, lines))


def ablation_terminal(ablation: Ablation) -> str:
    """Returns the answers and the table of interventions for a terminal."""
    lines = []
    for name, part in ablation.all_parts:
        lines += [f"== {name} =="] if name else []
        tables = [*ablation_text.cause_tables(part), ("", ablation_text.intervention_table(part))]
        tables += ablation_text.probe_tables(part)
        told = (f"{sentence}\n{grid(*table) if table else ''}".strip() for sentence, table in tables)
        lines += [*ablation_text.answers(part), *told]
    return "\n\n".join([*lines, ablation.note])
