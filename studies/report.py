"""A study's page and figures."""

from pathlib import Path

from spikesink.show import drawing, page
from studies import figures, hypotheses, tables
from studies.table import Table

PAGES = Path(__file__).with_name("pages")


def study_page(folder: str | Path, table: Table) -> None:
    """Writes a study's page, and its figures for a paper."""
    folder = Path(folder)
    page.write_page(
        folder / "index.html",
        "study.html",
        templates=PAGES,
        study=table,
        counts=tables.counts(table),
        moving=tables.still_moving(table),
        judged=hypotheses.judge(table),
        sections=tables.sections(table),
        conditions=tables.conditions(table),
        note=tables.NOTE,
        differs=tables.DIFFERS,
        drawn=drawing.for_page(figures.STUDY, table),
    )
    page.figure_files(folder / "figures", (figures.STUDY, [("", table)]))
