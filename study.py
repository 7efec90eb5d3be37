"""Trains and compares arms over seeds.    python study.py STUDY [--key value ...]

  python study.py configs/studies/ci.py            takes seconds; an example
  python study.py configs/studies/norm.py --dry    prints the plan and its cost
  python study.py configs/studies/norm.py --seeds=1,2 --max_iters=500 --name=try
  torchrun --nproc_per_node=8 study.py norm        one run per GPU
  python study.py mitigate --init_from=ckpt.pt     fine-tunes against its spikes

--key value (or --key=value) changes a key that all arms have in common (the
arm's own keys come after it), or a key of the study file: --seeds=1,2
--arms=pre,post --scale=scale/tiny --points=20 (checkpoints measured of each
run) --n_seq=100 --seq_len=64 --ablations=spike_zero,sink_mask --probes
--hypotheses=H1,H2.

The command trains, detects and ablates every arm with every seed. It writes
one table to results/NAME, which has intervals from six seeds on. The runs, a
page and figures go to out/studies/NAME. If the command is killed, run it again
and it goes on. A finished run is not repeated unless its config, its data,
what is measured or the code has changed. With --keep_code, finished runs of
other code are kept, and the table says which code made them. A run that two
studies share is done once. With --extend, runs that the table in results
already holds are not repeated. Use it to add seeds or arms to a table that
came with the clone, or to draw its page.
"""

import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from studies import figures, tables
from studies.jobs import KINDS, ROOT, Job, Study, code_version, params_and_flops, plan, read_study, settings
from studies.runs.rows import NOT_RUN, STARTED, Ended, Finished, Planned, read_finished
from studies.runs.run import describe_machine, do_run, read_json, started
from studies.table import Arm, Conditions, Table, load_table
from trainer import config
from trainer.machine import Machine

# ------------------------------------------------------------------------------------------------- finished runs


@dataclass(frozen=True)
class Command:
    """Options of the command itself. Raises ValueError for an impossible value."""

    dry: bool = False  # print the plan and its cost, and stop
    warmup: int = 3  # updates that --dry times; 0 times none
    keep_code: bool = False  # keep finished runs of other code
    extend: bool = False  # keep the runs that the table in results holds
    keep_checkpoints: bool = False  # keep checkpoints after they are measured
    name: str = ""  # name of both folders; default: the study's name
    out: str = ""  # folder of the runs; default: out/studies
    results: str = ""  # folder of the tables; default: results

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup} must be 0 or more")


@dataclass(frozen=True)
class Request(Command):
    """The command's options, and the study that it runs."""

    study: str = ""  # the name on the command line
    command: str = ""  # the command that makes the same table elsewhere
    extended_rows: dict[str, Finished] = field(default_factory=dict)  # by job, of the table that is extended

    @property
    def table_folder(self) -> Path:
        """The folder of table.json and table.md."""
        return Path(self.results or ROOT / "results") / self.name

    @property
    def runs_folder(self) -> Path:
        """The folder of the runs, the page and the figures."""
        return Path(self.out or ROOT / "out" / "studies") / self.name


def finished_row(job: Job, request: Request) -> Finished | None:
    """A job's row if the job has ended, here or in the table that is extended. Raises UserError for a bad row.json."""
    path = job.folder / "row.json"
    content = read_json(path)
    if content and (content["job"] == job.id or (request.keep_code and content["what"] == job.config_hash)):
        return read_finished(content, path)
    return request.extended_rows.get(job.id)


def rows_of_table(path: Path, jobs: Sequence[Job]) -> dict[str, Finished]:
    """{job: row} of a table's runs that ended. Raises UserError for a bad table, and if `jobs` lack one of its runs."""
    try:
        table = load_table(path)
    except UserError as error:
        raise UserError(f"--extend: {error}; without --extend a new table is made") from None
    runs = ((f"{name}-{row.seed}", row) for name, arm in table.arms.items() for row in arm.seeds)
    rows = {name: Finished(row, table.times[name]) for name, row in runs if isinstance(row, Ended)}
    planned_ids = {job.id for job in jobs}
    if lost := [name for name, finished in rows.items() if finished.row.job not in planned_ids]:
        raise UserError(
            f"--extend: {path} holds {len(lost)} runs that are not asked for, {lost[0]} the first: ask for all of its "
            f"arms and seeds with its keys ({table.command!r}); runs of other code cannot be kept"
        )
    return {finished.row.job: finished for finished in rows.values()}


