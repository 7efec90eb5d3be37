"""A study's table in words: for a terminal, for Markdown, and what its page shows."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from spikesink.measure.findings import SCHEMA
from spikesink.measure.spikes import SPIKE_RATIO
from spikesink.show.text import grid, interval, number
from studies import aggregate
from studies.aggregate import LEAST, MATCHED, MOVES, Estimate, estimate, last_tenth, moves, onset
from studies.hypotheses import judge
from studies.runs.measures import measure_of
from studies.runs.rows import DIVERGED, DONE, NOT_RUN, STARTED, Done, Ended, Pair
from studies.table import Arm, Table

Rows = tuple[list[str], list[list[str]]]  # a header, and what stands below it

# measures that the tables show; all are in table.json
SHOWN = (
    *("loss", "top1/median", "largest |h|", "kurtosis", "spike tokens", "Sink_1", "best head", "sink tokens"),
    *("P(sink | spike)", "P(spike | sink)"),
)
COMPARED = ("loss", "top1/median", "kurtosis", "Sink_1", "best head", "P(sink | spike)", "P(spike | sink)")
SATURATES = ("loss", "top1/median", "Sink_1")  # of which it is said whether they still move at the end
INT8 = ("int8 per tensor: loss", "int8 per channel: loss")
STARTED_FROM = ("short loss", "top1/median", "kurtosis", "spike sequences", "Sink_1", "best head", *INT8)
DIFFERS = (
    "Published: Sun et al. 2026 (arXiv 2603.05498), one run per arm, 7B parameters, 100B tokens, T 4096, Llama's block "
    "(RMSNorm, RoPE, SwiGLU): perplexity, sink rate in %, largest |h|. Ours differs in size, tokens, length, block and "
    "text: directions may be compared, numbers not."
)
OLD_RULES = (
    "Measured by rules that have been replaced since: a spike was any |h| of 30 times its layer's median, outlier "
    "channels too, and a post-norm stream was read behind its norm only. These numbers are being measured again."
)
NOTE = " ".join((aggregate.__doc__ or "").partition("\n\n")[2].split())


def cell(found: Estimate | None, name: str, runs: int, difference: bool = False, between: str = " ") -> str:
    """The values of fewer than LEAST seeds, else the median with its interval; of how many of the `runs`, if some have
    none. A difference has a sign, or a cross for a factor."""
    measure = measure_of(name)
    form = measure.form
    if difference:
        form = ".2f" if measure.kind == "log" else form if form.startswith("+") else f"+{form}"
    if not found or found.middle is None:
        return "–"
    sign = "×" if difference and measure.kind == "log" else ""
    shown = found.values if found.n < LEAST and not found.ci95 else [found.middle]
    words = between.join(f"{sign}{number(x, form)}" for x in shown)
    some = f"({found.n} of {runs})" if found.n < runs else ""
    return " ".join(filter(None, (words, interval(found.ci95, form), some))) or "–"


def cells(found: Mapping[str, Estimate], names: Iterable[str], runs: int, difference: bool = False) -> Iterator[str]:
    """A cell for each of these measures."""
    return (cell(found.get(name), name, runs, difference) for name in names)


def changes(arm: Arm) -> str:
    """What an arm changes, as keys."""
    return ", ".join(f"{key}={value}" for key, value in arm.changes.items()) or "the baseline"


def arm_rows(table: Table) -> Rows:
    """(header, rows): every arm at the end of training."""
    header = ["arm", "changes", "params (M)", "ended", *SHOWN]
    header += ["published ppl, sink %, |h|"] if table.published else []
    rows = []
    for name, arm in table.arms.items():
        ended = f"{arm.done} of {len(arm.seeds)}" + (f", {arm.diverged} diverged" if arm.diverged else "")
        parameters = f"{arm.parameters / 1e6:.3f}" + ("" if table.matched(name) else " (not matched)")
        row = [name, changes(arm), parameters, ended, *cells(arm.measures, SHOWN, arm.done)]
        if table.published:
            row.append(", ".join(number(x, "g") for x in table.published.get(name, ())) or "–")
        rows.append(row)
    return header, rows


def pairs_of(table: Table) -> dict[str, int]:
    """{arm: number of seeds with which both it and the baseline have ended}."""
    return {name: len(arm.ended.keys() & table.base.ended.keys()) for name, arm in table.others.items()}


def compared(table: Table) -> list[str]:
    """The measures in which arms are compared."""
    return [*COMPARED, *(name for name in INT8 if name in table.base.measures)]


def start_rows(table: Table) -> Rows:
    """(header, rows): where arms start from a checkpoint, the same measures at step 0 and at the end."""
    rows = []
    for name, arm in table.arms.items() if table.config.get("init_from", "scratch") != "scratch" else ():
        courses = [row.course for row in arm.ended.values()]
        for step, i in ("step 0", 0), ("end", -1):
            seeds = {m: [course[i].measures.get(m) for course in courses] for m in STARTED_FROM}
            found = {m: estimate(of_seeds) for m, of_seeds in seeds.items()}
            rows.append([f"{name}, {step}", *cells(found, STARTED_FROM, arm.done)])
    return ["arm", *STARTED_FROM], rows


def contrast_rows(table: Table) -> Rows:
    """(header, rows): the comparisons that the study file planned."""
    header = ["arm", "measure", "the arm's", "the baseline's", "difference", "p", "p, Holm", "so it"]
    rows = []
    for of in table.contrasts:
        arm = table.arms[of.arm]
        seeds = of.difference.seeds if of.difference else 0
        seen = [cell(found.measures.get(of.measure), of.measure, found.done) for found in (arm, table.base)]
        shown = cell(of.difference, of.measure, seeds, True) if seeds >= LEAST else "–"
        pairs = " (paired)" if of.difference and of.difference.paired else ""
        rows.append([of.arm, of.measure, *seen, shown + pairs, number(of.p), number(of.p_holm), of.says])
    return header, rows


def difference_rows(table: Table) -> Rows:
    """(header, rows): every arm against the baseline at equal tokens."""
    names, runs = compared(table), pairs_of(table)
    rows = [[name, *cells(of, names, runs[name], True)] for name, of in table.differences.items() if of]
    return ["arm - baseline", *names], rows


def equal_loss_rows(table: Table) -> Rows:
    """(header, rows): the same at equal loss, how many pairs of runs could be matched, and at which steps that is."""
    names = [name for name in compared(table) if name != "loss"]
    rows = []
    for name, of in table.equal_loss.items():
        steps = [number(of.step, ".0f"), number(of.baseline_step, ".0f")]
        seen = cells(of.measures, names, of.matched, True) if of.matched else ["not matched"] * len(names)
        rows += [[name, f"{of.matched} of {of.of}", *steps, *seen]] if of.of else []
    return ["arm - baseline", "matched", "at step", "baseline at", *names], rows


def moving(table: Table) -> dict[str, dict[str, list[Pair]]]:
    """{measure: {arm: of each run, its number at 90% of training and at the end}}, of what SATURATES."""
    courses = {name: [row.course for row in arm.ended.values()] for name, arm in table.arms.items()}
    pairs = lambda of_arm, measure: [pair for course in of_arm if (pair := last_tenth(course, measure))]
    return {measure: {name: pairs(of_arm, measure) for name, of_arm in courses.items()} for measure in SATURATES}


def moving_rows(table: Table) -> Rows:
    """(header, rows): what the last tenth of training changed, run by run."""
    factor = lambda a, b: f"×{b / a:.2f}" if a else "from 0" if b else "0"
    change = lambda pair, m: f"{pair[1] - pair[0]:+.3f}" if measure_of(m).kind == "plain" else factor(*pair)
    shown = lambda pairs, m: f"{' '.join(change(pair, m) for pair in pairs)}; {count(pairs, m)} still moving"
    rows = [[arm, *(shown(of[arm], m) if of[arm] else "–" for m, of in moving(table).items())] for arm in table.arms]
    return ["arm", *SATURATES], [row for row in rows if set(row[1:]) != {"–"}]


def count(pairs: Sequence[Pair], measure: str) -> int:
    """How many of the runs still move."""
    return sum(moves(*pair, measure_of(measure).kind) for pair in pairs)


def still_moving(table: Table) -> str:
    """A sentence: which measures still move at the end of most of an arm's runs."""
    of = moving(table).items()
    arms = {m: [arm for arm, pairs in of_arms.items() if 2 * count(pairs, m) > len(pairs)] for m, of_arms in of}
    names = lambda those: "all arms" if len(those) == len(table.arms) else ", ".join(those)
    said = "; ".join(f"{m} in {names(those)}" for m, those in arms.items() if those)
    if not moving_rows(table)[1]:
        return "Whether anything still moves at the end is not known: no checkpoint is at about 90% of training."
    return f"Still moving at the end: {said or 'none of ' + ', '.join(SATURATES)}."


