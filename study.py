"""Does it hold over arms and seeds?    python study.py STUDY [--key value ...]

  python study.py configs/studies/ci.py            seconds; what a study file is
  python study.py configs/studies/norm.py --dry    the plan and its cost
  python study.py configs/studies/norm.py --seeds=1,2 --max_iters=500 --name=try
  torchrun --nproc_per_node=8 study.py configs/studies/norm.py     a run per GPU

--key value (or --key=value) changes a key that all arms have in common (an arm
keeps what it says), or what the study file says: --seeds=1,2 --arms=pre,post
--scale=scale/tiny --points=20 (checkpoints measured of each run) --n_seq=100
--seq_len=64 --ablations=spike_zero,sink_mask --probes --hypotheses=H1,H2.

Trains, detects and ablates every arm x seed; writes one table with intervals to
results/NAME. The runs, a page and figures are in out/studies/NAME. Killed
anywhere, the same command goes on. What is done is not done again: a run is
known by its config, its data, what is measured, and a hash of the code; where
any of these has changed it is run anew (with --keep_code, a finished run of
other code is kept, and the table says of which). A run that two studies ask for
is done once.
With --extend, what the results' table holds is not run again either: more seeds
or arms for a table that came with the clone, or its page and figures.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from tqdm import tqdm

import train
from spikesink import files, schema
from spikesink.errors import Flags, StoppedError, UserError, cli, nearest
from spikesink.options import whole
from spikesink.show.text import grid, number
from studies import aggregate, hypotheses, report, tables
from studies.jobs import KINDS, ROOT, Job, Study, code_version, params_and_flops, plan, read_study, settings
from studies.runs.rows import NOT_RUN, STARTED, Ended, Finished, Planned, read_finished
from studies.runs.run import describe_machine, do_run, read_json, started
from studies.table import Arm, Conditions, Table, load_table
from trainer import config
from trainer.machine import Machine

# ------------------------------------------------------------------------------------------------- what is done


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the study and its keys."""

    name: str  # of the folders of runs and results
    out: Path
    results: Path
    command: str  # what makes the same table elsewhere
    keep_code: bool
    warmup: int
    table: dict[str, Finished] = dataclasses.field(default_factory=dict)  # rows of the table that is extended, by job

    @property
    def table_folder(self) -> Path:
        """Where table.json and table.md go."""
        return self.results / self.name

    @property
    def runs_folder(self) -> Path:
        """Where the runs lie, and the page and the figures."""
        return self.out / self.name


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
    baseline, first = next(iter(study.arms)), jobs[0]
    base = settings(first.model, first.cfg)
    finished = {job.id: finished_row(job, asked) for job in jobs}
    seconds = {key: found.seconds if found else None for key, found in finished.items()}
    arms: dict[str, Arm] = {}
    for name in study.arms:
        of_arm = [job for job in jobs if job.arm == name]
        rows = [row_of(job, finished[job.id]) for job in of_arm]
        arms[name] = arm_entry(study.arms[name], of_arm[0], rows, base, arms.get(baseline))
    table = Table(
        name=asked.name,
        question=study.question,
        command=asked.command,
        code=first.code_hash,
        **train.provenance(),
        baseline=baseline,
        config=base,
        data=first.samples,
        seeds=study.seeds,
        asked=study.hypotheses,
        measured=Conditions(study.n_seq, study.seq_len, study.points, "float32"),
        published=study.published,
        arms=arms,
        interactions=aggregate.interactions(arms, baseline),
        times={f"{job.arm}-{job.seed}": seconds[job.id] for job in jobs},
    )
    return dataclasses.replace(table, hypotheses=hypotheses.judge(table))


def row_of(job: Job, finished: Finished | None) -> Planned:
    """The row of a job, whatever became of it."""
    if finished:
        return finished.row
    return Planned(job.seed, job.id, job.code_hash, STARTED if started(job) else NOT_RUN)


def arm_entry(
    configs: str | dict[str, Any], job: Job, rows: list[Planned], base: dict[str, Any], baseline: Arm | None
) -> Arm:
    """An arm of the table; `job`: any of its, `base`: the settings of the baseline, which is None for itself."""
    parameters, flops = params_and_flops(job.model)
    difference, equal_loss = aggregate.compare(rows, baseline.seeds) if baseline else (None, None)
    return Arm(
        configs=configs,
        changes={key: value for key, value in settings(job.model, job.cfg).items() if value != base[key]},
        parameters=parameters,
        flops_per_token=flops,
        tokens=job.tokens,
        seeds=rows,
        matched=baseline is None or abs(parameters / baseline.parameters - 1) < 0.01,
        difference=difference,
        equal_loss=equal_loss,
        **vars(aggregate.arm_summary(rows)),
    )


# ---------------------------------------------------------------------------------------------- what it costs


