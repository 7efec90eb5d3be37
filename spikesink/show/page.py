"""Writes findings as self-contained HTML pages, and figures as files. It needs the extra `pages`: without it, importing
this module raises UserError."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..edit.findings import Ablation
from ..errors import extra
from ..files import save_bytes, save_text
from ..measure import history
from ..measure.findings import Findings, PromptFindings
from ..measure.sinks import PRIMARY_SINK_EPSILON
from ..measure.spikes import PRIMARY
from . import ablation_text, report
from .text import number, visible

with extra("pages"):
    import jinja2

    from . import ablation_figures, drawing, figures, interactive

PAGES = Path(__file__).with_name("pages")


def write_page(
    path: str | Path,
    template: str,
    alive: Iterable[dict[str, Any] | None] = (),
    templates: Path = PAGES,
    **values: Any,
) -> None:
    """Writes a page from a template, with `values` as its variables. `alive` holds what interactive.live returns for
    each part; `templates` is the folder of the template. Raises UserError."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, PAGES]), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"visible": visible, "number": number}
    environment.globals |= {"plotly": interactive.plotly, "spike_rule": PRIMARY.text, "epsilon": PRIMARY_SINK_EPSILON}
    alive = [live for live in alive if live]
    save_text(path, environment.get_template(template).render(alive=alive, **values))


def detection_page(path: str | Path, findings: Findings, ablation: Ablation | None = None) -> None:
    """Writes the page of a checkpoint, with its ablation if there is one. Raises UserError."""
    parts = [_detection_part(name, part) for name, part in findings.all_parts]
    write_page(
        path,
        "detect.html",
        alive=[part["live"] for part in parts],
        findings=findings,
        parts=parts,
        conditions=report.conditions(findings.checkpoint, findings.data),
        ablations=ablation_parts(ablation) if ablation else [],
        vocabulary=report.vocabulary_tables(findings.vocabulary) if findings.vocabulary else [],
    )


def _detection_part(name: str, findings: Findings) -> dict[str, Any]:
    """Returns the variables of the page for one part of the findings."""
    anatomy = findings.anatomy
    return {
        "name": name,
        "findings": findings,
        "figures": drawing.for_page(figures.DETECTION, findings),
        "live": interactive.live(name, findings.examples),
        "summary": report.summary(findings) + report.anatomy_lines(anatomy),
        "layers": report.layer_table(findings),
        "inner": report.inner_table(anatomy) if anatomy else None,
        "places": report.places_sentence(anatomy) if anatomy else "",
        "heads": report.head_table(findings),
        "nulls": report.null_table(findings) if findings.nulls else None,
        "history": report.history_table(findings.history or ()),
    }


def ablation_parts(ablation: Ablation) -> list[dict[str, Any]]:
    """Returns the variables of the page for each part of an ablation."""
    return [
        {
            "name": name,
            "note": part.note,
            "has_loss": part.has_loss,
            "answers": ablation_text.answers(part),
            "table": ablation_text.intervention_table(part),
            "classes": ablation_text.class_table(part),
            "probes": ablation_text.probe_tables(part),
            "figures": drawing.for_page(ablation_figures.ABLATION, part),
        }
        for name, part in ablation.all_parts
    ]


def prompt_page(path: str | Path, findings: PromptFindings) -> None:
    """Writes the page of a prompt. Raises UserError."""
    parts: list[dict[str, Any]] = [
        {
            "name": name,
            "sentence": report.prompt_sentence(part),
            "figures": drawing.for_page(figures.PROMPT, part),
            "live": interactive.live(name, part.examples),
            "rows": report.prompt_table(part),
            "heads": report.prompt_head_table(part),
        }
        for name, part in findings.all_parts
    ]
    alive = [part["live"] for part in parts]
    write_page(path, "prompt.html", alive=alive, findings=findings, parts=parts, note=report.PROMPT_NOTE)


def comparison_page(path: str | Path, names: Sequence[str], all_findings: Sequence[Findings]) -> None:
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
        conditions=[(name, report.conditions(f.checkpoint, f.data, not nats_note)) for name, f in pairs],
        nats_note=nats_note,
        history=report.history_table(history.findings_rows(all_findings)),
    )


def figure_files(folder: str | Path, *drawn: tuple[Mapping[str, drawing.Figure], Iterable[tuple[str, Any]]]) -> str:
    """Writes every figure as NAME.svg and NAME.png, and captions.txt. Each of `drawn` is a table of figures with the
    (name, findings) of every part. Returns a line that lists the files. Raises UserError."""
    folder, captions = Path(folder), []
    for table, parts in drawn:
        for part, findings in parts:
            for name, svg, png, caption in drawing.for_paper(table, findings):
                stem = f"{part}-{name}" if part else name
                save_text(folder / f"{stem}.svg", svg)
                save_bytes(folder / f"{stem}.png", png)
                captions.append(f"{stem}: {caption}")
    save_text(folder / "captions.txt", "\n\n".join(captions) + "\n")
    return f"figures: {', '.join(caption.split(':')[0] for caption in captions)} (.svg, .png) in {folder}"