def done_runs(table: Table) -> list[tuple[str, Done]]:
    """The runs that reached their end, each with what it is called."""
    runs = ((name, row) for name, arm in table.arms.items() for row in arm.seeds)
    return [(f"{name}, seed {row.seed}", row) for name, row in runs if isinstance(row, Done)]


def onset_rows(table: Table) -> Rows:
    """(header, rows): the step from which on most sequences have a spike, and a sink in one head, run by run."""
    rows = []
    for run, row in done_runs(table):
        steps = [onset(row.course, measure) for measure in ("spike sequences", "best head")]
        rows.append([run, *("never" if step is None else f"{step:,}" for step in steps)])
    return ["run", "spikes from step", "sinks from step"], rows


def where_rows(table: Table) -> Rows:
    """(header, rows): in which layers the stream has a spike, and on which tokens, run by run."""
    rows = []
    for run, row in done_runs(table):
        layers, tokens = row.where.layers, Counter(row.where.tokens)
        largest, ratio = max(layers.items(), key=lambda item: item[1], default=("–", None))
        above = [layer for layer, of_layer in layers.items() if of_layer >= SPIKE_RATIO]
        seen = [f"{text} {n} of {tokens.total()}" for text, n in tokens.most_common(3)]
        cells = number(ratio), f"{len(above)} of {len(layers)}", above[0] if above else "–"
        rows.append([run, largest, *cells, ", ".join(seen) or "–"])
    return ["run", "largest after", "top1/median", "layers with a spike", "the first", "on tokens"], rows


