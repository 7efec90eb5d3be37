"""RESULTS.md from results/RESULTS.in.md, whose every number is taken from a study's table.json; and every table.md
anew from the rows of its table.json, by the statistics and verdicts of today.

  python -m studies.write_results

{STUDY; ARM; MEASURE}           the values of its seeds; from six on their median with its 95% interval
{STUDY; ARM - BASELINE; MEASURE}  the difference at equal tokens, = for - at equal loss
{STUDY; ARM SEED; MEASURE}      of one run; also its status, step and lr
{STUDY; ARM, ARM ...; MEASURE, MEASURE ...}  a table; * for all arms
{STUDY; ARM; KIND present}      in how many of its runs detect.py's verdict on spike, sink, co_occurrence is present
{STUDY; HYPOTHESIS}             its verdict; {STUDY; HYPOTHESIS; reason}: with the numbers for it
{STUDY; matched}                how many pairs of runs were matched at equal loss, over all arms
{STUDY; moving}                 a sentence on what still moves at the end
{STUDY; KEY}                    of the table or of the config that all arms have
{trials}                        all of results/trials.json
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from spikesink import files
from spikesink.errors import UserError, cli
from spikesink.show.text import number
from studies.hypotheses import HYPOTHESES, judge
from studies.runs.measures import measure_of
from studies.runs.rows import Done
from studies.table import Table, load_table
from studies.tables import cell, markdown, markdown_table, pairs_of, still_moving

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "results" / "RESULTS.in.md"


def of_arm(table: Table, arm: str, measure: str, between: str = " ") -> str:
    """Values or their middle, a difference, or a run's own number, in words. Raises KeyError."""
    arms = table.arms
    if arm in arms and measure.endswith(" present"):
        return f"{arms[arm].present(measure.removesuffix(' present'))} of {arms[arm].done}"
    if arm in arms:
        return cell(arms[arm].measures[measure], measure, arms[arm].done, between=between)
    name, sign, rest = arm.rpartition(" - ") if " - " in arm else arm.rpartition(" = ")
    if sign and rest == table.baseline:
        differences = table.differences[name] if sign == " - " else table.equal_loss[name].measures
        return cell(differences[measure], measure, pairs_of(table)[name], True, between)
    name, _, seed = arm.rpartition(" ")
    row = next(row for row in arms[name].seeds if str(row.seed) == seed)
    if measure in ("status", "step", "lr"):
        return str(getattr(row, measure))
    if not isinstance(row, Done):
        raise KeyError(f"{arm} is {row.status}")
    return number(row.measures[measure], measure_of(measure).form)


def filled(field: str, tables: Mapping[str, Table]) -> str:
    """What stands for one field. Raises UserError."""
    if field == "trials":
        return trials()
    try:
        study, *path = (" ".join(part.split()) for part in field.split(";"))
        table = tables[study]
        if path[0] in HYPOTHESES:
            of = judge(table)[path[0]]
            return of.verdict if len(path) == 1 else f"{of.verdict}: {of.reason}".replace("|", "\\|")
        if path == ["moving"]:
            return still_moving(table)
        if path == ["matched"]:
            found = table.equal_loss.values()
            return f"{sum(of.matched for of in found)} of {sum(of.of for of in found)}"
        if len(path) == 1:
            value = (table.config | vars(table))[path[0]]
            return f"{value:,}" if isinstance(value, int) else str(value)
        arms, measures = path
        many = list(table.arms) if arms == "*" else arms.split(", ")
        if arms != "*" and len(many) == 1 and ", " not in measures:
            return of_arm(table, arms, measures, ", ")
        names = measures.split(", ")
        return "\n".join(
            markdown_table(["arm", *names], [[arm, *(of_arm(table, arm, name) for name in names)] for arm in many])
        )
    except (KeyError, StopIteration, ValueError, AttributeError) as error:
        raise UserError(f"{TEMPLATE.name}: {{{field}}} names nothing in results/*/table.json ({error})") from None


def trials() -> str:
    """The single runs by which the scales were found."""
    rows = json.loads((ROOT / "results" / "trials.json").read_text())
    text = lambda value: "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return "\n".join(markdown_table(list(rows[0]), [list(map(text, row.values())) for row in rows]))


def render() -> str:
    """The text of RESULTS.md."""
    tables = {path.parent.name: load_table(path) for path in (ROOT / "results").glob("*/table.json")}
    return re.sub(r"\{([^{}]+)\}", lambda match: filled(match[1], tables), TEMPLATE.read_text())


def main() -> None:
    for path in (ROOT / "results").glob("*/table.json"):
        files.save_text(path.with_name("table.md"), markdown(load_table(path)))
    (ROOT / "RESULTS.md").write_text(render())
    print("results/*/table.md, RESULTS.md")


if __name__ == "__main__":
    cli(main)
