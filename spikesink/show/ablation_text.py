"""Ablation findings -> answers in words, and tables."""

from ..measure.findings import Place
from .text import interval, number

NOTHING = "nothing to edit"


def _effect(entry):
    """'+0.0409 [+0.0336, +0.0486]'."""
    return f"{entry['delta_loss']:+.4f} {interval(entry['ci95'], '+.4f')}".strip()


def _beside(entry):
    """An effect beside its controls, in words."""
    controls = [c for c in entry["control"] if c["edited"]]
    words = "; ".join(f"{c['name'].replace('_', ' ')} {_effect(c)}" for c in controls)
    return f"{_effect(entry)} nats per token" + (f" (controls: {words})" if words else "")


def answers(found):
    """What spikes do, what sinks do, whether one needs the other, whether sinks make attention short-ranged."""
    by_name = {entry["name"]: entry for entry in found["interventions"] + found["removals"]}
    sentences = {
        "spike_zero": "What are the spikes for? Zeroing them changes the loss by {}.",
        "spike_mean": "Does their value matter? Setting each to its mean on other text changes it by {}.",
        "spike_constant": "Are spike tokens constants? Giving them one constant state per layer changes it by {}.",
        "sink_mask": "What are the sinks for? Masking them changes the loss by {}.",
    }
    asked = {name: by_name[name] for name in sentences if name in by_name}
    lines = [sentences[name].format(_beside(entry)) for name, entry in asked.items() if entry["edited"]]
    missing = dict.fromkeys(
        f"The model has no {entry['kind']}s on this text." for entry in asked.values() if not entry["edited"]
    )
    lines += missing
    return lines + _needs(found["two_by_two"]) + _short_range(found["attention"]) + _quantised(found)


def _needs(cells):
    words = {
        "yes": "yes",
        "no": "no",
        "unclear": "unclear",
        "underpowered": "underpowered: too few sequences have what would be removed and what would be left",
    }
    lines = []
    for removed, asked in (("spikes", "sinks"), ("sinks", "spikes")):
        cell = cells.get(f"remove_{removed}")
        if not cell:
            continue
        left = cell[f"{asked}_remain"]
        line = f"Do {asked} need {removed}? {words[cell['needs']].capitalize()}"
        if left["same"] is not None and cell["edited"]:
            controls = ", ".join(
                f"{c[f'{asked}_remain']['same']:.0%} under {c['name'].replace('_', ' ')}" for c in cell["control"]
            )
            ci = left["ci95"] and left["ci95"]["same"]
            line += (
                f". With {removed} removed ({cell['by']}) {left['same']:.0%} {interval(ci, '.0%')} of the "
                f"{asked} remain" + (f"; {controls}" if controls else "") + f" ({left['sequences']} sequences)"
            )
        lines.append(line + ".")
    return lines


def _short_range(attention):
    if not attention["sequences"]:
        return []
    parts = [
        f"{kind} {of['with_sink']:.2f} -> {of['without_sink']:.2f} {unit} (change {of['change']:+.2f} "
        f"{interval(of['ci95'], '+.2f')}; random keys {of['control']['change']:+.2f})"
        for kind, unit, of in (
            ("entropy", "nats", attention["entropy"]),
            ("mean distance", "tokens", attention["distance"]),
        )
    ]
    return [f"What do heads look at without their sink keys? In heads that have sinks: {', '.join(parts)}."]


def _quantised(found):
    of = found["int8"]
    if "reason" in of:
        return [f"Does int8 break it? Not tried: {of['reason']}."]
    cost = lambda entry: f"{entry['delta_loss']:+.4f} {interval(entry['ci95'], '+.4f')}"
    parts = [
        f"{cost(entry)} with scales {name.replace('_', ' ')} (activations alone {cost(entry['activations_only'])})"
        for name, entry in of.items()
    ]
    return [f"Do they break int8? Weights and activations in 8 bits change the loss by {'; '.join(parts)}."]


def rows(found):
    """(header, rows) of the interventions, each followed by its controls."""
    header = ["intervention", "edited", "loss", "ppl", "delta loss", "95% interval", "spikes left", "sinks left"]
    base = found["baseline"]
    table = [["none (baseline)", "", f"{base['loss']:.4f}", f"{base['ppl']:.3f}", "", "", "", ""]]
    share = lambda left: "–" if left["same"] is None else f"{left['same']:.0%}"
    for row in found["interventions"] + found["removals"]:
        for entry in (row, *(row["control"] if row["edited"] else ())):
            done = bool(entry["edited"])
            table.append(
                [
                    entry["name"] if entry is row else f"  control: {entry['name']}",
                    f"{entry['edited']:,}",
                    f"{entry['loss']:.4f}",
                    f"{entry['ppl']:.3f}",
                    f"{entry['delta_loss']:+.4f}" if done else NOTHING,
                    interval(entry["ci95"], "+.4f") if done else "",
                    share(entry["spikes_left"]) if done else "",
                    share(entry["sinks_left"]) if done else "",
                ]
            )
    return header, table


