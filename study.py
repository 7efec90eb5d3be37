"""Does it hold over arms and seeds?    python study.py STUDY [--key=value ...]

  python study.py configs/studies/ci.py            seconds; what a study file is
  python study.py configs/studies/norm.py --dry    the plan and its cost
  python study.py configs/studies/norm.py --seeds=1,2 --max_iters=500 --name=try
  torchrun --nproc_per_node=8 study.py configs/studies/norm.py     a run per GPU

--key=value changes a key that all arms have in common (an arm keeps what it
says), or what the study file says: --seeds=1,2 --arms=pre,post
--scale=scale/tiny --points=20 (checkpoints measured of each run) --n_seq=100
--seq_len=64 --ablations=spike_zero,sink_mask --probes=true --hypotheses=H1,H2.

Trains, detects and ablates every arm x seed; writes one table with intervals.
Runs lie in out/studies/NAME/ARM-SEED, results in results/NAME. Killed anywhere,
the same command goes on. What is done is not done again: a run is known by its
config, its data, what is measured, and a hash of the code; where any of these
has changed it is run anew (with --keep_code, a finished run of other code is
kept, and the table says of which). A run that two studies ask for is done once.
With --extend, what the results' table holds is not run again either: more seeds
or arms for a table that came with the clone.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import filelock
import torch
from tqdm import tqdm

import train
from detect import LAB
from spikesink import api, files, schema
from spikesink.edit.findings import Ablation
from spikesink.errors import Flags, InterruptedRunError, StoppedError, UserError, cli, nearest
from spikesink.files import rows_of
from spikesink.measure import findings
from spikesink.measure.observe import observe
from spikesink.models import checkpoint
from spikesink.options import Options, whole
from spikesink.show.text import grid, number
from studies import aggregate, hypotheses, measures, report, tables
from studies.jobs import ROOT, Study, code_version, data_of, plan, read_study, settings, size
from trainer import checkpoints, config
from trainer.machine import Machine

SCHEMA = "spikesink-study-1"
ENDED = (aggregate.DONE, "diverged")

# --------------------------------------------------------------------------------------------------- a run


def stored(job, args):
    """A job's row if it is done, here or in the table that is extended; else None."""
    row = read(job.folder / "row.json")
    if row and (row["job"] == job.id or (args.keep_code and row["what"] == job.what)):
        return row
    return args.held.get(job.id)


def started(job):
    """True if what lies in a job's folder is that job's."""
    return (read(job.folder / "job.json") or {}).get("job") == job.id


def read(path):
    """What a JSON file holds; None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def shared(job):
    """True if another study in the same folder has done the very same run: its files are then this job's too."""
    rows = job.folder.parent.parent.glob("*/*/row.json")
    twin = next((path.parent for path in rows if read(path)["job"] == job.id), None)
    for name in ("job.json", "log.jsonl", *("detect.json", "course.json", "ablate.json", "row.json")) if twin else ():
        if (twin / name).is_file():
            files.save_bytes(job.folder / name, (twin / name).read_bytes())
    return twin is not None


def held(path, jobs):
    """{job: row} of the runs that ended, of a table. Raises UserError, also where the new table would lose one."""
    try:
        table = read(path)
        rows = {f"{arm}-{row['seed']}": row for arm, of in table["arms"].items() for row in of["seeds"]}
        rows = {name: {**row, "seconds": table["times"][name]} for name, row in rows.items() if row["status"] in ENDED}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--extend: {path} is no table of study.py; without --extend a new one is made") from None
    lost = [name for name, row in rows.items() if row["job"] not in {job.id for job in jobs}]
    if lost:
        raise UserError(
            f"--extend: {path} holds {len(lost)} runs that are not asked for, {lost[0]} the first: ask for all of its "
            f"arms and seeds with its keys ({table['command']!r}); runs of other code cannot be kept"
        )
    return {row["job"]: row for row in rows.values()}


def once(path, make):
    """What `make()` returns, from the file that holds it if it was made before."""
    if not path.is_file():
        files.save_json(path, make())
    return read(path)