# --------------------------------------------------------------------------------------------------- table


def write_results(study: Study, jobs: Sequence[Job], request: Request, last: bool) -> Table:
    """Writes the table of all runs so far. With `last`, it also draws the page and the figures."""
    with filelock.FileLock(request.runs_folder / ".lock"):
        table = table_of(study, jobs, request)
        schema.save(request.table_folder / "table.json", table)
        files.save_text(request.table_folder / "table.md", tables.markdown(table))
        if last:
            figures.study_page(request.runs_folder, table)
    return table


def table_of(study: Study, jobs: Sequence[Job], request: Request) -> Table:
    """The table of a study: every planned run, arm by arm."""
    first = jobs[0]
    base = settings(first.model, first.cfg)
    finished = {job.id: finished_row(job, request) for job in jobs}
    arms: dict[str, Arm] = {}
    for name, configs in study.arms.items():
        arm_jobs = [job for job in jobs if job.arm == name]
        model, cfg = arm_jobs[0].model, arm_jobs[0].cfg
        changes = {key: value for key, value in settings(model, cfg).items() if value != base[key]}
        rows = [row_of(job, finished[job.id]) for job in arm_jobs]
        arms[name] = Arm(configs, changes, *params_and_flops(model), arm_jobs[0].tokens, rows)
    return Table(
        name=request.name,
        findings=SCHEMA,
        question=study.question,
        command=request.command,
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
        times={f"{job.arm}-{job.seed}": row.seconds if (row := finished[job.id]) else None for job in jobs},
    )


def row_of(job: Job, finished: Finished | None) -> Planned:
    """A job's row, whether it has ended, was started, or was not run."""
    if finished:
        return finished.row
    return Planned(job.seed, job.id, job.code_hash, STARTED if started(job) else NOT_RUN)


# ---------------------------------------------------------------------------------------------- cost


def cost(jobs: Sequence[Job], request: Request, device: str) -> str:
    """The plan and its cost, as text. Hours are extrapolated from a few timed updates."""
    rates: dict[tuple[Any, ...], float] = {}
    rows, tokens, all_flops, all_hours = [], 0, 0.0, 0.0
    for arm in dict.fromkeys(job.arm for job in jobs):
        arm_jobs = [job for job in jobs if job.arm == arm]
        job, remaining = arm_jobs[0], [job for job in arm_jobs if not finished_row(job, request)]
        parameters, flops = params_and_flops(job.model)
        shape = (job.model, job.cfg.batch_size, job.cfg.optimizer, tuple(job.cfg.losses), job.cfg.dtype)
        if request.warmup and remaining and shape not in rates:
            rates[shape] = tokens_per_second(job, request.warmup, device)
        tokens_left = sum(job.tokens for job in remaining)
        hours = tokens_left / rates[shape] / 3600 if shape in rates else math.nan if remaining else 0.0
        tokens, all_flops, all_hours = tokens + tokens_left, all_flops + flops * tokens_left, all_hours + hours
        cells = f"{parameters / 1e6:.3f}", f"{flops / 1e6:.2f}", f"{job.cfg.max_iters:,}", f"{job.tokens / 1e6:,.1f}"
        rows.append([arm, *cells, f"{len(arm_jobs) - len(remaining)} of {len(arm_jobs)}", number(hours)])
    header = ["arm", "params (M)", "MFLOPs/token", "steps", "Mtokens a run", "done", "hours left"]
    unknown = "" if request.warmup else " (not measured: --warmup=0)"
    machine = describe_machine(Machine.find(device).with_dtype(jobs[0].cfg.dtype))
    sentence = (
        f"left: {tokens / 1e6:,.1f}M tokens, {all_flops:.3g} FLOPs, {number(all_hours)} hours of training{unknown} one "
        f"run at a time, on {machine}; measuring the trained models takes more time"
    )
    return f"{grid(header, rows)}\n\n{sentence}"