def effect_rows(table: Table) -> Rows:
    """(header, rows): what the interventions do in every arm."""
    means = [item for arm in table.arms.values() for item in arm.measures.items()]
    names = dict.fromkeys(name for name, mean in means if ": " in name and mean.n)
    rows = [[name, *cells(arm.measures, names, arm.done)] for name, arm in table.arms.items()]
    return ["arm", *names], rows if names else []


def interaction_rows(table: Table) -> Rows:
    """(header, rows): what two changes together do beyond the sum of both."""
    rows = [[name, *cells(of, COMPARED, table.base.done, True)] for name, of in table.interactions.items()]
    return ["both - each", *COMPARED], rows


def run_rows(table: Table) -> Rows:
    """(header, rows): every run that was planned, whatever became of it."""
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
    """Under what conditions every number of the table was measured."""
    of, config = table.measured, table.config
    start = "each starting with BOS" if config["bos"] else "no BOS"
    ran = {(row.machine, row.torch) for row in table.runs if isinstance(row, Ended)}
    batch = config["batch_size"] * config["gradient_accumulation_steps"]
    machines = "; ".join(sorted(f"{machine}, torch {version}" for machine, version in ran)) or "nothing yet"
    return [
        f"Command: {table.command}",
        f"Trained: {table.base.tokens / 1e6:,.2f}M tokens of {config['dataset']} a run ({config['max_iters']:,} steps "
        f"of {batch} x {config['block_size']}), layers {config['n_layer']}, heads {config['n_head']}, width "
        f"{config['n_embd']}; where arms differ, see changes. loss: the trainer's, on its validation batches.",
        f"Measured on {of.n_seq} sequences of {of.seq_len} tokens of the validation split, {start}, "
        f"{of.dtype}, by detect.py and ablate.py; {of.points} checkpoints of each run and that of step 0 for the "
        "time course and for equal loss, which is so fine and no finer.",
        *([] if table.findings == SCHEMA else [OLD_RULES]),
        f"Ran on {machines}; Python {table.python}, spikesink {table.spikesink}, commit {table.git_commit[:12]}, "
        f"code {table.code}.",
    ]


def counts(table: Table) -> str:
    """How many runs were planned, and what became of them."""
    status = Counter(row.status for row in table.runs)
    known = (f"{status[kind]} {kind}" for kind in (DONE, DIVERGED, STARTED, NOT_RUN) if status[kind])
    return f"{status.total()} runs: {', '.join(known)}"


