"""Findings -> words and tables for a terminal, and self-contained HTML pages."""

from pathlib import Path
from typing import Any

import jinja2

from ..edit.findings import Ablation
from ..files import save_bytes, save_text
from ..measure import history
from ..measure.findings import name_of, ratio_of
from ..measure.sinks import PRIMARY_SINK_EPSILON
from ..measure.spikes import SPIKE_RATIO
from . import ablation_figures, ablation_text, drawing, figures, interactive
from .text import grid, interval, number, visible

PAGES = Path(__file__).with_name("pages")

# ---------------------------------------------------------------------------------------------- in words


def conditions(findings):
    """Under what conditions every number of these findings was measured."""
    data, checkpoint = findings["data"], findings["checkpoint"]
    digest = (checkpoint["sha256"] or "unknown")[:12]
    ragged = "up to " if data["tokens"] < data["n_seq"] * data["seq_len"] else ""
    step = "" if checkpoint["step"] is None else f"step {checkpoint['step']}, "
    start = "each starting with BOS" if data["bos"] else "no BOS"
    if data["n_register"]:
        start += f", after {data['n_register']} registers (positions count from the first register)"
    return (
        f"{data['n_seq']} sequences of {ragged}{data['seq_len']} tokens of {data['name']}, {start}, {data['dtype']}; "
        f"{step}sha256 {digest}; loss {data['loss']:.3f} nats per token"
        + ("" if data["loss_of"] == "the next token" else f" (of {data['loss_of']})")
    )


def verdict_lines(findings):
    """A line per phenomenon: present, absent or underpowered, and why."""
    return [
        f"{name.replace('_', '-')}: {verdict['verdict'].upper()}. {verdict['reason']}."
        for name, verdict in findings["verdicts"].items()
    ]


def summary(findings):
    """What was found, a sentence each for spikes, sinks and co-occurrence, with the numbers."""
    layer = max(findings["layers"], key=ratio_of)
    spikes, sinks, both = findings["spikes"], findings["sinks"], findings["co_occurrence"]
    rule, top = spikes["rules"][spikes["primary"]], spikes["tokens"][0]
    massive = spikes["rules"]["massive"]["tokens"]
    gu = sinks["gu"]["0.3"]
    best = gu["best_eligible"]
    layer_name = name_of(layer)
    return [
        f"Spikes: largest |h| {top['magnitude']:.4g} at position {top['position']} ({visible(top['text'])}), channel "
        f"{top['channel']}. Largest ratio: top-1 {layer['top1']:.4g} is {ratio_of(layer):.0f}x the "
        f"median after {layer_name}. {rule['tokens']} tokens ({rule['fraction']:.2%}) meet {rule['threshold']}; "
        f"{massive} the absolute rule of Sun et al.",
        f"Sinks: Gu et al.'s Sink_1 at epsilon 0.3 is {gu['first']:.1%} {interval(gu['first_ci95'], '.1%')} of heads; "
        f"the strongest key with at least T/4 queries is position {best['position']}, {best['rate']:.1%}. Position 0 "
        f"holds {sinks['share'][0]:.1%} of all attention; {sinks['share_uniform'][0]:.1%} if every query spread it "
        "evenly over all that it may see.",
        _overlap_sentence(both),
    ]


def _overlap_sentence(both):
    if not (both["spike_tokens"] and both["sink_tokens"]):
        return (
            f"Co-occurrence: undefined, with {both['spike_tokens']} spike tokens and {both['sink_tokens']} sink tokens "
            "by these rules."
        )
    ci = both["ci95"]
    return (
        f"Co-occurrence: P(sink | spike) {both['p_sink_given_spike']:.0%} {interval(ci['p_sink_given_spike'], '.0%')}, "
        f"P(spike | sink) {both['p_spike_given_sink']:.0%} {interval(ci['p_spike_given_sink'], '.0%')}, lift over what "
        f"position alone explains {' '.join((number(both['lift'], '.2f'), interval(ci['lift'], '.2f'))).strip()}, p "
        f"{both['p_permutation']:.3g}. {_without_first(both['without_first'])}"
    )


