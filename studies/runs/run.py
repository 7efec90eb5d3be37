"""Trains, detects and ablates one run of a study, and writes its row."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
from tqdm import tqdm

import train
from detect import LAB
from spikesink import api, files, schema
from spikesink.edit.findings import Ablation
from spikesink.errors import InterruptedRunError, StoppedError, UserError
from spikesink.files import rows_of
from spikesink.measure.findings import Findings
from spikesink.measure.observe import observe
from spikesink.measure.summarise import summarise
from spikesink.models import checkpoint
from spikesink.options import Options
from studies.runs import measures
from studies.runs.rows import DIVERGED, DONE, Ablations, Done, Ended, Measures, Point
from trainer import checkpoints
from trainer.machine import Machine

if TYPE_CHECKING:
    from studies.jobs import Job, Study

RUN_FILES = ("job.json", "log.jsonl", "detect.json", "int8.json", "course.json", "ablate.json", "row.json")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None


def started(job: Job) -> bool:
    """True if the job's folder holds this very job."""
    return (read_json(job.folder / "job.json") or {}).get("job") == job.id


def copy_twin(job: Job) -> bool:
    """Copies the files of the same run of another study in the same folder. False if there is no such run."""
    rows = job.folder.parent.parent.glob("*/*/row.json")
    twin = next((path.parent for path in rows if read_json(path)["job"] == job.id), None)
    if twin is None:
        return False
    for path in (twin / name for name in RUN_FILES):
        if path.is_file():
            files.save_bytes(job.folder / path.name, path.read_bytes())
    return True


def cached(path: Path, make: Callable[[], Any]) -> Path:
    """The path of a JSON file. If there is no such file, it is made first, from the result of `make()`."""
    if not path.is_file():
        schema.save(path, make())
    return path


def do_run(job: Job, study: Study, device: str, keep_checkpoints: bool) -> None:
    """Trains and measures one run, or resumes it. It writes row.json last, so that a run with a row.json is complete.
    Raises UserError if another process uses its folder, or if the folder holds anything but a run of a study."""
    if not started(job):
        clear_folder(job)
        if not keep_checkpoints and copy_twin(job):
            return
        schema.save(job.folder / "job.json", {"job": job.id})
    since = time.perf_counter()
    machine = Machine.find(device).with_dtype(job.cfg.dtype)
    machine = dataclasses.replace(machine, rank=0, world=1)  # under torchrun, every rank makes its own runs
    try:
        row: Ended = measure_run(job, study, machine, train_run(job, machine))
    except Diverged as stop:
        row = Ended(status=DIVERGED, lr=stop.lr, loss=None, **identity(job, stop.step, machine))
    content = {**schema.to_json(row), "what": job.config_hash, "seconds": time.perf_counter() - since}
    schema.save(job.folder / "row.json", content)  # which read_finished reads
    if not keep_checkpoints:
        checkpoints.Checkpoints(job.folder).clear()


def clear_folder(job: Job) -> None:
    """Removes another run of a study from a job's folder. Raises UserError if anything else is there, or if another
    process trains in it."""
    if (job.folder / "job.json").is_file():
        try:
            with filelock.FileLock(job.folder / ".lock", timeout=0):
                pass
        except filelock.Timeout:
            problem = f"another study trains in {job.folder}: stop it, or choose another --name for this one"
            raise UserError(problem) from None
        tqdm.write(f"{job.name}: {job.folder} holds a run of another config, data or code: it is run again")
        shutil.rmtree(job.folder)
    elif job.folder.exists() and any(not path.name.startswith(".") for path in job.folder.iterdir()):
        raise UserError(f"{job.folder} holds something other than a run of a study: choose another --out or --name")


def identity(job: Job, step: int, machine: Machine) -> dict[str, Any]:
    """The fields that every row of an ended run has: which run it was, how far it came, and on which machine."""
    return {
        **{"seed": job.seed, "job": job.id, "code": job.code_hash},
        **{"step": step, "tokens": step * job.tokens // job.cfg.max_iters},
        **{"machine": describe_machine(machine), "torch": str(torch.__version__)},
    }


def describe_machine(machine: Machine) -> str:
    """The machine of a run and the dtype that it trains in, in words."""
    cuda = machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device) if cuda else f"{platform.machine()} CPU"
    threads = "" if cuda else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, {str(machine.dtype).removeprefix('torch.')}"


