"""Does it hold over arms and seeds?    python study.py STUDY [--key value ...]

  python study.py configs/studies/ci.py            seconds; what a study file is
  python study.py configs/studies/norm.py --dry    the plan and its cost
  python study.py configs/studies/norm.py --seeds=1,2 --max_iters=500 --name=try
  torchrun --nproc_per_node=8 study.py configs/studies/norm.py     a run per GPU
  python study.py mitigate --init_from=ckpt.pt     fine-tunes against its spikes

--key value (or --key=value) changes a key that all arms have in common (an arm
keeps what it says), or what the study file says: --seeds=1,2 --arms=pre,post
--scale=scale/tiny --points=20 (checkpoints measured of each run) --n_seq=100
--seq_len=64 --ablations=spike_zero,sink_mask --probes --hypotheses=H1,H2.

Trains, detects and ablates every arm x seed; writes one table to results/NAME,
from six seeds on with intervals. The runs, a page and figures are in
out/studies/NAME. Killed anywhere, the same command goes on. What is done is not
done again: a run is known by its config, its data, what is measured, and a hash
of the code; where any of these has changed it is run anew (with --keep_code, a
finished run of other code is kept, and the table says of which). A run that two
studies ask for is done once.
With --extend, what the results' table holds is not run again either: more seeds
or arms for a table that came with the clone, or its page and figures.
"""

import dataclasses
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from tqdm import tqdm

import train
from spikesink import files, schema
from spikesink.errors import StoppedError, UserError, cli
from spikesink.measure.findings import SCHEMA
from spikesink.show.text import grid, number
from studies import report, tables
from studies.jobs import KINDS, ROOT, Job, Study, code_version, params_and_flops, plan, read_study, settings
from studies.runs.rows import NOT_RUN, STARTED, Ended, Finished, Planned, read_finished
from studies.runs.run import describe_machine, do_run, read_json, started
from studies.table import Arm, Conditions, Table, load_table
from trainer import config
from trainer.machine import Machine

# ------------------------------------------------------------------------------------------------- what is done


@dataclass(frozen=True)
class Command:
    """What is asked of the command itself. Raises ValueError for an impossible value."""

    dry: bool = False  # print the plan and its cost, and stop
    warmup: int = 3  # measured updates of --dry; 0: none
    keep_code: bool = False  # do not run again what other code has finished
    extend: bool = False  # do not run again what the results' table holds
    keep_checkpoints: bool = False  # do not delete them once they are measured
    name: str = ""  # of the folders of runs and results; default: the study's
    out: str = ""  # folder of the runs; default: out/studies
    results: str = ""  # folder of the tables; default: results

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup} must be 0 or more")


@dataclass(frozen=True)
class Asked(Command):
    """The same, and of which study."""

    study: str = ""  # as it was named
    command: str = ""  # what makes the same table elsewhere
    table: dict[str, Finished] = dataclasses.field(default_factory=dict)  # rows of the table that is extended, by job

    @property
    def table_folder(self) -> Path:
        """Where table.json and table.md go."""
        return Path(self.results or ROOT / "results") / self.name

    @property
    def runs_folder(self) -> Path:
        """Where the runs lie, and the page and the figures."""
        return Path(self.out or ROOT / "out" / "studies") / self.name


def finished_row(job: Job, asked: Asked) -> Finished | None:
    """A job's row if it is done, here or in the table that is extended. Raises UserError if that cannot be read."""
    path = job.folder / "row.json"
    content = read_json(path)
    if content and (content["job"] == job.id or (asked.keep_code and content["what"] == job.config_hash)):
        return read_finished(content, path)
    return asked.table.get(job.id)


def rows_of_table(path: Path, jobs: Sequence[Job]) -> dict[str, Finished]:
    """{job: row} of the runs that ended, of a table. Raises UserError, also where the new table would lose one."""
    try:
        table = load_table(path)
    except UserError as error:
        raise UserError(f"--extend: {error}; without --extend a new table is made") from None
    runs = ((f"{arm}-{row.seed}", row) for arm, of_arm in table.arms.items() for row in of_arm.seeds)
    rows = {name: Finished(row, table.times[name]) for name, row in runs if isinstance(row, Ended)}
    asked = {job.id for job in jobs}
    lost = [name for name, finished in rows.items() if finished.row.job not in asked]
    if lost:
        raise UserError(
            f"--extend: {path} holds {len(lost)} runs that are not asked for, {lost[0]} the first: ask for all of its "
            f"arms and seeds with its keys ({table.command!r}); runs of other code cannot be kept"
        )
    return {finished.row.job: finished for finished in rows.values()}


