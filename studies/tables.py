"""A study's table as text: for the terminal, for Markdown, and for its page."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from spikesink.measure.findings import SCHEMA
from spikesink.measure.spikes import SPIKE_RATIO
from spikesink.show.text import format_interval, grid, number
from studies import aggregate
from studies.aggregate import MIN_SEEDS, Change, Estimate, estimate, last_tenth, moves, onset
from studies.hypotheses import judge
from studies.runs.measures import measure_of
from studies.runs.rows import DIVERGED, DONE, NOT_RUN, STARTED, Done, Ended
from studies.table import Table

Rows = tuple[list[str], list[list[str]]]  # a header, and the rows below it
RowsOf = Callable[[Table], Rows]
SECTIONS: list[tuple[str, str, RowsOf]] = []  # (title, note, function for its rows), in their order

# the measures that the tables show; table.json has all of them
SHOWN = (
    *("loss", "top1/median", "largest |h|", "kurtosis", "spike tokens", "Sink_1", "best head", "sink tokens"),
    *("P(sink | spike)", "P(spike | sink)"),
)
COMPARED = ("loss", "top1/median", "kurtosis", "Sink_1", "best head", "P(sink | spike)", "P(spike | sink)")
SATURATES = ("loss", "top1/median", "Sink_1")  # measures for which we say whether they still move at the end
INT8 = ("int8 per tensor: loss", "int8 per channel: loss")
STARTED_FROM = ("short loss", "top1/median", "kurtosis", "spike sequences", "Sink_1", "best head", *INT8)
DIFFERS = (
    "Published: Sun et al. 2026 (arXiv 2603.05498), one run per arm, 7B parameters, 100B tokens, T 4096, Llama's block "
    "(RMSNorm, RoPE, SwiGLU): perplexity, sink rate in %, largest |h|. Our runs differ in size, tokens, length, block "
    "and text, so only directions can be compared, not numbers."
)
OLD_RULES = (
    "These numbers were measured by older rules: any |h| of 30 times its layer's median counted as a spike, even in an "
    "outlier channel, and a post-norm stream was read only behind its norm. They are being measured again."
)
NOTE = " ".join((aggregate.__doc__ or "").partition("\n\n")[2].split())


def cell(result: Estimate | None, name: str, runs: int, difference: bool = False, separator: str = " ") -> str:
    """The values of fewer than MIN_SEEDS seeds, else the median with its interval. If only some of the `runs` have the
    measure, their number follows. A difference has a sign."""
    measure = measure_of(name)
    form = measure.form
    if difference:
        form = ".2f" if measure.kind == "log" else form if form.startswith("+") else f"+{form}"
    if not result or result.middle is None:
        return "–"
    sign = "×" if difference and measure.kind == "log" else ""
    shown = result.values if result.n < MIN_SEEDS and not result.ci95 else [result.middle]
    words = separator.join(f"{sign}{number(x, form)}" for x in shown)
    some = f"({result.n} of {runs})" if result.n < runs else ""
    return " ".join(filter(None, (words, format_interval(result.ci95, form), some))) or "–"


def cells(results: Mapping[str, Estimate], names: Iterable[str], runs: int, difference: bool = False) -> Iterator[str]:
    """A cell for each of these measures."""
    return (cell(results.get(name), name, runs, difference) for name in names)


def section(title: str, note: str) -> Callable[[RowsOf], RowsOf]:
    """Makes the rows that a function returns the next section of a table. It is left out if there are none."""

    def added(rows: RowsOf) -> RowsOf:
        SECTIONS.append((title, note, rows))
        return rows

    return added


@section(
    "The arms at the end of training",
    f"The cells show the values of the seeds; from {MIN_SEEDS} seeds on, their median [95% interval].",
)
def arm_rows(table: Table) -> Rows:
    header = ["arm", "changes", "params (M)", "ended", *SHOWN]
    header += ["published ppl, sink %, |h|"] if table.published else []
    rows = []
    for name, arm in table.arms.items():
        ended = f"{arm.done} of {len(arm.seeds)}" + (f", {arm.diverged} diverged" if arm.diverged else "")
        parameters = f"{arm.parameters / 1e6:.3f}" + ("" if table.matched(name) else " (not matched)")
        changes = ", ".join(f"{key}={value}" for key, value in arm.changes.items()) or "the baseline"
        row = [name, changes, parameters, ended, *cells(arm.measures, SHOWN, arm.done)]
        if table.published:
            row.append(", ".join(number(x, "g") for x in table.published.get(name, ())) or "–")
        rows.append(row)
    return header, rows


def shared_seeds(table: Table) -> dict[str, int]:
    """{arm: number of seeds with which both the arm and the baseline are done}."""
    return {name: len(arm.ended.keys() & table.base.ended.keys()) for name, arm in table.others.items()}


def compared(table: Table) -> list[str]:
    """The measures in which arms are compared."""
    return [*COMPARED, *(name for name in INT8 if name in table.base.measures)]


@section(
    "Before and after",
    "At step 0 an arm is the checkpoint plus what the arm adds. Measured on detect.py's sequences.",
)
def start_rows(table: Table) -> Rows:
    rows = []
    for name, arm in table.arms.items() if table.config.get("init_from", "scratch") != "scratch" else ():
        courses = [row.course for row in arm.ended.values()]
        for step, i in ("step 0", 0), ("end", -1):
            results = {m: estimate(course[i].measures.get(m) for course in courses) for m in STARTED_FROM}
            rows.append([f"{name}, {step}", *cells(results, STARTED_FROM, arm.done)])
    return ["arm", *STARTED_FROM], rows


@section(
    "Planned contrasts",
    "These were written in the study file before it ran. They are the only comparisons that are tested, by exact "
    "permutation tests with Holm's correction over all of them.",
)
def contrast_rows(table: Table) -> Rows:
    header = ["arm", "measure", "the arm's", "the baseline's", "difference", "p", "p, Holm", "result"]
    rows = []
    for contrast in table.contrasts:
        measure, change = contrast.measure, contrast.difference
        arms = table.arms[contrast.arm], table.base
        numbers = [cell(arm.measures.get(measure), measure, arm.done) for arm in arms]
        shown = cell(change, measure, change.seeds, True) if change and change.seeds >= MIN_SEEDS else "–"
        shown += " (paired)" if change and change.paired else ""
        p_values = number(contrast.p), number(contrast.p_holm)
        rows.append([contrast.arm, measure, *numbers, shown, *p_values, contrast.conclusion])
    return header, rows


@section(
    "Against the baseline, at equal tokens",
    f"Exploratory. The values of fewer than {MIN_SEEDS} seeds, else the median [95% interval]; × is a factor.",
)
def difference_rows(table: Table) -> Rows:
    names, runs = compared(table), shared_seeds(table)
    rows = [[arm, *cells(changes, names, runs[arm], True)] for arm, changes in table.differences.items() if changes]
    return ["arm - baseline", *names], rows


@section(
    "Against the baseline, at equal loss",
    "Exploratory. Runs are paired by seed. We take the run with the higher final loss at its end, and the other "
    "where its course last comes down to that loss, interpolated between two checkpoints. A pair is not matched if "
    f"there is no such place and the final losses are more than {aggregate.LOSS_TOLERANCE} nat apart.",
)
def equal_loss_rows(table: Table) -> Rows:
    names = [name for name in compared(table) if name != "loss"]
    rows = []
    for arm, equal in table.equal_loss.items():
        steps = [number(equal.step, ".0f"), number(equal.baseline_step, ".0f")]
        shown = cells(equal.measures, names, equal.matched, True) if equal.matched else ["not matched"] * len(names)
        rows += [[arm, f"{equal.matched} of {equal.pairs}", *steps, *shown]] if equal.pairs else []
    return ["arm - baseline", "matched", "at step", "baseline at", *names], rows


def moving(table: Table) -> dict[str, dict[str, list[Change]]]:
    """{measure: {arm: [(number at 90% of training, number at the end) of each run]}} of the measures in SATURATES."""
    courses = {name: [row.course for row in arm.ended.values()] for name, arm in table.arms.items()}
    pairs = lambda runs, measure: [pair for course in runs if (pair := last_tenth(course, measure))]
    return {measure: {arm: pairs(runs, measure) for arm, runs in courses.items()} for measure in SATURATES}


@section(
    "What still moves at the end",
    "The value at the end over the value at the checkpoint nearest to 90% of training (80 to 95%), seed by seed; "
    "for the loss, the difference. A measure moves if it changed by more than "
    f"{aggregate.MOVING_SHARE:.0%} of the larger value, the loss by more than {aggregate.LOSS_TOLERANCE} nat.",
)
def moving_rows(table: Table) -> Rows:
    factor = lambda a, b: f"×{b / a:.2f}" if a else "from 0" if b else "0"
    change = lambda pair, m: f"{pair[1] - pair[0]:+.3f}" if measure_of(m).kind == "plain" else factor(*pair)
    shown = lambda pairs, m: f"{' '.join(change(pair, m) for pair in pairs)}; {count_moving(pairs, m)} still moving"
    measures = moving(table).items()
    rows = [[arm, *(shown(arms[arm], m) if arms[arm] else "–" for m, arms in measures)] for arm in table.arms]
    return ["arm", *SATURATES], [row for row in rows if set(row[1:]) != {"–"}]


def count_moving(pairs: Sequence[Change], measure: str) -> int:
    """The number of runs that still move."""
    return sum(moves(*pair, measure_of(measure).kind) for pair in pairs)


def still_moving(table: Table) -> str:
    """A sentence that names the measures that still move at the end of most of an arm's runs."""
    parts = []
    for measure, arms in moving(table).items():
        names = [arm for arm, pairs in arms.items() if 2 * count_moving(pairs, measure) > len(pairs)]
        parts += [f"{measure} in {'all arms' if len(names) == len(table.arms) else ', '.join(names)}"] if names else []
    if not moving_rows(table)[1]:
        return "We cannot tell whether anything still moves at the end: no checkpoint is at about 90% of training."
    return f"Still moving at the end: {'; '.join(parts) or 'none of ' + ', '.join(SATURATES)}."