def tokens_per_second(job: Job, updates: int, device: str) -> float:
    """Tokens per second of a job's training, over `updates` updates after a first one. NaN if it diverges in them."""
    machine = replace(Machine.find(device), rank=0, world=1)
    with tempfile.TemporaryDirectory() as folder:
        run = train.Run.open({**job.keys, "overwrite": True}, folder, machine)
        try:
            run.update()
            since = time.perf_counter()
            for _ in range(updates):
                run.update()  # it returns the loss as a number, so the device has finished
            return updates * run.tokens_per_step / (time.perf_counter() - since)
        except StoppedError:
            return math.nan
        finally:
            torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ main


def parse_argv(argv: Sequence[str]) -> tuple[Request, dict[str, Any], dict[str, Any]]:
    """(request, {key: value} that change the study, {key: value} that change its common keys). Raises UserError."""
    fields = config.fields_of((Command, Study, *train.SCHEMAS))
    names, values = config.split_argv(argv, fields)
    if len(names) != 1:
        raise UserError(f"one study is run, not {' '.join(names) or 'none'}; keys are written --key=value")
    command_options: dict[str, Any] = {}
    study_changes: dict[str, Any] = {}
    run_changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in (*Command.__dataclass_fields__, *KINDS):
            run_changes[key] = value
        elif key == "seeds":
            study_changes[key] = [config.typed(key, seed, int, "command line") for seed in value.split(",")]
        elif key == "arms" or (KINDS.get(key) is list and key != "contrasts"):
            study_changes[key] = [name for name in value.split(",") if name]
        elif KINDS.get(key) in (dict, list):
            raise UserError(f"--{key}: write it into the study file")
        else:
            options, kind = (study_changes, KINDS[key]) if key in KINDS else (command_options, fields[key].type)
            options[key] = config.typed(key, value, kind, "command line")
    written = {key: str(value).lower() if isinstance(value, bool) else value for key, value in values.items()}
    flags = [f"--{key}={value}" for key, value in written.items() if key not in ("out", "results", "extend")]
    command = " ".join(["python", "study.py", *names, *flags])
    values = {"name": Path(names[0]).stem, **command_options, "study": names[0], "command": command}
    return config.build((Request,), values)[0], study_changes, run_changes


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "") + config.describe((Command,)))
        return
    request, study_changes, run_changes = parse_argv(sys.argv[1:])
    device = run_changes.pop("device", "auto")
    study = read_study(request.study, study_changes)
    jobs = plan(study, request.runs_folder, run_changes, code_version())
    if request.extend:
        path = request.table_folder / "table.json"
        request = replace(request, extended_rows=rows_of_table(path, jobs))
        # contrasts count as planned only if they were written before the first run
        study = replace(study, contrasts=load_table(path).planned)
    if request.dry:
        print(f"{study.question}\n\n{cost(jobs, request, device)}")
        return
    for path in (request.table_folder / "table.json", request.runs_folder / "row.json"):
        files.check_writable(path)
    request.runs_folder.mkdir(parents=True, exist_ok=True)
    deterministic = any(job.cfg.deterministic for job in jobs)
    if deterministic or Machine.find(device).device.type == "cpu":
        train.be_deterministic(deterministic)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    remaining = [job for job in jobs[rank::world] if not finished_row(job, request)]
    tokens = sum(job.tokens for job in remaining)
    with tqdm(total=tokens, unit="token", unit_scale=True, disable=None, desc="study") as bar:
        for i, job in enumerate(remaining):
            bar.set_postfix_str(f"{job.name}, run {i + 1} of {len(remaining)}")
            do_run(job, study, device, request.keep_checkpoints)
            bar.update(job.tokens)
            write_results(study, jobs, request, last=False)
    table = write_results(study, jobs, request, last=True)
    if all(isinstance(row, Ended) for row in table.runs):  # only the rank that finishes last
        page = request.runs_folder / "index.html"
        print(f"{tables.terminal(table)}\n\nresults: {request.table_folder}\npage:    {page}")


if __name__ == "__main__":
    cli(main)