def _without_first(rest):
    if not (rest["spike_tokens"] and rest["sink_tokens"]):
        return f"Without position 0: {rest['spike_tokens']} spike tokens, {rest['sink_tokens']} sink tokens."
    return (
        f"Without position 0: P(sink | spike) {rest['p_sink_given_spike']:.0%}, "
        f"lift {number(rest['lift'], '.2f')}, p {rest['p_permutation']:.3g}."
    )


def anatomy_lines(findings):
    """How the spike is made, and what the sinks' keys look like, in sentences."""
    of = findings["anatomy"]
    if not of:
        return []
    up, down, channels = of["step_up"], of["step_down"], of["channels"]
    lines = [
        f"Anatomy ({of['of']}: {of['tokens']} in {of['n_seq']} sequences, {of['distinct_tokens']} distinct). Step-up "
        f"at {name_of(up)} for {up['tokens']:.0%} of them ({up['part_of_peak']:.0%} of the peak); "
        + (
            f"step-down at {name_of(down)} for {down['tokens']:.0%} ({down['part_of_peak']:+.0%} of the peak)."
            if down
            else "no step-down (none loses a tenth of its peak)."
        ),
        "Shared channels: "
        + ", ".join(
            f"{c['channel']} ({c['value']:+.4g}, {c['ratio']:+.2f} +- {c['ratio_std']:.2f} of the first)"
            for c in channels[:4]
        )
        + ".",
    ]
    cosines = [row for row in of["normed_cosine"] if row["spikes"] is not None]
    if cosines:
        most = max(cosines, key=lambda row: row["spikes"])
        lines.append(
            f"Normalised, these tokens are most alike at the input of {name_of(most)}: mean cosine "
            f"{most['spikes']:.2f}, {number(most['others'], '.2f')} between other tokens."
        )
    ranks = [h for row in of["key_subspace"] for h in row["heads"] if h["dims95"]]
    if ranks:
        mean = lambda key: sum(h[key] or 0 for h in ranks) / len(ranks)
        lines.append(
            f"Sink keys: 95% of their energy in {mean('dims95'):.1f} dimensions on average over {len(ranks)} heads, "
            f"{mean('others_dims95'):.1f} for as many other keys."
        )
    form = of["quadratic_form"]
    if form:
        shown = ", ".join(f"{c['channel']} ({c['norm']:.2f}x, {c['dominance']:.2f})" for c in form["channels"])
        others = ", ".join(f"{c['channel']} ({c['norm']:.2f}x, {c['dominance']:.2f})" for c in form["others"])
        lines.append(
            f"Quadratic form of ffn {form['layer']} (norm over the median channel's, part held by one direction): "
            f"shared channels {shown}; random channels {others}."
        )
    return lines


# ----------------------------------------------------------------------------------------------- terminal


def layer_rows(findings):
    """(header, rows) of the layer table."""
    header = ["after", "top1", "top2", "top3", "median", "top1/median", "MMR", "kurtosis", "max"]
    keys = ("top1", "top2", "top3", "median")
    rows = [
        [
            name_of(x),
            *(number(x[k], ".4g") for k in keys),
            f"{ratio_of(x):.1f}",
            *(number(x[k]) for k in ("mmr", "kurtosis")),
            number(x["max"], ".4g"),
        ]
        for x in findings["layers"]
    ]
    return header, rows


def head_rows(findings):
    """(header, rows) of the attention table, a row per layer and head."""
    sinks = findings["sinks"]
    columns = {
        "Sink_1 (0.3)": sinks["gu"]["0.3"]["by_head"],
        "alpha_1": sinks["alpha_first"],
        "any sink": sinks["any_sink_by_head"],
        "argmax=1": sinks["first_argmax"],
        "|v_1|/mean": sinks["first_value_norm_ratio"],
        "|v_sink|/mean": sinks["sink_value_norm_ratio"],
        "to no key": sinks["slot_share"],
        "entropy": sinks["entropy"],
        "distance": sinks["distance"],
        "without sinks": sinks["distance_without_sinks"],
    }
    shape = [(layer, head) for layer, row in enumerate(sinks["alpha_first"]) for head in range(len(row))]
    names = [name_of(seam).removeprefix("attn ") for seam in sinks["seams"]]
    rows = [[f"{names[layer]}.{head}", *(number(c[layer][head]) for c in columns.values())] for layer, head in shape]
    return ["head", *columns], rows