def done_runs(table: Table) -> list[tuple[str, Done]]:
    """[(name, row)] of the runs that reached their last step."""
    return [(f"{name}, seed {seed}", row) for name, arm in table.arms.items() for seed, row in arm.ended.items()]


@section(
    "When spikes and sinks appear",
    "The first checkpoint from which on more than half of the sequences have one, at all later checkpoints too.",
)
def onset_rows(table: Table) -> Rows:
    rows = []
    for run, row in done_runs(table):
        steps = [onset(row.course, measure) for measure in ("spike sequences", "best head")]
        rows.append([run, *("never" if step is None else f"{step:,}" for step in steps)])
    return ["run", "spikes from step", "sinks from step"], rows


@section(
    "Where the spikes are",
    f"A layer has a spike if top1/median is {SPIKE_RATIO:g} or more. Tokens: the strongest that detect.py lists.",
)
def where_rows(table: Table) -> Rows:
    rows = []
    for run, row in done_runs(table):
        layers, tokens = row.where.layers, Counter(row.where.tokens)
        largest, ratio = max(layers.items(), key=lambda item: item[1], default=("–", None))
        above = [layer for layer, layer_ratio in layers.items() if layer_ratio >= SPIKE_RATIO]
        texts = [f"{text} {n} of {tokens.total()}" for text, n in tokens.most_common(3)]
        cells = number(ratio), f"{len(above)} of {len(layers)}", above[0] if above else "–"
        rows.append([run, largest, *cells, ", ".join(texts) or "–"])
    return ["run", "largest after", "top1/median", "layers with a spike", "the first", "on tokens"], rows