def perform(job, study, device, keep_checkpoints):
    """Trains and measures one run, or goes on with it; its row.json comes last, so that a run is done or it is not."""
    if not started(job):
        if (job.folder / "job.json").is_file():
            check_idle(job.folder)
            tqdm.write(f"{job.name}: what {job.folder} holds is of another config, data or code: run anew")
            shutil.rmtree(job.folder)
        elif job.folder.exists() and any(not path.name.startswith(".") for path in job.folder.iterdir()):
            raise UserError(f"{job.folder} holds something else than a run of a study: give another --out or --name")
        if not keep_checkpoints and shared(job):
            return
        files.save_json(job.folder / "job.json", {"job": job.id})
    since, row = time.perf_counter(), {"seed": job.seed, "job": job.id, "what": job.what, "code": job.code}
    machine = Machine.find(device).at(job.cfg.dtype)
    machine = dataclasses.replace(machine, rank=0, world=1)  # under torchrun, a run per rank
    try:
        loss = trained(job, machine)
        row |= {"status": aggregate.DONE, "step": job.cfg.max_iters, "lr": None, "loss": loss}
    except Diverged as stop:
        row |= {"status": "diverged", "step": stop.step, "lr": stop.lr, "loss": None}
    row |= {"tokens": row["step"] * job.tokens // job.cfg.max_iters, "machine": described(machine)}
    row["torch"] = str(torch.__version__)
    if row["status"] == aggregate.DONE:
        row |= measured(job, study, machine, row)
    files.save_json(job.folder / "row.json", {**row, "seconds": time.perf_counter() - since})
    if not keep_checkpoints:
        checkpoints.Checkpoints(job.folder).clear()


def check_idle(folder):
    """Raises UserError if another process trains there."""
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            pass
    except filelock.Timeout:
        raise UserError(f"another study trains in {folder}: stop it, or give this one another --name") from None


class Diverged(Exception):
    """A run whose loss or gradient was not finite: at which step and learning rate."""

    def __init__(self, step, lr):
        super().__init__()
        self.step, self.lr = step, lr


def trained(job, machine):
    """Trains a job to its end, from a checkpoint of step 0 on; the validation loss there.

    Raises Diverged, and InterruptedRunError after a signal.
    """
    going_on = checkpoints.Checkpoints(job.folder).any()
    given = {**job.given, "resume": going_on, "overwrite": not going_on}
    run_ = train.open_run(given, str(job.folder), machine)
    run_.open_folder()
    if run_.step == 0:
        run_.save()
    try:
        train.carry_out(run_, job.name)
        if not math.isfinite(run_.val_loss):
            raise Diverged(run_.step, train.learning_rate(run_.step - 1, run_.cfg))
    except StoppedError:
        raise Diverged(run_.step + 1, train.learning_rate(run_.step, run_.cfg)) from None
    except InterruptedRunError as stop:
        raise InterruptedRunError(str(stop).replace("go on with --resume", "the same command goes on")) from None
    finally:
        torch._dynamo.reset()  # what was compiled for one arm is of no use to the next
    return run_.val_loss


def measured(job, study, machine, row):
    """What a finished run shows: the entries of its row. What is measured already is read from its folder."""
    torch.set_float32_matmul_precision("highest")
    path = job.folder / "ckpt.pt"
    options = Options(n_seq=study.n_seq, seq_len=study.seq_len, device=str(machine.device))
    look = functools.cache(lambda: api.open(path, options, lab=LAB, calibration=True))
    found = once(job.folder / "detect.json", lambda: api.detect(look()))
    numbers = {"loss": row["loss"], **measures.of_findings(found)}
    last = {key: row[key] for key in ("step", "tokens", "loss")} | {"measures": numbers}
    points = once(job.folder / "course.json", lambda: {"points": course(job, options)})["points"]
    effects = {"measures": numbers, "ablations": {}}
    if study.ablations:
        once(job.folder / "ablate.json", lambda: schema.to_json(api.ablate(look(), study.ablations, study.probes)))
        ablation = Ablation.load(job.folder / "ablate.json")
        effects = {"measures": numbers | measures.of_ablation(ablation), "ablations": measures.ablations(ablation)}
    return {
        "weights": files.content_hash(checkpoint.load(path)["model"])[:16],
        "verdicts": {name: verdict["verdict"] for name, verdict in found["verdicts"].items()},
        **effects,
        "where": tables.where(found),
        "course": [*points, last],
    }


def course(job, options):
    """What the checkpoints at the study's points show, but for the last, on the same sequences: rows by step.

    A run that was stopped has one of another step too, which is not looked at.
    """
    losses = {row["step"]: row["val_loss"] for row in rows_of(job.folder / "log.jsonl")}
    points = []
    for step, path in checkpoints.Checkpoints(job.folder).all().items():
        if step < job.cfg.max_iters and step % job.cfg.keep_every == 0:
            look = api.open(path, options, lab=LAB)
            subject = look.subjects[0]
            observation = observe(subject, look.ids, options.batch_size, desc=f"step {step}")
            found = files.plain(findings.detection(subject, observation, **look.about))
            numbers = {"loss": losses.get(step), **measures.of_findings(found)}
            tokens = step * job.tokens // job.cfg.max_iters
            points.append({"step": step, "tokens": tokens, "loss": losses.get(step), "measures": numbers})
    return points


def described(machine):
    """The machine of a run, in words, and the dtype that it trains in."""
    cuda = machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device) if cuda else f"{platform.machine()} CPU"
    threads = "" if cuda else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, {str(machine.dtype).removeprefix('torch.')}"