def cost(jobs: Sequence[Job], asked: Asked, device: str) -> tuple[list[str], list[list[str]], str]:
    """(header, rows, sentence): the plan, arm by arm, and its cost; hours from a few updates of each shape."""
    rates: dict[tuple[Any, ...], float] = {}
    rows, tokens, all_flops, all_hours = [], 0, 0.0, 0.0
    for arm in dict.fromkeys(job.arm for job in jobs):
        of_arm = [job for job in jobs if job.arm == arm]
        job, left = of_arm[0], [job for job in of_arm if not finished_row(job, asked)]
        parameters, flops = params_and_flops(job.model)
        shape = (job.model, job.cfg.batch_size, job.cfg.optimizer, job.cfg.penalty, job.cfg.dtype)
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


def parser() -> Flags:
    """The flags of the command itself."""
    flags = Flags(description=__doc__)
    switch = functools.partial(flags.add_argument, action=argparse.BooleanOptionalAction, default=False)
    flags.add_argument("study", metavar="STUDY", help="a file of configs/studies/")
    switch("--dry", help="print the plan and its cost, and stop")
    flags.add_argument(
        "--warmup",
        type=functools.partial(whole, least=0),
        default=3,
        metavar="N",
        help="measured updates of --dry (default: 3; 0: none)",
    )
    switch("--keep_code", help="do not run again what other code has finished")
    switch("--extend", help="do not run again what the results' table holds")
    switch("--keep_checkpoints", help="do not delete them once they are measured")
    flags.add_argument("--name", metavar="NAME", help="of the folders of runs and results (default: the file's)")
    flags.add_argument("--out", type=Path, default=ROOT / "out" / "studies", metavar="DIR", help="of the runs")
    flags.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="of the results")
    return flags


def with_equals(argv: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """`--key value` as `--key=value`, for the keys in `kinds`; of a switch, --key as --key=true, --no-key as =false.

    Raises UserError for `--key true`, which is no way to write it.
    """
    made, rest = [], list(argv)
    while rest:
        option = rest.pop(0)
        key = option.removeprefix("--") if option.startswith("--") else ""
        if kinds.get(key) is bool:
            if rest and rest[0].lower() in config.TRUTH:
                raise UserError(f"{option} {rest[0]}: write {option}={rest[0]}")
            option = f"--{key}=true"
        elif key in kinds and rest and not rest[0].startswith("--"):
            option = f"--{key}={rest.pop(0)}"
        elif kinds.get(key.removeprefix("no-")) is bool:
            option = f"--{key.removeprefix('no-')}=false"
        made.append(option)
    return made


OWN = {"warmup": int, "name": str, "out": str, "results": str}  # flags of the command that take a value


def parse_argv(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any], dict[str, str], str]:
    """(flags, {key: value} that change the study, {key: value} that change its common keys, the command without where
    its files go: what makes the same table elsewhere, from nothing). Raises UserError."""
    of_run = {key: field.type for key, field in config.fields_of(train.SCHEMAS).items()}
    argv, flags = with_equals(argv, {**of_run, **KINDS, **OWN}), parser()
    args, rest = flags.parse_known_args(argv)
    of_study: dict[str, Any] = {}
    of_runs: dict[str, str] = {}
    for option in rest:
        key, equals, value = option.removeprefix("--").partition("=")
        if option.startswith("--") and not equals and key in (*KINDS, *of_run):
            raise UserError(f"--{key} needs a value: --{key}=VALUE")
        if not option.startswith("--") or not equals:
            known = [option for action in flags._actions for option in action.option_strings]
            raise UserError(f"unknown argument {option}{nearest(option, known)}; keys are written --key=value")
        if key not in KINDS:
            of_runs[key] = value
        elif key == "seeds":
            of_study[key] = [config.typed(key, seed, int, "command line") for seed in value.split(",")]
        elif KINDS[key] is list or key == "arms":
            of_study[key] = [name for name in value.split(",") if name]
        elif KINDS[key] is dict:
            raise UserError(f"--{key}: write it into the study file")
        else:
            of_study[key] = config.typed(key, value, KINDS[key], "command line")
    shown = [arg for arg in argv if not arg.startswith(("--out=", "--results=", "--extend", "--no-extend"))]
    return args, of_study, of_runs, " ".join(["python", "study.py", *shown])


def main() -> None:
    args, of_study, of_runs, command = parse_argv(sys.argv[1:])
    device = of_runs.pop("device", "auto")
    study, name = read_study(args.study, of_study), args.name or Path(args.study).stem
    asked = Asked(name, args.out, args.results, command, args.keep_code, args.warmup)
    jobs = plan(study, asked.runs_folder, of_runs, code_version())
    if args.extend:
        asked = dataclasses.replace(asked, table=rows_of_table(asked.table_folder / "table.json", jobs))
    if args.dry:
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
            do_run(job, study, device, args.keep_checkpoints)
            bar.update(job.tokens)
            write_results(study, jobs, asked, last=False)
    table = write_results(study, jobs, asked, last=True)
    if all(isinstance(row, Ended) for row in tables.all_runs(table)):  # of ranks, the last
        print(f"{tables.terminal(table)}\n\nresults: {asked.table_folder}\npage:    {asked.runs_folder / 'index.html'}")


if __name__ == "__main__":
    cli(main)