def null_rows(findings):
    """(header, rows) of the model beside its nulls; percentages of tokens, but of sequences where it says so."""
    header = [
        "measured on",
        "sequences",
        "largest |h|/median",
        "kurtosis",
        "spikes",
        "massive",
        "6 sigma",
        "percentile",
    ]
    header += ["sinks", "best head, of sequences", "share rule", "loss"]
    rows = []
    for name, m in {"this model": findings["measures"], **findings["nulls"]}.items():
        if "skipped" in m:
            rows.append([f"{name} (skipped: {m['skipped']})", *[""] * (len(header) - 1)])
            continue
        rules = m["rules"]
        percent = lambda rule, key="tokens", rules=rules: f"{rules[rule][key]:.2%}"
        rows.append(
            [
                name.replace("_", " "),
                str(m["n_seq"]),
                number(m["largest_ratio"], ".4g"),
                number(m["kurtosis"]),
                *(percent(rule) for rule in ("ratio", "massive", "six_sigma", "percentile", "gu")),
                percent("gu", "best_head"),
                percent("share"),
                number(m["loss"], ".3f"),
            ]
        )
    return header, rows


def inner_rows(findings):
    """(header, rows) of the tensors off the stream, sub-layer by sub-layer."""
    header = ["of", *(f"{place} {key}" for place in ("normed", "output", "update") for key in ("top1", "top1/median"))]
    header += ["update kurtosis"]
    inner = findings["anatomy"]["inner"]
    by_name = {place: {name_of(row): row for row in inner[place]} for place in inner}
    rows = []
    for name, update in by_name.get("update", {}).items():
        cells = []
        for place in ("normed", "output", "update"):
            row = by_name[place].get(name)
            cells += [number(row["top1"], ".4g"), f"{ratio_of(row):.1f}"] if row else ["–", "–"]
        rows.append([name, *cells, number(update["kurtosis"])])
    return header, rows


def places_sentence(findings):
    """What the columns of `inner_rows` are, in words."""
    of = findings["anatomy"]
    places = "; ".join(f"{place}: {text}" for place, text in of["places"].items())
    return f"On the {of['n_seq']} sequences that were dissected. {places}."


def history_rows(rows):
    """(header, rows) of what happened over training."""
    header = ["step", *history.COLUMNS]
    keys = ("loss", "ratio", "kurtosis", "sink_rate", "p_sink_given_spike")
    return header, [[f"{row['step']:,}", *(number(row[key], ".4g") for key in keys)] for row in rows]


def parts_of(findings):
    """[(name, findings)] of an encoder-decoder's parts, or of the one there is, named ''."""
    if isinstance(findings, Ablation):
        return findings.all_parts
    return [(findings.get("part", ""), findings), *findings.get("parts", {}).items()]


def terminal(findings):
    """The findings as text, part by part."""
    parts = parts_of(findings)
    return "\n\n".join((f"== {name} ==\n\n" if len(parts) > 1 else "") + _terminal_part(found) for name, found in parts)


