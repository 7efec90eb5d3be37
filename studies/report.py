"""A study's and a mitigation's pages, figures and tables."""

from pathlib import Path
from typing import Any

from spikesink.show import drawing, page, report
from spikesink.show.text import grid, interval, number
from studies import figures, mitigation_figures, tables
from studies.table import Table
from studies.tables import Rows

Json = dict[str, Any]  # findings of mitigate, or a part of them
PAGES = Path(__file__).with_name("pages")


def of_seeds(value: Json, form: str = ".3g") -> str:
    """A number that seeds differ in, for a table: its mean, and where there are several its extremes."""
    mean, low, high = (number(value[key], form) for key in ("mean", "lowest", "highest"))
    return mean if low == high else f"{mean} [{low}, {high}]"


def models_of(mitigation: Json) -> list[tuple[str, Json]]:
    """[(name, its entry)] of the checkpoint before and of every arm after fine-tuning."""
    return [("before", mitigation["before"]), *((arm["name"], arm) for arm in mitigation["arms"])]


def paired(effect: Json | None) -> str:
    """A change of the loss and its interval, for a table; empty where there is none."""
    return f"{effect['delta_loss']:+.4f} {interval(effect['ci95'], '+.4f')}" if effect else ""


def mitigation_rows(mitigation: Json) -> Rows:
    """(header, rows) of the answer: is the spike gone, what did it cost, what does int8 cost then."""
    costs = {f"{granularity.replace('_', ' ')} int8 costs": granularity for granularity in mitigation["before"]["int8"]}
    header = ["", "top1/median", "loss", "against none", *costs]
    rows = [
        [
            name,
            of_seeds(of["top1_over_median"], ".1f"),
            of_seeds(of["loss"], ".4f"),
            paired(of.get("against_none")),
            *(of_seeds(of["int8"][granularity]["delta_loss"], "+.4f") for granularity in costs.values()),
        ]
        for name, of in models_of(mitigation)
    ]
    return header, rows


def phenomena_rows(mitigation: Json) -> Rows:
    """(header, rows) of what detect.py finds in every arm."""
    header = ["", "against before", "with a spike", "Sink_1 (0.3)", "best head, of sequences"]
    counted = lambda verdicts: ", ".join(word if len(verdicts) == 1 else f"{n} {word}" for word, n in verdicts.items())
    rows = [
        [
            name,
            paired(of.get("against_before")),
            of_seeds(of["spike_sequences"], ".0%"),
            of_seeds(of["sink_1"], ".1%"),
            of_seeds(of["sink_sequences"], ".0%"),
            *(counted(verdict) for verdict in of["verdicts"].values()),
        ]
        for name, of in models_of(mitigation)
    ]
    return [*header, *(name.replace("_", "-") for name in mitigation["before"]["verdicts"])], rows


def int8_rows(mitigation: Json) -> Rows:
    """(header, rows) of the loss of every arm in int8, and of what either half of it costs; a row per granularity."""
    rows = []
    for name, of in models_of(mitigation):
        for granularity, int8 in of["int8"].items():
            costs = (int8, int8["weights_only"], int8["activations_only"])
            deltas = [of_seeds(cost["delta_loss"], "+.4f") for cost in costs]
            rows.append([f"{name}, {granularity.replace('_', ' ')}", of_seeds(int8["loss"], ".4f"), *deltas])
    return ["", "loss in int8", "costs", "weights alone", "activations alone"], rows


def fine_tuning(mitigation: Json) -> list[str]:
    """How the arms were trained, and what each adds, in sentences."""
    of = mitigation["training"]
    keys = lambda arm: ", ".join(f"{key}={value}" for key, value in arm["changes"].items())
    return [
        f"Fine-tuned with {of['seeds']} seed{'s' * (of['seeds'] > 1)}: {of['steps']} steps of "
        f"{of['tokens_per_step']:,} tokens of {of['dataset']}, {of['optimizer']}, learning rate "
        f"{of['learning_rate']:g} (warmup {of['warmup_iters']}).",
        *(f"{arm['name']} adds {arm['adds']}{keys(arm) and f': {keys(arm)}'}." for arm in mitigation["arms"]),
    ]


def conditions(mitigation: Json) -> str:
    """Under what conditions the checkpoint was measured."""
    return report.conditions(mitigation["checkpoint"], mitigation["data"])


def mitigation_terminal(mitigation: Json) -> str:
    """A mitigation's findings as text."""
    return "\n\n".join(
        [
            f"measured on {conditions(mitigation)}",
            " ".join(fine_tuning(mitigation)),
            grid(*mitigation_rows(mitigation)),
            grid(*phenomena_rows(mitigation)),
            grid(*int8_rows(mitigation)),
            mitigation["note"],
        ]
    )


def mitigation_page(path: str | Path, mitigation: Json) -> None:
    """Writes the page of a mitigation."""
    page.write_page(
        path,
        "mitigate.html",
        templates=PAGES,
        found=mitigation,
        conditions=conditions(mitigation),
        fine_tuning=fine_tuning(mitigation),
        rows=mitigation_rows(mitigation),
        phenomena=phenomena_rows(mitigation),
        int8=int8_rows(mitigation),
        drawn=drawing.for_page(mitigation_figures.MITIGATION, models_of(mitigation)),
    )


def study_page(folder: str | Path, table: Table) -> None:
    """Writes a study's page, and its figures for a paper."""
    folder = Path(folder)
    page.write_page(
        folder / "index.html",
        "study.html",
        templates=PAGES,
        found=table,
        counts=tables.counts(table),
        judged=tables.judged(table),
        sections=tables.sections(table),
        conditions=tables.conditions(table),
        note=tables.NOTE,
        differs=tables.DIFFERS,
        drawn=drawing.for_page(figures.STUDY, table),
    )
    page.figure_files(folder / "figures", (figures.STUDY, [("", table)]))