class Diverged(Exception):
    """A run's loss or gradient was not finite, at this step and learning rate."""

    def __init__(self, step: int, lr: float) -> None:
        super().__init__()
        self.step, self.lr = step, lr


def train_run(job: Job, machine: Machine) -> float:
    """Trains a job to its end, with a checkpoint at step 0. Returns its validation loss at the end. Raises Diverged,
    and InterruptedRunError after a signal."""
    resume = checkpoints.Checkpoints(job.folder).any()
    run = train.Run.open({**job.keys, "resume": resume, "overwrite": not resume}, job.folder, machine)
    if run.step == 0:
        run.save()
    try:
        run.fit(job.name)
    except StoppedError:
        raise Diverged(run.step + 1, train.learning_rate(run.step, run.cfg)) from None
    except InterruptedRunError as stop:
        raise InterruptedRunError(str(stop).replace("go on with --resume", "the same command goes on")) from None
    finally:
        torch._dynamo.reset()  # frees what was compiled for this arm
    if run.val_loss is None or not math.isfinite(run.val_loss):
        raise Diverged(run.step, train.learning_rate(run.step - 1, run.cfg))
    return run.val_loss


def measure_run(job: Job, study: Study, machine: Machine, loss: float) -> Done:
    """The row of a run that was trained to its end. Measurements that are in its folder already are read from there."""
    torch.set_float32_matmul_precision("highest")
    folder, path = job.folder, job.folder / "ckpt.pt"
    options = Options(n_seq=study.n_seq, seq_len=study.seq_len, device=str(machine.device))
    look = functools.cache(lambda: api.open(path, options, lab=LAB, calibration=True))
    findings = Findings.load(cached(folder / "detect.json", lambda: api.detect(look())))
    numbers: Measures = {"loss": loss, **measures.from_findings(findings)}
    if study.int8:
        numbers |= read_json(cached(folder / "int8.json", lambda: measures.int8_costs(look())))
    points = read_json(cached(folder / "course.json", lambda: {"points": course(job, options, study.int8)}))["points"]
    run_identity = identity(job, job.cfg.max_iters, machine)
    last = Point(run_identity["step"], run_identity["tokens"], loss, numbers)
    ablations = Ablations()
    if study.ablations:
        ablate = lambda: api.ablate(look(), study.ablations, study.probes)
        ablation = Ablation.load(cached(folder / "ablate.json", ablate))
        numbers, ablations = numbers | measures.from_ablation(ablation), measures.ablations(ablation)
    return Done(
        **run_identity,
        status=DONE,
        lr=None,
        loss=loss,
        weights=files.content_hash(checkpoint.load(path).model)[:16],
        verdicts=findings.verdicts.words,
        measures=numbers,
        ablations=ablations,
        course=[*schema.from_json(list[Point], points), last],
        where=measures.where(findings),
    )


def course(job: Job, options: Options, int8: bool) -> list[Point]:
    """The measures at the study's points before the last one, on the same sequences. The checkpoint at another
    step that an interrupted run has is skipped."""
    losses = {row["step"]: row["val_loss"] for row in rows_of(job.folder / "log.jsonl")}
    points = []
    for step, path in checkpoints.Checkpoints(job.folder).all().items():
        if step < job.cfg.max_iters and step % job.cfg.keep_every == 0:
            look = api.open(path, options, lab=LAB)
            subject = look.subjects[0]
            observation = observe(subject, look.ids, options.batch_size, desc=f"step {step}")
            findings = summarise(subject, observation, **look.about)
            numbers = {"loss": losses.get(step), **measures.from_findings(findings)}
            numbers |= measures.int8_costs(look) if int8 else {}
            points.append(Point(step, step * job.tokens // job.cfg.max_iters, losses.get(step), numbers))
    return points