def _terminal_part(findings, heads=16):
    """One part; the `heads` heads with the most attention on the first key."""
    header, rows = head_rows(findings)
    first = [alpha for row in findings["sinks"]["alpha_first"] for alpha in row]
    rows = [row for _, row in sorted(zip(first, rows, strict=True), key=lambda pair: -pair[0])]
    more = f"\n({len(rows) - heads} more heads in the JSON and the page)" if len(rows) > heads else ""
    tokens = [
        [
            visible(t["text"]),
            str(t["position"]),
            str(t["occurrences"]),
            number(t["magnitude"], ".4g"),
            ", ".join(t["rules"]),
        ]
        for t in findings["spikes"]["tokens"][:5]
    ]
    return "\n\n".join(
        [
            f"measured on {conditions(findings)}",
            "\n".join(verdict_lines(findings)),
            grid(*layer_rows(findings)),
            grid(header, rows[:heads]) + more,
            grid(["largest tokens", "position", "occurrences", "|h|", "rules"], tokens),
            *([grid(*null_rows(findings))] if findings["nulls"] else []),
            *summary(findings),
            *anatomy_lines(findings),
        ]
    )


def prompt_rows(found):
    """(header, rows) of a prompt, a row per token."""
    header = ["token", "position", "|h|", "x median", "channel", "after", "rules", "share", "alpha", "head", "sink in"]
    header += ["most heads look at"]
    texts = [visible(token["text"]) for token in found["tokens"]]
    rows = [
        [
            text,
            str(t["position"]),
            number(t["magnitude"], ".4g"),
            f"{t['ratio']:.1f}",
            str(t["channel"]),
            t["after"],
            ", ".join(t["rules"]),
            f"{t['share']:.1%}",
            number(t["alpha"]) + ("*" if t["few_queries"] else ""),
            t["head"],
            f"{t['sink_heads']} heads",
            f"{texts[t['looks_at']['position']]} @{t['looks_at']['position']} ({t['looks_at']['heads']})",
        ]
        for text, t in zip(texts, found["tokens"], strict=True)
    ]
    return header, rows


def prompt_head_rows(found, heads=None):
    """(header, rows): the token each head attends to most, heads with the strongest such token first."""
    texts = [visible(token["text"]) for token in found["tokens"]]
    rows = []
    for head in sorted(found["heads"], key=lambda h: -h["alpha"][h["most_at"]])[:heads]:
        at = head["most_at"]
        queries = sum(to == at for to in head["looks_at"])
        rows.append([head["head"], f"{texts[at]} @{at}", number(head["alpha"][at]), f"{queries} of {len(texts)}"])
    return ["head", "attends most to", "alpha", "queries with their maximum there"], rows


def prompt_sentence(found):
    """What stands out in a prompt."""
    tokens = found["tokens"]
    place = lambda t: f"{visible(t['text'])} at position {t['position']}"
    peak, most = max(tokens, key=lambda t: t["ratio"]), max(tokens, key=lambda t: t["share"])
    spikes = sum("ratio" in t["rules"] for t in tokens)
    sinks = sum(bool(t["sink_heads"]) and not t["few_queries"] for t in tokens)
    return (
        f"Of {len(tokens)} tokens {spikes} {'is a spike' if spikes == 1 else 'are spikes'} (|h| at least "
        f"{SPIKE_RATIO:g} x the layer's median) and {sinks} {'a sink' if sinks == 1 else 'sinks'} (alpha > "
        f"{PRIMARY_SINK_EPSILON} in at least one head). Largest: {place(peak)}, {peak['ratio']:.1f} x the median. Most "
        f"attention over all heads: {place(most)}, {most['share']:.1%}."
    )


PROMPT_NOTE = (
    "|h|: the token's largest magnitude in the residual stream, after which sub-layer, and against that layer's median "
    "on this text. share: of all attention. alpha: mean attention from the queries that can see the token, in the head "
    "that gives it most; * fewer than T/4 queries, where ordinary local attention is large too."
)


def prompt_terminal(found):
    """A prompt's findings as text, part by part."""
    blocks = []
    for name, part in parts_of(found):
        blocks += [f"== {name} =="] if name else []
        blocks += [grid(*prompt_rows(part)), grid(*prompt_head_rows(part, 12))]
    return "\n\n".join([*blocks, PROMPT_NOTE])


