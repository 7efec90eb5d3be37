"""Findings -> self-contained HTML pages, and figures as files. Needs the extra `pages`: importing this raises UserError
where it is missing."""

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
    """Writes a page; `alive`: interactive.live of the parts whose figures answer; `templates`: the folder it is in.
    Raises UserError."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, PAGES]), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"visible": visible, "number": number}
    environment.globals |= {"plotly": interactive.plotly, "spike_rule": PRIMARY.text, "epsilon": PRIMARY_SINK_EPSILON}
    alive = [live for live in alive if live]
    save_text(path, environment.get_template(template).render(alive=alive, **values))


def detection_page(path: str | Path, findings: Findings, ablation: Ablation | None = None) -> None:
    """Writes the page of a checkpoint: the findings, and the ablation if there is one. Raises UserError."""
    parts = [_detection_part(name, found) for name, found in findings.all_parts]
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


def _detection_part(name: str, found: Findings) -> dict[str, Any]:
    """What the page shows of a part of the findings."""
    anatomy = found.anatomy
    return {
        "name": name,
        "findings": found,
        "figures": drawing.for_page(figures.DETECTION, found),
        "live": interactive.live(name, found.examples),
        "summary": report.summary(found) + report.anatomy_lines(anatomy),
        "layers": report.layer_table(found),
        "inner": report.inner_table(anatomy) if anatomy else None,
        "places": report.places_sentence(anatomy) if anatomy else "",
        "heads": report.head_table(found),
        "nulls": report.null_table(found) if found.nulls else None,
        "history": report.history_table(found.history or ()),
    }


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


def prompt_page(path: str | Path, found: PromptFindings) -> None:
    """Writes the page of a prompt. Raises UserError."""
    parts: list[dict[str, Any]] = [
        {
            "name": name,
            "found": part,
            "sentence": report.prompt_sentence(part),
            "figures": drawing.for_page(figures.PROMPT, part),
            "live": interactive.live(name, part.examples),
            "rows": report.prompt_table(part),
            "heads": report.prompt_head_table(part),
        }
        for name, part in found.all_parts
    ]
    alive = [part["live"] for part in parts]
    write_page(path, "prompt.html", alive=alive, found=found, parts=parts, note=report.PROMPT_NOTE)


def comparison_page(path: str | Path, names: Sequence[str], all_findings: Sequence[Findings]) -> None:
    """Writes the page that puts checkpoints side by side. Raises UserError."""
    pairs, differ = list(zip(names, all_findings, strict=True)), report.tokens_differ(all_findings)
    write_page(
        path,
        "compare.html",
        names=names,
        verdicts=pairs,
        rows=report.comparison_table(names, all_findings),
        architecture=report.architecture_table(names, all_findings),
        drawn=drawing.for_page(figures.COMPARISON, pairs),
        conditions=[(name, report.conditions(found.checkpoint, found.data, not differ)) for name, found in pairs],
        differ=differ,
        history=report.history_table(history.findings_rows(all_findings)),
    )


def figure_files(folder: str | Path, *drawn: tuple[Mapping[str, drawing.Figure], Iterable[tuple[str, Any]]]) -> str:
    """Writes NAME.svg and NAME.png of every figure of (table, parts) pairs, a part being (its name, what was found),
    and captions.txt. Returns a line that says so. Raises UserError."""
    folder, captions = Path(folder), []
    for table, parts in drawn:
        for part, found in parts:
            for name, svg, png, caption in drawing.for_paper(table, found):
                stem = f"{part}-{name}" if part else name
                save_text(folder / f"{stem}.svg", svg)
                save_bytes(folder / f"{stem}.png", png)
                captions.append(f"{stem}: {caption}")
    save_text(folder / "captions.txt", "\n\n".join(captions) + "\n")
    return f"figures: {', '.join(caption.split(':')[0] for caption in captions)} (.svg, .png) in {folder}"