def verdict_rows(table: Table) -> Rows:
    """(header, rows) of the hypotheses."""
    header = ["", "claim", "verdict", "numbers"]
    return header, [[name, of.claim, of.verdict, of.reason] for name, of in judge(table).items()]


SECTIONS: dict[str, tuple[Callable[[Table], Rows], str]] = {  # title -> (its rows, a note on them)
    "The arms at the end of training": (
        arm_rows,
        f"The values of the seeds; from {LEAST} seeds on their median [95% interval].",
    ),
    "Before and after": (
        start_rows,
        "At step 0 an arm is the checkpoint with what the arm adds, on detect.py's sequences.",
    ),
    "Planned contrasts": (
        contrast_rows,
        "Written in the study file before it ran, and the only comparisons that are tested: exact permutation tests, "
        "with Holm's correction over all of these.",
    ),
    "Against the baseline, at equal tokens": (
        difference_rows,
        f"Exploratory. By seed for fewer than {LEAST}, else [95% interval]; × for a factor.",
    ),
    "Against the baseline, at equal loss": (
        equal_loss_rows,
        "Exploratory. Pairs of runs by seed: the one with the higher final loss at its end, the other where its course "
        "last comes down to that loss, interpolated between two checkpoints. Not matched: no such place, and more than "
        f"{MATCHED} nat apart.",
    ),
    "What still moves at the end": (
        moving_rows,
        "The value at the end over that at the checkpoint nearest to 90% of training (80 to 95%), of the loss less "
        f"that, seed by seed. Moving: changed by more than {MOVES:.0%} of the larger, the loss by {MATCHED} nat.",
    ),
    "When they come": (
        onset_rows,
        "The first of the checkpoints from which on more than half of the sequences have it, in all later ones too.",
    ),
    "Where the spikes are": (
        where_rows,
        f"A layer has a spike where top1/median is {SPIKE_RATIO:g} or more; tokens as detect.py lists the strongest.",
    ),
    "What two changes do beyond the sum of both": (
        interaction_rows,
        "Exploratory. AB - A - B + baseline, seed by seed.",
    ),
    "What interventions do": (
        effect_rows,
        "ablate.py; – where there was nothing to edit. int8: simulated, what it and either half of it costs.",
    ),
    "Every run": (
        run_rows,
        "Diverged runs are counted, and in no mean. Hashes: job of keys, data, measures, code; weights of the last.",
    ),
}


def sections(table: Table) -> list[tuple[str, list[str], list[list[str]], str]]:
    """[(title, header, rows, note)] of the tables that have rows."""
    made = [(title, *rows(table), note) for title, (rows, note) in SECTIONS.items()]
    return [section for section in made if section[2]]


def markdown(table: Table) -> str:
    """The table as Markdown."""
    lines = [
        f"# {table.name}: {table.question}",
        "",
        counts(table) + ".",
        "",
        *([*markdown_table(*verdict_rows(table)), ""] if table.asked else []),
        still_moving(table),
        "",
    ]
    for text in conditions(table):
        lines += [text.replace("Command: ", "Command: `") + ("`" if text.startswith("Command") else ""), ""]
    for title, header, rows, note in sections(table):
        lines += [f"## {title}", "", note, "", *markdown_table(header, rows), ""]
    lines += ["## Notes", "", NOTE, "", *([DIFFERS, ""] if table.published else [])]
    rules = [f"- {of.rule}" for of in judge(table).values()]
    return "\n".join([*lines, *(["Rules of the verdicts:", "", *rules, ""] if rules else [])])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    escaped = lambda row: "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"
    return [escaped(header), "|" + "---|" * len(header), *map(escaped, rows)]


def terminal(table: Table) -> str:
    """The verdicts and the first table."""
    asked = [f"{name} {of.verdict.upper()}: {of.claim}. {of.reason}." for name, of in judge(table).items()]
    header, rows = arm_rows(table)
    short = grid([header[0], *header[3:]], [[row[0], *row[3:]] for row in rows])
    planned = [grid(*contrast_rows(table))] if table.planned else []
    return "\n\n".join([table.question, counts(table), *asked, short, *planned, still_moving(table)])
