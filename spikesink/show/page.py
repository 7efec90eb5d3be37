"""Writes findings as self-contained HTML pages, and figures as files. It needs the extra `pages`: without it, importing
this module raises UserError."""

import base64
import functools
import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..edit.findings import Ablation
from ..errors import extra
from ..files import save_bytes, save_text
from ..measure import history
from ..measure.findings import ExamplesEntry, Findings, PromptFindings
from ..measure.sinks import PRIMARY_SINK_EPSILON
from ..measure.spikes import PRIMARY
from ..schema import to_json
from . import ablation_text, report
from .text import number, table, visible

with extra("pages"):
    import jinja2
    from plotly.offline import get_plotlyjs

    from . import ablation_figures, drawing, figures

PAGES = Path(__file__).with_name("pages")
# a table of figures, and the (name, findings) of every part that is drawn; pages return those that they show
Drawings = tuple[Mapping[str, drawing.Figure], Iterable[tuple[str, Any]]]


def write_page(
    path: str | Path, template: str, parts: Sequence[dict[str, Any]] = (), templates: Path = PAGES, **values: Any
) -> None:
    """Writes a page from a template, with `parts` and `values` as its variables; what `_live` returns for a part is its
    "live". `templates` is the folder of the template. Raises UserError."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, PAGES]), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"visible": visible, "number": number}
    environment.globals |= {"plotly": _plotly, "spike_rule": PRIMARY.text, "epsilon": PRIMARY_SINK_EPSILON}
    alive = [part["live"] for part in parts if part["live"]]
    save_text(path, environment.get_template(template).render(parts=parts, alive=alive, **values))


def detection_page(path: str | Path, findings: Findings, ablation: Ablation | None = None) -> list[Drawings]:
    """Writes the page of a checkpoint, with its ablation if there is one. Raises UserError."""
    write_page(
        path,
        "detect.html",
        [_detection_part(name, part) for name, part in findings.all_parts],
        findings=findings,
        conditions=report.conditions(findings),
        ablations=ablation_parts(ablation) if ablation else [],
        vocabulary=report.vocabulary_tables(findings.vocabulary) if findings.vocabulary else [],
    )
    return detection_figures(findings, ablation)


def detection_figures(findings: Findings, ablation: Ablation | None = None) -> list[Drawings]:
    """Returns the figures of a checkpoint, and of its ablation if there is one."""
    drawn: list[Drawings] = [(figures.DETECTION, findings.all_parts)]
    return [*drawn, (ablation_figures.ABLATION, ablation.all_parts)] if ablation else drawn


def _detection_part(name: str, findings: Findings) -> dict[str, Any]:
    """Returns the variables of the page for one part of the findings."""
    anatomy = findings.anatomy
    return {
        "name": name,
        "findings": findings,
        "figures": drawing.for_page(figures.DETECTION, findings),
        "live": _live(name, findings.examples),
        "summary": report.summary(findings) + report.anatomy_lines(anatomy),
        "layers": report.layer_table(findings),
        "inner": report.inner_table(anatomy) if anatomy else None,
        "places": report.places_sentence(anatomy) if anatomy else "",
        "heads": report.head_table(findings),
        "nulls": report.null_table(findings) if findings.nulls else None,
        "history": table(report.HISTORY, findings.history or ()),
    }


def ablation_parts(ablation: Ablation) -> list[dict[str, Any]]:
    """Returns the variables of the page for each part of an ablation."""
    return [
        {
            "name": name,
            "note": part.note,
            "has_loss": part.has_loss,
            "answers": ablation_text.answers(part),
            "causes": ablation_text.cause_tables(part),
            "table": ablation_text.intervention_table(part),
            "classes": ablation_text.class_table(part),
            "probes": ablation_text.probe_tables(part),
            "figures": drawing.for_page(ablation_figures.ABLATION, part),
        }
        for name, part in ablation.all_parts
    ]


def prompt_page(path: str | Path, findings: PromptFindings) -> list[Drawings]:
    """Writes the page of a prompt. Raises UserError."""
    parts: list[dict[str, Any]] = [
        {
            "name": name,
            "sentence": report.prompt_sentence(part),
            "figures": drawing.for_page(figures.PROMPT, part),
            "live": _live(name, part.examples),
            "rows": report.prompt_table(part),
            "heads": report.prompt_head_table(part),
        }
        for name, part in findings.all_parts
    ]
    write_page(path, "prompt.html", parts, findings=findings, note=report.PROMPT_NOTE)
    return [(figures.PROMPT, findings.all_parts)]


def comparison_page(path: str | Path, names: Sequence[str], all_findings: Sequence[Findings]) -> list[Drawings]:
    """Writes the page that compares checkpoints side by side. Raises UserError."""
    pairs, nats_note = list(zip(names, all_findings, strict=True)), report.nats_note(all_findings)
    write_page(
        path,
        "compare.html",
        names=names,
        verdicts=pairs,
        rows=report.comparison_table(names, all_findings),
        architecture=report.architecture_table(names, all_findings),
        drawn=drawing.for_page(figures.COMPARISON, pairs),
        conditions=[(name, report.conditions(f, not nats_note)) for name, f in pairs],
        nats_note=nats_note,
        history=table(report.HISTORY, history.findings_rows(all_findings)),
    )
    return [(figures.COMPARISON, [("", pairs)])]


def figure_files(folder: str | Path, *drawn: Drawings) -> str:
    """Writes every figure as NAME.svg and NAME.png, and captions.txt. Returns a line that lists the files. Raises
    UserError."""
    folder, captions = Path(folder), []
    for by_name, parts in drawn:
        for part, findings in parts:
            for name, svg, png, caption in drawing.for_paper(by_name, findings):
                stem = f"{part}-{name}" if part else name
                save_text(folder / f"{stem}.svg", svg)
                save_bytes(folder / f"{stem}.png", png)
                captions.append(f"{stem}: {caption}")
    save_text(folder / "captions.txt", "\n\n".join(captions) + "\n")
    return f"figures: {', '.join(caption.split(':')[0] for caption in captions)} (.svg, .png) in {folder}"


# -------------------------------------------------------------------------------------------- interactive figures

CAPTIONS = {  # of the interactive figures; the still ones have captions of their own
    "text": (
        "The text, token by token. You choose what the colour shows: magnitudes, on a log scale, or attention, on a "
        "linear one. Point at a token, tap it or use the arrow keys to read its numbers. ␣ is a space, ⏎ a new line."
    ),
    "matrix": (
        "|h| of every token and channel in the first sequence, after the layer that you choose. Drag to turn it. In a "
        "model of many channels, neighbouring channels share a column, which shows the largest of them; the most "
        "extreme channels have columns of their own. Colour: |h| divided by the layer's median, on a log scale."
    ),
}


def _live(name: str, examples: ExamplesEntry | None) -> dict[str, Any] | None:
    """Returns what the interactive figures of one part need; None if the findings hold no text of it."""
    if examples is None:
        return None
    matrices = examples.matrices
    sequences = [replace(s, texts=[visible(text) for text in s.texts]) for s in examples.sequences]
    return {
        "id": name,
        "data_id": f"examples-{name}",
        "captions": CAPTIONS,
        "data": {
            **to_json(replace(examples, sequences=sequences)),
            "best_layer": figures.best_layer(examples),
            "best_matrix": matrices.index(figures.largest_matrix(examples)[0]) if matrices else None,
            "epsilon": PRIMARY_SINK_EPSILON,
        },
    }


@functools.cache
def _plotly() -> str:
    """Returns plotly.js as gzip in base64. A page inflates it when its 3-D figure comes into view."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