# --------------------------------------------------------------------------------------------------- the table


def write_results(study: Study, jobs: Sequence[Job], asked: Asked, last: bool) -> Table:
    """Writes the table of all that has been run; when it is the `last`, figures and the page beside the runs too."""
    with filelock.FileLock(asked.runs_folder / ".lock"):
        table = table_of(study, jobs, asked)
        schema.save(asked.table_folder / "table.json", table)
        files.save_text(asked.table_folder / "table.md", tables.markdown(table))
        if last:
            report.study_page(asked.runs_folder, table)
    return table


def table_of(study: Study, jobs: Sequence[Job], asked: Asked) -> Table:
    """The findings of a study: every run that was planned, arm by arm, and what follows from them."""
    first = jobs[0]
    base = settings(first.model, first.cfg)
    finished = {job.id: finished_row(job, asked) for job in jobs}
    seconds = {key: found.seconds if found else None for key, found in finished.items()}
    arms: dict[str, Arm] = {}
    for name in study.arms:
        of_arm = [job for job in jobs if job.arm == name]
        rows = [row_of(job, finished[job.id]) for job in of_arm]
        arms[name] = arm_entry(study.arms[name], of_arm[0], rows, base)
    return Table(
        name=asked.name,
        findings=SCHEMA,
        question=study.question,
        command=asked.command,
        code=first.code_hash,
        **train.provenance(),
        baseline=next(iter(study.arms)),
        config=base,
        data=first.samples,
        seeds=study.seeds,
        asked=study.hypotheses,
        measured=Conditions(study.n_seq, study.seq_len, study.points, "float32"),
        published=study.published,
        planned=[(arm, measure) for arm, measure in study.contrasts],
        arms=arms,
        times={f"{job.arm}-{job.seed}": seconds[job.id] for job in jobs},
    )


def row_of(job: Job, finished: Finished | None) -> Planned:
    """The row of a job, whatever became of it."""
    if finished:
        return finished.row
    return Planned(job.seed, job.id, job.code_hash, STARTED if started(job) else NOT_RUN)


def arm_entry(configs: str | dict[str, Any], job: Job, rows: list[Planned], base: dict[str, Any]) -> Arm:
    """An arm of the table; `job`: any of its, `base`: the settings of the baseline."""
    parameters, flops = params_and_flops(job.model)
    changes = {key: value for key, value in settings(job.model, job.cfg).items() if value != base[key]}
    return Arm(configs, changes, parameters, flops, job.tokens, rows)


# ---------------------------------------------------------------------------------------------- what it costs


def cost(jobs: Sequence[Job], asked: Asked, device: str) -> tuple[list[str], list[list[str]], str]:
    """(header, rows, sentence): the plan, arm by arm, and its cost; hours from a few updates of each shape."""
    rates: dict[tuple[Any, ...], float] = {}
    rows, tokens, all_flops, all_hours = [], 0, 0.0, 0.0
    for arm in dict.fromkeys(job.arm for job in jobs):
        of_arm = [job for job in jobs if job.arm == arm]
        job, left = of_arm[0], [job for job in of_arm if not finished_row(job, asked)]
        parameters, flops = params_and_flops(job.model)
        shape = (job.model, job.cfg.batch_size, job.cfg.optimizer, tuple(job.cfg.losses), job.cfg.dtype)
        if asked.warmup and left and shape not in rates:
            rates[shape] = tokens_per_second(job, asked.warmup, device)
        tokens_left = sum(job.tokens for job in left)
        hours = tokens_left / rates[shape] / 3600 if shape in rates else math.nan if left else 0.0
        tokens, all_flops, all_hours = tokens + tokens_left, all_flops + flops * tokens_left, all_hours + hours
        seen = f"{parameters / 1e6:.3f}", f"{flops / 1e6:.2f}", f"{job.cfg.max_iters:,}", f"{job.tokens / 1e6:,.1f}"
        rows.append([arm, *seen, f"{len(of_arm) - len(left)} of {len(of_arm)}", number(hours)])
    header = ["arm", "params (M)", "MFLOPs/token", "steps", "Mtokens a run", "done", "hours left"]
    unknown = "" if asked.warmup else " (not measured: --warmup=0)"
    machine = describe_machine(Machine.find(device).with_dtype(jobs[0].cfg.dtype))
    sentence = (
        f"left: {tokens / 1e6:,.1f}M tokens, {all_flops:.3g} FLOPs, {number(all_hours)} hours of training{unknown} one "
        f"run at a time, on {machine}; measuring what was trained comes on top"
    )
    return header, rows, sentence