def vocabulary_tables(found):
    """[(sentence, header, rows)] of the vocabulary probe, for each place that a token stood in."""
    tables = []
    for place, words in (("first", "Standing first"), ("second", f"Second, after {visible(found['before'])}")):
        of = found[place]
        rows = [
            [
                visible(t["text"]),
                str(t["id"]),
                f"{t['ratio']:.1f}",
                str(t["channel"]),
                name_of({"kind": t["after"], **t}),
            ]
            for t in of["tokens"][:12]
        ]
        sentence = f"{words}: {of['spiking']:,} of {found['vocab_size']:,} tokens spike ({of['fraction']:.2%})."
        tables.append((sentence, ["token", "id", "|h|/median", "channel", "after"], rows))
    return tables


def vocabulary_terminal(found):
    """The vocabulary probe as text."""
    return "\n\n".join(f"{sentence}\n\n{grid(header, rows)}" for sentence, header, rows in vocabulary_tables(found))


def comparison_rows(names, all_findings):
    """(header, rows) of checkpoints side by side: a column each, so that many measures fit."""
    largest = lambda f, key: max(layer[key] for layer in f["layers"])
    measures = {
        "part": lambda f: f["part"] or "–",
        "step": lambda f: str(f["checkpoint"]["step"] or "–"),
        "parameters": lambda f: f"{f['model']['parameters'] / 1e6:.4g}M",
        "text": lambda f: f["data"]["name"],
        "sequences x tokens": lambda f: f"{f['data']['n_seq']} x {f['data']['seq_len']}",
        "loss": lambda f: f"{f['data']['loss']:.4f}",
        "of": lambda f: f["data"]["loss_of"],
        "spike": lambda f: f["verdicts"]["spike"]["verdict"],
        "sink": lambda f: f["verdicts"]["sink"]["verdict"],
        "co-occurrence": lambda f: f["verdicts"]["co_occurrence"]["verdict"],
        "largest |h|": lambda f: number(largest(f, "max"), ".4g"),
        "largest top1/median": lambda f: f"{max(map(ratio_of, f['layers'])):.1f}",
        "largest kurtosis": lambda f: number(largest(f, "kurtosis")),
        "spike tokens": lambda f: f"{f['spikes']['rules']['ratio']['fraction']:.2%}",
        "massive tokens": lambda f: f"{f['spikes']['rules']['massive']['fraction']:.2%}",
        "Sink_1 (0.3)": lambda f: (
            f"{f['sinks']['gu']['0.3']['first']:.1%} {interval(f['sinks']['gu']['0.3']['first_ci95'], '.1%')}"
        ),
        "sink tokens": lambda f: f"{f['sinks']['rules']['gu']['fraction']:.2%}",
        "best head, of sequences": lambda f: f"{f['measures']['rules']['gu']['best_head']:.0%}",
        "share of the first key": lambda f: f"{f['sinks']['share'][0]:.1%}",
        "P(sink | spike)": lambda f: number(f["co_occurrence"]["p_sink_given_spike"], ".0%"),
        "P(spike | sink)": lambda f: number(f["co_occurrence"]["p_spike_given_sink"], ".0%"),
        "step-up": lambda f: name_of(f["anatomy"]["step_up"]) if f["spikes"]["rules"]["ratio"]["tokens"] else "–",
    }
    return ["", *names], [[name, *(of(f) for f in all_findings)] for name, of in measures.items()]


def architecture_rows(names, all_findings):
    """(header, rows) of the architecture's entries that differ between checkpoints."""
    keys = dict.fromkeys(key for f in all_findings for key in f["model"])
    rows = [[key, *(str(f["model"].get(key, "–")) for f in all_findings)] for key in keys if key != "parameters"]
    return ["", *names], [row for row in rows if len(set(row[1:])) > 1]


# ---------------------------------------------------------------------------------------------------- pages