# --------------------------------------------------------------------------------------------- the results


def collect(study, jobs, args, command, whole):
    """Writes the table of all that has been run to the results' folder; with `whole`, figures and the page too."""
    folder = Path(args.results) / args.name
    with filelock.FileLock(jobs[0].folder.parent / ".lock"):
        table = table_of(study, jobs, args, command)
        files.save_json(folder / "table.json", table)
        report.study_files(folder, table, whole)
        for job in jobs if whole else ():
            if (job.folder / "log.jsonl").is_file():
                log = (job.folder / "log.jsonl").read_bytes()
                files.save_bytes(folder / "logs" / f"{job.arm}-{job.seed}.jsonl", log)
    return table


def table_of(study, jobs, args, command):
    """The findings of a study, a dict: every run that was planned, arm by arm, and what follows from them."""
    baseline = next(iter(study.arms))
    first = {job.arm: job for job in reversed(jobs)}
    base, arms, times = settings(first[baseline].model, first[baseline].cfg), {}, {}
    for arm in study.arms:
        rows = []
        for job in (job for job in jobs if job.arm == arm):
            row = stored(job, args) or {
                "seed": job.seed,
                "job": job.id,
                "code": job.code,
                "status": "started" if started(job) else "not run",
            }
            times[f"{arm}-{job.seed}"] = row.get("seconds")
            rows.append({key: value for key, value in row.items() if key not in ("what", "seconds")})
        own = settings(first[arm].model, first[arm].cfg)
        parameters, flops = size(first[arm].model)
        arms[arm] = {
            "configs": study.arms[arm],
            "changes": {key: value for key, value in own.items() if value != base[key]},
            "parameters": parameters,
            "flops_per_token": flops,
            "tokens": first[arm].tokens,
            "seeds": rows,
            **aggregate.arm_summary(rows),
        }
    for arm in arms.values():
        arm["matched"] = abs(arm["parameters"] / arms[baseline]["parameters"] - 1) < 0.01
        if arm is not arms[baseline]:
            arm["difference"], arm["equal_loss"] = aggregate.compare(arm["seeds"], arms[baseline]["seeds"])
    table = {
        "schema": SCHEMA,
        "name": args.name,
        "question": study.question,
        "command": command,
        "code": jobs[0].code,
        **train.provenance(),
        "baseline": baseline,
        "config": base,
        "data": data_of(base["dataset"])[1],
        "seeds": study.seeds,
        "asked": study.hypotheses,
        "measured": {"n_seq": study.n_seq, "seq_len": study.seq_len, "points": study.points, "dtype": "float32"},
        "published": study.published,
        "arms": arms,
        "interactions": aggregate.interactions(arms, baseline),
        "times": times,
    }
    return {**table, "hypotheses": hypotheses.judge(table)}


# ---------------------------------------------------------------------------------------------- what it costs


def cost(jobs, args, device):
    """(header, rows, sentence): the plan, arm by arm, and its cost; hours from a few updates of each shape."""
    rates, rows, totals = {}, [], {"tokens": 0, "flops": 0.0, "hours": 0.0}
    for arm in dict.fromkeys(job.arm for job in jobs):
        of_arm = [job for job in jobs if job.arm == arm]
        job, left = of_arm[0], [job for job in of_arm if not stored(job, args)]
        parameters, flops = size(job.model)
        shape = (job.model, job.cfg.batch_size, job.cfg.optimizer, job.cfg.penalty, job.cfg.dtype)
        if args.warmup and left and shape not in rates:
            rates[shape] = rate(job, args.warmup, device)
        hours = sum(job.tokens for job in left) / rates[shape] / 3600 if shape in rates else math.nan if left else 0.0
        totals["tokens"] += sum(job.tokens for job in left)
        totals["flops"] += flops * sum(job.tokens for job in left)
        totals["hours"] += hours
        seen = f"{parameters / 1e6:.3f}", f"{flops / 1e6:.2f}", f"{job.cfg.max_iters:,}", f"{job.tokens / 1e6:,.1f}"
        rows.append([arm, *seen, f"{len(of_arm) - len(left)} of {len(of_arm)}", number(hours)])
    header = ["arm", "params (M)", "MFLOPs/token", "steps", "Mtokens a run", "done", "hours left"]
    hours = f"{number(totals['hours'])} hours of training" + ("" if args.warmup else " (not measured: --warmup=0)")
    return (
        header,
        rows,
        (
            f"left: {totals['tokens'] / 1e6:,.1f}M tokens, {totals['flops']:.3g} FLOPs, {hours} one run at a time, on "
            f"{described(Machine.find(device).at(jobs[0].cfg.dtype))}; measuring what was trained comes on top"
        ),
    )


