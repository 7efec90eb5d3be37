"""Findings -> terminal table, figures, one self-contained HTML page."""

import io
import math
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .findings import save_text

TEMPLATE = Path(__file__).with_name("report.html")
SPIKE, SINK, GREY = "#c2410c", "#1d4ed8", "#78716c"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "svg.hashsalt": "spikesink",
    "figure.constrained_layout.use": True,
}


def visible(text):
    """Token text with white space that can be seen, and without control characters."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


def number(value, form=".3g"):
    """A number for a table; a dash for one that is undefined."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def interval(ci, form=".3g"):
    """A 95% interval for a table; empty if it is undefined."""
    return "" if ci is None else f"[{ci[0]:{form}}, {ci[1]:{form}}]"


def grid(header, rows):
    """Rows of text in aligned columns, the first to the left."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    align = lambda row: "  ".join(
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
    )
    return "\n".join(align(row).rstrip() for row in rows)


# ---------------------------------------------------------------------------------------------- in words


def conditions(findings):
    """Under what conditions every number of these findings was measured."""
    data, checkpoint = findings["data"], findings["checkpoint"]
    digest = (checkpoint["sha256"] or "unknown")[:12]
    start = "each starting with BOS" if data["bos"] else "no BOS"
    if data["n_register"]:
        start += f", after {data['n_register']} registers (positions count from the first register)"
    return (
        f"{data['n_seq']} sequences of {data['seq_len']} tokens of {data['name']}, {start}, {data['dtype']}; "
        f"step {checkpoint['step']}, sha256 {digest}; loss {data['loss']:.3f} nats per token"
    )


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
        f"holds {sinks['share'][0]:.1%} of all attention, {sinks['share_uniform'][0]:.1%} if attention were uniform.",
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
        f"position alone explains {number(both['lift'], '.2f')} {interval(ci['lift'], '.2f')}."
    )


def ratio_of(layer):
    """top-1 over the median of a layer; 0 where the median is."""
    return layer["top1"] / layer["median"] if layer["median"] else 0.0


def name_of(layer):
    """'embedding', 'attn 0', 'ffn 0', ..."""
    return layer["kind"] if layer["layer"] < 0 else f"{layer['kind']} {layer['layer']}"


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


def terminal(findings, heads=16):
    """The findings as text; the `heads` heads with the most attention on the first key."""
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
            grid(*layer_rows(findings)),
            grid(header, rows[:heads]) + more,
            grid(["largest tokens", "position", "occurrences", "|h|", "rules"], tokens),
            *summary(findings),
        ]
    )


def ablation_rows(ablation):
    """(header, rows) of the interventions, each followed by its controls."""
    header = ["intervention", "edited", "loss", "ppl", "delta loss", "95% interval"]
    rows = [
        ["none (baseline)", "", f"{ablation['baseline']['loss']:.4f}", f"{ablation['baseline']['ppl']:.3f}", "", ""]
    ]
    for row in ablation["interventions"]:
        for entry in (row, *row["control"]):
            label = entry["name"] if entry is row else f"  control: {entry['name']}"
            rows.append(
                [
                    label,
                    f"{entry['edited']:,}",
                    f"{entry['loss']:.4f}",
                    f"{entry['ppl']:.3f}",
                    f"{entry['delta_loss']:+.4f}" if entry["edited"] else "nothing to edit",
                    interval(entry["ci95"], "+.4f") if entry["edited"] else "",
                ]
            )
    return header, rows


# ---------------------------------------------------------------------------------------------------- page


def _svg(figure):
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _magnitudes(findings):
    figure, axes = plt.subplots(figsize=(6.2, 3.2))
    layers = findings["layers"]
    for key, style in (("top1", "-o"), ("top2", "--"), ("top3", ":")):
        axes.plot([x[key] for x in layers], style, color=SPIKE, markersize=3, label=f"{key[:3]}-{key[3]}")
    axes.plot([x["median"] for x in layers], color=GREY, label="median")
    axes.set(yscale="log", title="Largest |h| in the residual stream against its median", ylabel="|h|")
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), [name_of(x) for x in layers[::step]], rotation=40, ha="right")
    axes.legend(frameon=False, ncols=4)
    return figure


def _heads(findings):
    sinks = findings["sinks"]
    panels = {"Sink rate of the first key (0.3)": sinks["gu"]["0.3"]["by_head"], "its alpha": sinks["alpha_first"]}
    rows = len(sinks["alpha_first"])
    figure, both = plt.subplots(1, 2, figsize=(6.2, max(1.8, min(5.0, 0.35 * rows + 1.2))), sharey=True)
    for axes, (title, values) in zip(both, panels.items(), strict=True):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes.set(title=title, xlabel="head")
        for axis, n in ((axes.xaxis, len(values[0])), (axes.yaxis, rows)):
            axis.set_ticks(range(0, n, -(-n // 12)))
    both[0].set_ylabel("layer")
    figure.colorbar(image, ax=both)
    return figure


def _positions(findings):
    sinks = findings["sinks"]
    T = len(sinks["share"])
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.2, 4.4), sharex=True)
    top.plot(sinks["share"], color=SINK, label="measured")
    top.plot(sinks["share_uniform"], "--", color=GREY, label="causal-uniform")
    top.set(yscale="log", title="Share of all attention received, by position", ylabel="share")
    top.legend(frameon=False)
    for epsilon, shade in zip(("0.2", "0.3", "0.5", "0.8"), (0.35, 1.0, 0.6, 0.8), strict=True):
        curve = sinks["gu"][epsilon]["by_position"]
        bottom.plot(curve, color=SINK, alpha=shade, lw=1.8 if epsilon == "0.3" else 0.9, label=f"epsilon {epsilon}")
    bottom.axvspan(0.75 * T, T - 1, color=GREY, alpha=0.15, lw=0)
    bottom.set(
        ylim=(-0.03, 1.03),
        xlabel="position of the key (shaded: fewer than T/4 queries, no verdict rests here)",
        title="Sink rate (Gu et al.), share of heads",
        ylabel="Sink_k",
    )
    bottom.legend(frameon=False, ncols=4)
    return figure


def _tokens(findings):
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.2, 3.0))
    for axes, kind, key, color in (
        (left, "spikes", "magnitude", SPIKE),
        (right, "sinks", "alpha", SINK),
    ):
        top = findings[kind]["tokens"][:10]
        axes.barh(range(len(top)), [token[key] for token in top], color=color)
        labels = [f"{visible(token['text'])[:12]}  @{token['position']}".replace("$", r"\$") for token in top]
        axes.set_yticks(range(len(top)), labels)
        axes.invert_yaxis()
        axes.set_title("Largest |h|, by token" if kind == "spikes" else "Most attention in a head (alpha)")
    return figure


def _deltas(ablation):
    rows = [entry for row in ablation["interventions"] for entry in (row, *row["control"]) if entry["edited"]]
    figure, axes = plt.subplots(figsize=(6.2, 0.34 * len(rows) + 0.9))
    names = {row["name"] for row in ablation["interventions"]}
    for i, row in enumerate(rows):
        color = GREY if row["name"] not in names else SPIKE if row["name"].startswith("spike") else SINK
        if row["ci95"]:
            axes.plot(row["ci95"], [i, i], color=color, lw=2)
        axes.plot(row["delta_loss"], i, "o", color=color)
    labels = [row["name"] if row["name"] in names else f"control: {row['name']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set(title="Change of the loss, nats per token (95% interval)")
    return figure


def figures(findings, ablation=None):
    """{name: SVG text} of every figure of the page."""
    with plt.rc_context(STYLE):
        drawn = {
            "magnitudes": _svg(_magnitudes(findings)),
            "heads": _svg(_heads(findings)),
            "positions": _svg(_positions(findings)),
            "tokens": _svg(_tokens(findings)),
        }
        if ablation and any(row["edited"] for row in ablation["interventions"]):
            drawn["deltas"] = _svg(_deltas(ablation))
    return drawn


def page(path, findings, ablation=None):
    """Writes the self-contained HTML page: the findings, and the ablation if there is one."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["visible"] = visible
    environment.filters["number"] = number
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        findings=findings,
        figures=figures(findings, ablation),
        conditions=conditions(findings),
        summary=summary(findings),
        layers=layer_rows(findings),
        heads=head_rows(findings),
        ablation=ablation,
        ablation_table=ablation_rows(ablation) if ablation else None,
    )
    save_text(path, html)
