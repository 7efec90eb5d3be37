"""Writes RESULTS.md from results/RESULTS.in.md, with every number taken from a study's table.json. It also writes every
table.md again from the rows of its table.json, so that today's statistics and verdicts apply.

  python -m studies.write_results

{STUDY; ARM; MEASURE}           the values of the arm's seeds; from six seeds on, their median with its 95% interval
{STUDY; ARM - BASELINE; MEASURE}  the difference at equal tokens; with = in place of -, at equal loss
{STUDY; ARM; MEASURE; FORM}     the values of its runs that have it, printed by FORM
{STUDY; ARM SEED; MEASURE}      the number of one run; also its status, step and lr
{STUDY; ARM, ARM ...; MEASURE, MEASURE ...}  a table; * stands for all arms
{STUDY; ARM; exposed left EDIT CONTROL}  see `values_of`
{STUDY; ARM, ARM ...; range MEASURE}     the least to the largest share
{STUDY; ARM; KIND present}      the number of its runs whose verdict on KIND (spike, sink, co_occurrence) is present
{STUDY; HYPOTHESIS}             the verdict; {STUDY; HYPOTHESIS; reason} adds the numbers behind it
{STUDY; matched}                the number of pairs of runs that match at equal loss, over all arms
{STUDY; moving}                 a sentence on what still moves at the end
{STUDY; KEY}                    a field of the table, or a key of the baseline's config
{STUDY; ARM; MEASURE; p}        a planned contrast's p, by Holm's correction
{FILE.json; KEY; KEY ...; FORM}   a number of a file in results/, printed by FORM
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from spikesink import files
from spikesink.errors import UserError, cli
from spikesink.show.text import number
from studies.aggregate import known
from studies.hypotheses import HYPOTHESES, judge
from studies.runs.measures import measure_of
from studies.runs.rows import Done
from studies.table import Table, load_table
from studies.tables import cell, markdown, markdown_table, shared_seeds, still_moving

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "results" / "RESULTS.in.md"


def cell_text(table: Table, arm: str, measure: str, separator: str = " ") -> str:
    """The text for an arm, for its difference from the baseline, or for one run. Raises KeyError."""
    arms = table.arms
    if arm in arms and measure.startswith("exposed left "):
        return separator.join(f"{share:.0%}" for share in values_of(table, arm, measure)) or "–"
    if arm in arms and measure.endswith(" present"):
        return f"{arms[arm].present(measure.removesuffix(' present'))} of {arms[arm].done}"
    if arm in arms:
        return cell(arms[arm].measures[measure], measure, arms[arm].done, separator=separator)
    name, sign, rest = arm.rpartition(" - ") if " - " in arm else arm.rpartition(" = ")
    if sign and rest == table.baseline:
        differences = table.differences[name] if sign == " - " else table.equal_loss[name].measures
        return cell(differences[measure], measure, shared_seeds(table)[name], True, separator)
    name, _, seed = arm.rpartition(" ")
    row = next(row for row in arms[name].seeds if str(row.seed) == seed)
    if measure in ("status", "step", "lr"):
        return str(getattr(row, measure))
    if not isinstance(row, Done):
        raise KeyError(f"{arm} is {row.status}")
    return number(row.measures[measure], measure_of(measure).form)


def values_of(table: Table, name: str, measure: str) -> list[float]:
    """A measure of the runs that have it. `exposed left EDIT CONTROL`: the share of the sinks downstream that stay;
    `first is sink`: the share of sequences whose first token is one."""
    arm = table.arms[name]
    if measure == "first is sink":
        rows = [(row.measures["sink tokens"], row.measures["sinks first"]) for row in arm.ended.values()]
        return [(tokens or 0) * (first or 0) * table.measured.seq_len for tokens, first in rows]
    if not measure.startswith("exposed left "):
        return known(arm.measures[measure].values)
    edit, control = [*measure.split()[2:], ""][:2]
    effects = [row.ablations.interventions[edit] for row in arm.ended.values() if row.ablations.interventions]
    entries = [next(c for c in effect.control if c.name == control) for effect in effects] if control else effects
    return [entry.exposed.left for entry in entries if entry.exposed]


def filled(field: str, tables: Mapping[str, Table]) -> str:
    """The text that replaces one {field}. Raises UserError."""
    study, *path = (" ".join(part.split()) for part in field.split(";"))
    try:
        if study.endswith(".json"):
            content = json.loads((TEMPLATE.parent / study).read_text())
            return number(functools.reduce(lambda entry, key: entry[key], path[:-1], content), path[-1])
        table = tables[study]
        if path[-1] == "p":
            return next(f"{c.p_holm:.3g}" for c in table.contrasts if [c.arm, c.measure] == path[:2])
        if path[0] in HYPOTHESES:
            verdict = judge(table)[path[0]]
            return verdict.verdict if len(path) == 1 else f"{verdict.verdict}: {verdict.reason}".replace("|", "\\|")
        if path == ["moving"]:
            return still_moving(table)
        if path == ["matched"]:
            arms = table.equal_loss.values()
            return f"{sum(arm.matched for arm in arms)} of {sum(arm.pairs for arm in arms)}"
        if len(path) == 1:
            value = (table.config | vars(table))[path[0]]
            return f"{value:,}" if isinstance(value, int) else str(value)
        if len(path) == 3 and path[0] in table.arms:
            return ", ".join(number(x, path[2]) for x in values_of(table, *path[:2]))
        arm, measure = path
        if measure.startswith("range "):
            values = [x for name in arm.split(", ") for x in values_of(table, name, measure.removeprefix("range "))]
            return f"{min(values):.0%} to {max(values):.0%}"
        arm_names = list(table.arms) if arm == "*" else arm.split(", ")
        if arm != "*" and len(arm_names) == 1 and ", " not in measure:
            return cell_text(table, arm, measure, ", ")
        measures = measure.split(", ")
        rows = [[name, *(cell_text(table, name, m) for m in measures)] for name in arm_names]
        return "\n".join(markdown_table(["arm", *measures], rows))
    except (KeyError, StopIteration, ValueError, AttributeError, OSError, TypeError) as error:
        raise UserError(f"{TEMPLATE.name}: {{{field}}} names nothing in results/*/table.json ({error})") from None


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