def rate(job, updates, device):
    """Tokens a second of a job's training, from a few updates after a first one; NaN if it diverges in these."""
    machine = dataclasses.replace(Machine.find(device), rank=0, world=1)
    with tempfile.TemporaryDirectory() as folder:
        run_ = train.open_run({**job.given, "overwrite": True}, folder, machine)
        model = train.ready(run_)
        try:
            run_.update(model)
            since = time.perf_counter()
            for _ in range(updates):
                run_.update(model)  # ends with the loss as a number: the device has done it
            return updates * run_.tokens_per_step / (time.perf_counter() - since)
        except StoppedError:  # it will diverge: who knows when
            return math.nan
        finally:
            torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ main


def parse():
    """(flags, {key: value} that change the study, {key: value} that change its common keys). Raises UserError."""
    flags = Flags(description=__doc__)
    flags.add_argument("study", metavar="STUDY", help="a file of configs/studies/")
    flags.add_argument("--dry", action="store_true", help="print the plan and its cost, and stop")
    flags.add_argument(
        "--warmup",
        type=functools.partial(whole, least=0),
        default=3,
        metavar="N",
        help="measured updates of --dry (default: 3; 0: none)",
    )
    flags.add_argument("--keep_code", action="store_true", help="do not run again what other code has finished")
    flags.add_argument("--extend", action="store_true", help="do not run again what the results' table holds")
    flags.add_argument("--keep_checkpoints", action="store_true", help="do not delete them once they are measured")
    flags.add_argument("--name", metavar="NAME", help="of the folders of runs and results (default: the file's)")
    flags.add_argument("--out", default=str(ROOT / "out" / "studies"), metavar="DIR", help="of the runs")
    flags.add_argument("--results", default=str(ROOT / "results"), metavar="DIR", help="of the results")
    args, rest = flags.parse_known_args()
    args.name = args.name or Path(args.study).stem
    kinds, of_study, of_runs = {f.name: f.type for f in dataclasses.fields(Study)}, {}, {}
    for option in rest:
        key, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not equals:
            known = [option for action in flags._actions for option in action.option_strings]
            raise UserError(f"unknown argument {option}{nearest(option, known)}; keys are written --key=value")
        if key not in kinds:
            of_runs[key] = value
        elif key == "seeds":
            of_study[key] = [config.typed(key, seed, int, "command line") for seed in value.split(",")]
        elif kinds[key] is list or key == "arms":
            of_study[key] = [name for name in value.split(",") if name]
        elif kinds[key] is dict:
            raise UserError(f"--{key}: write it into the study file")
        else:
            of_study[key] = config.typed(key, value, kinds[key], "command line")
    return args, of_study, of_runs


def main():
    args, of_study, of_runs = parse()
    device = of_runs.pop("device", "auto")
    study = read_study(args.study, of_study)
    folder = Path(args.out) / args.name
    jobs = plan(study, folder, of_runs, code_version())
    results = Path(args.results) / args.name / "table.json"
    args.held = held(results, jobs) if args.extend else {}
    if args.dry:
        header, rows, sentence = cost(jobs, args, device)
        print(f"{study.question}\n\n{grid(header, rows)}\n\n{sentence}")
        return
    for path in (results, folder / "row.json"):
        files.check_writable(path)
    folder.mkdir(parents=True, exist_ok=True)
    asked = any(job.cfg.deterministic for job in jobs)
    if asked or Machine.find(device).device.type == "cpu":
        train.be_deterministic(asked)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = jobs[rank::world]
    left = [job for job in mine if not stored(job, args)]
    command = shown_command(sys.argv)
    with tqdm(total=sum(job.tokens for job in left), unit="token", unit_scale=True, disable=None, desc="study") as bar:
        for number, job in enumerate(left):
            bar.set_postfix_str(f"{job.name}, run {number + 1} of {len(left)}")
            perform(job, study, device, args.keep_checkpoints)
            bar.update(job.tokens)
            collect(study, jobs, args, command, whole=False)
    table = collect(study, jobs, args, command, whole=True)
    if all(row["status"] in ENDED for arm in table["arms"].values() for row in arm["seeds"]):  # of ranks, the last
        print(f"{tables.terminal(table)}\n\nresults: {results.parent}")


def shown_command(argv):
    """The command, without where its files go: what makes the same table elsewhere, from nothing."""
    kept = [arg for arg in argv[1:] if not arg.startswith(("--out=", "--results=", "--extend"))]
    return " ".join(["python", "study.py", *kept])


if __name__ == "__main__":
    cli(main)