def class_rows(found):
    """(header, rows): the change of the loss of predictions made at each class of tokens."""
    classes = found["baseline"]["by_class"]
    header = ["intervention", *(f"at {name} ({of['tokens']:,})" for name, of in classes.items())]
    cell = lambda of: "–" if of["delta_loss"] is None else f"{of['delta_loss']:+.4f} {interval(of['ci95'], '+.3f')}"
    table = [["loss, clean", *(number(of["loss"], ".4f") for of in classes.values())]]
    for entry in found["interventions"] + found["removals"]:
        if entry["edited"]:
            table.append([entry["name"], *(cell(of) for of in entry["by_class"].values())])
    return header, table


def probe_tables(found):
    """[(sentence, (header, rows))] of the probes; no table for one that was not run, but the reason."""
    make = {"blimp": _blimp_table, "linear": _linear_table}
    return [
        (f"Not probed: {of['reason']}.", None) if "reason" in of else make[name](of)
        for name, of in found["probes"].items()
    ]


def _label(name):
    """A condition's name in a table: a control stands below its intervention."""
    return f"  control: {name.split('/')[1]}" if "/" in name else name


def _starred(change, ci, form="+.1%"):
    """A change, with a star if its interval leaves out 0."""
    return f"{change:{form}}" + ("*" if ci and (ci[0] > 0 or ci[1] < 0) else "")


STARS = "* the 95% interval leaves out 0, which one in twenty does by chance"


def _blimp_table(of):
    """BLiMP: accuracy in all, then by field: first the clean model's, then changes."""
    fields = list(of["conditions"][0]["by_field"])
    header = ["BLiMP under", "accuracy", "95% interval", "change", "95% interval", *fields]
    table = []
    for i, row in enumerate(of["conditions"]):
        parts = [row["by_field"][field] for field in fields]
        cells = [_starred(p["change"], p["change_ci95"]) if i else f"{p['accuracy']:.1%}" for p in parts]
        changed = [f"{row['change']:+.1%}", interval(row["change_ci95"], "+.1%")] if i else ["", ""]
        table.append([_label(row["name"]), f"{row['accuracy']:.1%}", interval(row["ci95"], ".1%"), *changed, *cells])
    left_out = f", {of['left_out']} left out as too long" if of["left_out"] else ""
    return (
        f"Grammar: BLiMP, {of['pairs']} minimal pairs{left_out}; {of['normalisation']}. Chance is 50%. By field: the "
        f"accuracy of the clean model, then changes; semantics holds quantifiers and NPIs. {STARS}.",
        (header, table),
    )


def _linear_table(of):
    """Linear probes on the last tap: the clean model's accuracy and selectivity, then changes of both."""
    header = ["linear probe under"]
    for task in of["conditions"][0]["tasks"]:
        header += [f"{task}: accuracy", "selectivity", "95% interval"]
    table = []
    for n, row in enumerate(of["conditions"]):
        cells = []
        for taps in row["tasks"].values():
            tap = taps[-1]
            if n:
                cells += [_starred(tap["accuracy_change"], tap["accuracy_change_ci95"])]
                cells += [_starred(tap["change"], tap["change_ci95"]), interval(tap["change_ci95"], "+.1%")]
            else:
                cells += [
                    f"{tap['accuracy']:.1%}",
                    f"{tap['selectivity']:.1%}",
                    interval(tap["selectivity_ci95"], ".1%"),
                ]
        table.append([_label(row["name"]), *cells])
    last = next(iter(of["conditions"][0]["tasks"].values()))[-1]
    last_tap = Place(layer=last["layer"], kind=last["kind"]).name
    majority = ", ".join(f"{task} {value:.1%}" for task, value in of["majority"].items())
    return (
        f"What can be read off the states after {last_tap}: linear probes on UD English EWT, "
        f"{of['words']['test']} test words; the commonest answer alone: {majority}. Selectivity: accuracy minus that "
        f"of a control task (Hewitt and Liang 2019). First the clean model, then changes. {STARS}.",
        (header, table),
    )