@section("What two changes do beyond the sum of both", "Exploratory. AB - A - B + baseline, seed by seed.")
def interaction_rows(table: Table) -> Rows:
    rows = [[name, *cells(results, COMPARED, table.base.done, True)] for name, results in table.interactions.items()]
    return ["both - each", *COMPARED], rows


@section(
    "What interventions do",
    "Measured by ablate.py; – where there was nothing to edit. int8 is simulated, whole and either half alone.",
)
def effect_rows(table: Table) -> Rows:
    items = [item for arm in table.arms.values() for item in arm.measures.items()]
    names = dict.fromkeys(name for name, result in items if ": " in name and result.n)
    rows = [[name, *cells(arm.measures, names, arm.done)] for name, arm in table.arms.items()]
    return ["arm", *names], rows if names else []


@section(
    "Every run",
    "Diverged runs are counted, but are in no median. job is a hash of keys, data, measures and code; "
    "weights is a hash of the final weights.",
)
def run_rows(table: Table) -> Rows:
    header = ["run", "status", "step", "loss", "top1/median", "largest |h|", "Sink_1", "P(sink | spike)"]
    header += ["spike", "sink", "co-occurrence", "job", "code", "weights"]
    rows = []
    for name, arm in table.arms.items():
        for row in arm.seeds:
            ended, done = row if isinstance(row, Ended) else None, row if isinstance(row, Done) else None
            status = row.status + (f" at learning rate {ended.lr:.3g}" if ended and ended.lr is not None else "")
            cells = [number(done.measures.get(m) if done else None, measure_of(m).form) for m in header[3:8]]
            verdicts = [done.verdicts.get(m, "–") if done else "–" for m in ("spike", "sink", "co_occurrence")]
            start = [f"{name}, seed {row.seed}", status, f"{ended.step:,}" if ended else "–"]
            rows.append([*start, *cells, *verdicts, row.job, row.code, done.weights if done else "–"])
    return header, rows