def write_page(path, template, alive=(), templates=PAGES, **values):
    """Writes a page; `alive`: interactive.live of the parts whose figures answer; `templates`: the folder it is in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, PAGES]), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"visible": visible, "number": number}
    environment.globals |= {"plotly": interactive.plotly, "ratio": SPIKE_RATIO, "epsilon": PRIMARY_SINK_EPSILON}
    alive = [live for live in alive if live]
    save_text(path, environment.get_template(template).render(alive=alive, **values))


def page(path, findings, ablation=None):
    """Writes the page of a checkpoint: the findings, and the ablation if there is one."""
    parts = [
        {
            "name": name,
            "findings": found,
            "figures": drawing.for_page(figures.DETECTION, found),
            "live": interactive.live(name, found),
            "summary": summary(found) + anatomy_lines(found),
            "layers": layer_rows(found),
            "inner": inner_rows(found) if found["anatomy"] else None,
            "places": places_sentence(found) if found["anatomy"] else "",
            "heads": head_rows(found),
            "nulls": null_rows(found) if found["nulls"] else None,
            "history": history_rows(found.get("history", [])),
        }
        for name, found in parts_of(findings)
    ]
    write_page(
        path,
        "detect.html",
        alive=[part["live"] for part in parts],
        findings=findings,
        parts=parts,
        conditions=conditions(findings),
        ablations=ablation_parts(ablation) if ablation else [],
        vocabulary=vocabulary_tables(findings["vocabulary"]) if "vocabulary" in findings else [],
    )


def ablation_parts(ablation: Ablation) -> list[dict[str, Any]]:
    """What the page shows of each part of an ablation."""
    return [
        {
            "name": name,
            "found": found,
            "answers": ablation_text.answers(found),
            "table": ablation_text.rows(found),
            "classes": ablation_text.class_rows(found),
            "probes": ablation_text.probe_tables(found),
            "figures": drawing.for_page(ablation_figures.ABLATION, found),
        }
        for name, found in ablation.all_parts
    ]


def ablation_terminal(ablation: Ablation) -> str:
    """The answers, then the table of interventions, for a terminal."""
    lines = []
    for name, found in ablation.all_parts:
        lines += [f"== {name} =="] if name else []
        lines += [*ablation_text.answers(found), grid(*ablation_text.rows(found))]
        for sentence, table in ablation_text.probe_tables(found):
            lines.append(f"{sentence}\n{grid(*table)}" if table else sentence)
    return "\n\n".join([*lines, ablation.note])


def prompt_page(path, found):
    """Writes the page of a prompt."""
    parts = [
        {
            "name": name,
            "found": part,
            "sentence": prompt_sentence(part),
            "figures": drawing.for_page(figures.PROMPT, part),
            "live": interactive.live(name, part),
            "rows": prompt_rows(part),
            "heads": prompt_head_rows(part),
        }
        for name, part in parts_of(found)
    ]
    alive = [part["live"] for part in parts]
    write_page(path, "prompt.html", alive=alive, found=found, parts=parts, note=PROMPT_NOTE)


def comparison_page(path, names, all_findings):
    """Writes the page that puts checkpoints side by side."""
    pairs = list(zip(names, all_findings, strict=True))
    write_page(
        path,
        "compare.html",
        names=names,
        verdicts=pairs,
        rows=comparison_rows(names, all_findings),
        architecture=architecture_rows(names, all_findings),
        drawn=drawing.for_page(figures.COMPARISON, pairs),
        conditions=[(name, conditions(found)) for name, found in pairs],
        history=history_rows(history.of_findings(all_findings)),
    )


# --------------------------------------------------------------------------------------------- figures for a paper


def figure_files(folder, *tables):
    """Writes NAME.svg and NAME.png of every figure of (table, findings) pairs, and captions.txt; returns a line."""
    folder, captions = Path(folder), []
    for table, findings in tables:
        for part, found in parts_of(findings) if isinstance(findings, dict | Ablation) else [("", findings)]:
            for name, svg, png, caption in drawing.for_paper(table, found):
                stem = f"{part}-{name}" if part else name
                save_text(folder / f"{stem}.svg", svg)
                save_bytes(folder / f"{stem}.png", png)
                captions.append(f"{stem}: {caption}")
    save_text(folder / "captions.txt", "\n\n".join(captions) + "\n")
    return f"figures: {', '.join(caption.split(':')[0] for caption in captions)} (.svg, .png) in {folder}"