def tokens_per_second(job: Job, updates: int, device: str) -> float:
    """Of a job's training, from a few updates after a first one; NaN if it diverges in these."""
    machine = dataclasses.replace(Machine.find(device), rank=0, world=1)
    with tempfile.TemporaryDirectory() as folder:
        run = train.Run.open({**job.given, "overwrite": True}, folder, machine)
        try:
            run.update()
            since = time.perf_counter()
            for _ in range(updates):
                run.update()  # ends with the loss as a number: the device has done it
            return updates * run.tokens_per_step / (time.perf_counter() - since)
        except StoppedError:  # it will diverge: who knows when
            return math.nan
        finally:
            torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ main


def parse_argv(argv: Sequence[str]) -> tuple[Asked, dict[str, Any], dict[str, Any]]:
    """(what is asked, {key: value} that change the study, {key: value} that change its common keys).

    Raises UserError.
    """
    fields = config.fields_of((Command, Study, *train.SCHEMAS))
    names, values = config.split_argv(argv, fields)
    if len(names) != 1:
        raise UserError(f"one study is run, not {' '.join(names) or 'none'}; keys are written --key=value")
    of_command: dict[str, Any] = {}
    of_study: dict[str, Any] = {}
    of_runs: dict[str, Any] = {}
    for key, value in values.items():
        if key not in (*Command.__dataclass_fields__, *KINDS):
            of_runs[key] = value
        elif key == "seeds":
            of_study[key] = [config.typed(key, seed, int, "command line") for seed in value.split(",")]
        elif key == "arms" or (KINDS.get(key) is list and key != "contrasts"):
            of_study[key] = [name for name in value.split(",") if name]
        elif KINDS.get(key) in (dict, list):
            raise UserError(f"--{key}: write it into the study file")
        else:
            of_keys, kind = (of_study, KINDS[key]) if key in KINDS else (of_command, fields[key].type)
            of_keys[key] = config.typed(key, value, kind, "command line")
    kept = {key: str(value).lower() if isinstance(value, bool) else value for key, value in values.items()}
    flags = [f"--{key}={value}" for key, value in kept.items() if key not in ("out", "results", "extend")]
    asked = config.build((Asked,), {"name": Path(names[0]).stem, **of_command, "study": names[0]})[0]
    return dataclasses.replace(asked, command=" ".join(["python", "study.py", *names, *flags])), of_study, of_runs


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "") + config.describe((Command,)))
        return
    asked, of_study, of_runs = parse_argv(sys.argv[1:])
    device = of_runs.pop("device", "auto")
    study = read_study(asked.study, of_study)
    jobs = plan(study, asked.runs_folder, of_runs, code_version())
    if asked.extend:
        path = asked.table_folder / "table.json"
        asked = dataclasses.replace(asked, table=rows_of_table(path, jobs))
        study = dataclasses.replace(study, contrasts=load_table(path).planned)  # before its first run, not after
    if asked.dry:
        header, rows, sentence = cost(jobs, asked, device)
        print(f"{study.question}\n\n{grid(header, rows)}\n\n{sentence}")
        return
    for path in (asked.table_folder / "table.json", asked.runs_folder / "row.json"):
        files.check_writable(path)
    asked.runs_folder.mkdir(parents=True, exist_ok=True)
    deterministic = any(job.cfg.deterministic for job in jobs)
    if deterministic or Machine.find(device).device.type == "cpu":
        train.be_deterministic(deterministic)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    left = [job for job in jobs[rank::world] if not finished_row(job, asked)]
    with tqdm(total=sum(job.tokens for job in left), unit="token", unit_scale=True, disable=None, desc="study") as bar:
        for i, job in enumerate(left):
            bar.set_postfix_str(f"{job.name}, run {i + 1} of {len(left)}")
            do_run(job, study, device, asked.keep_checkpoints)
            bar.update(job.tokens)
            write_results(study, jobs, asked, last=False)
    table = write_results(study, jobs, asked, last=True)
    if all(isinstance(row, Ended) for row in table.runs):  # of ranks, the last
        print(f"{tables.terminal(table)}\n\nresults: {asked.table_folder}\npage:    {asked.runs_folder / 'index.html'}")


if __name__ == "__main__":
    cli(main)