def conditions(table: Table) -> list[str]:
    """The conditions of the table's numbers, in sentences."""
    measured, config = table.measured, table.config
    start = "each starting with BOS" if config["bos"] else "no BOS"
    ran = {(row.machine, row.torch) for row in table.runs if isinstance(row, Ended)}
    batch = config["batch_size"] * config["gradient_accumulation_steps"]
    machines = "; ".join(sorted(f"{machine}, torch {version}" for machine, version in ran)) or "nothing yet"
    return [
        f"Command: {table.command}",
        f"Trained: {table.base.tokens / 1e6:,.2f}M tokens of {config['dataset']} a run ({config['max_iters']:,} steps "
        f"of {batch} x {config['block_size']}), layers {config['n_layer']}, heads {config['n_head']}, width "
        f"{config['n_embd']}. Arms differ from this as the column changes says. loss is the trainer's loss on its "
        "validation batches.",
        f"Measured by detect.py and ablate.py on {measured.n_seq} sequences of {measured.seq_len} tokens of the "
        f"validation split, {start}, {measured.dtype}. The time course and the comparison at equal loss use "
        f"{measured.points} checkpoints of each run and that of step 0.",
        *([] if table.findings == SCHEMA else [OLD_RULES]),
        f"Ran on {machines}; Python {table.python}, spikesink {table.spikesink}, commit {table.git_commit[:12]}, "
        f"code {table.code}.",
    ]


def counts(table: Table) -> str:
    """The number of planned runs, and how many of them have which status."""
    status = Counter(row.status for row in table.runs)
    known = (f"{status[kind]} {kind}" for kind in (DONE, DIVERGED, STARTED, NOT_RUN) if status[kind])
    return f"{status.total()} runs: {', '.join(known)}"


def sections(table: Table) -> list[tuple[str, list[str], list[list[str]], str]]:
    """[(title, header, rows, note)] of the sections that have rows."""
    all_sections = ((title, *rows(table), note) for title, note, rows in SECTIONS)
    return [(title, header, rows, note) for title, header, rows, note in all_sections if rows]


def markdown(table: Table) -> str:
    """The table as Markdown."""
    lines, verdicts = [f"# {table.name}: {table.question}", "", f"{counts(table)}.", ""], judge(table)
    if verdicts:
        rows = [[name, v.claim, v.verdict, v.reason] for name, v in verdicts.items()]
        lines += [*markdown_table(["", "claim", "verdict", "numbers"], rows), ""]
    lines += [still_moving(table), ""]
    for text in conditions(table):
        lines += [text.replace("Command: ", "Command: `") + ("`" if text.startswith("Command") else ""), ""]
    for title, header, rows, note in sections(table):
        lines += [f"## {title}", "", note, "", *markdown_table(header, rows), ""]
    lines += ["## Notes", "", NOTE, "", *([DIFFERS, ""] if table.published else [])]
    if verdicts:
        lines += ["Rules of the verdicts:", "", *(f"- {verdict.rule}" for verdict in verdicts.values()), ""]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    escaped = lambda row: "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"
    return [escaped(header), "|" + "---|" * len(header), *map(escaped, rows)]


def terminal(table: Table) -> str:
    """The verdicts, the table of the arms and the planned contrasts, for the terminal."""
    verdicts = [f"{name} {v.verdict.upper()}: {v.claim}. {v.reason}." for name, v in judge(table).items()]
    header, rows = arm_rows(table)
    short = grid([header[0], *header[3:]], [[row[0], *row[3:]] for row in rows])
    planned = [grid(*contrast_rows(table))] if table.planned else []
    return "\n\n".join([table.question, counts(table), *verdicts, short, *planned, still_moving(table)])
