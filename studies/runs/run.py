"""One run of a study: trained, detected, ablated, and written as a row."""

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
from studies.runs.rows import DIVERGED, DONE, Ablations, Done, Ended, Finished, Measures, Point, finished_json
from trainer import checkpoints
from trainer.machine import Machine

if TYPE_CHECKING:
    from studies.jobs import Job, Study

OF_A_RUN = ("job.json", "log.jsonl", "detect.json", "int8.json", "course.json", "ablate.json", "row.json")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def started(job: Job) -> bool:
    """True if what lies in a job's folder is that job's."""
    return (read_json(job.folder / "job.json") or {}).get("job") == job.id


def copy_twin(job: Job) -> bool:
    """Takes over the files of the very same run of another study in the same folder; False where there is none."""
    rows = job.folder.parent.parent.glob("*/*/row.json")
    twin = next((path.parent for path in rows if read_json(path)["job"] == job.id), None)
    if twin is None:
        return False
    for path in (twin / name for name in OF_A_RUN):
        if path.is_file():
            files.save_bytes(job.folder / path.name, path.read_bytes())
    return True


def cached_json(path: Path, make: Callable[[], Any]) -> Any:
    """What `make()` returns, from the file that holds it if it was made before."""
    if not path.is_file():
        schema.save(path, make())
    return read_json(path)


def do_run(job: Job, study: Study, device: str, keep_checkpoints: bool) -> None:
    """Trains and measures one run, or goes on with it; its row.json comes last, so that a run is done or it is not.

    Raises UserError where its folder is not free.
    """
    if not started(job):
        make_room(job)
        if not keep_checkpoints and copy_twin(job):
            return
        schema.save(job.folder / "job.json", {"job": job.id})
    since = time.perf_counter()
    machine = Machine.find(device).with_dtype(job.cfg.dtype)
    machine = dataclasses.replace(machine, rank=0, world=1)  # under torchrun, a run per rank
    row: Ended
    try:
        row = measure_run(job, study, machine, train_run(job, machine))
    except Diverged as stop:
        row = Ended(status=DIVERGED, lr=stop.lr, loss=None, **identity(job, stop.step, machine))
    schema.save(job.folder / "row.json", finished_json(Finished(row, time.perf_counter() - since), job.config_hash))
    if not keep_checkpoints:
        checkpoints.Checkpoints(job.folder).clear()


def make_room(job: Job) -> None:
    """Removes another run of a study from a job's folder. Raises UserError if anything else is there."""
    if (job.folder / "job.json").is_file():
        check_idle(job.folder)
        tqdm.write(f"{job.name}: what {job.folder} holds is of another config, data or code: run anew")
        shutil.rmtree(job.folder)
    elif job.folder.exists() and any(not path.name.startswith(".") for path in job.folder.iterdir()):
        raise UserError(f"{job.folder} holds something else than a run of a study: give another --out or --name")


def check_idle(folder: Path) -> None:
    """Raises UserError if another process trains there."""
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            pass
    except filelock.Timeout:
        raise UserError(f"another study trains in {folder}: stop it, or give this one another --name") from None


def identity(job: Job, step: int, machine: Machine) -> dict[str, Any]:
    """What every row of a run that ended says: which run it was, how far it came, and where."""
    return {
        **{"seed": job.seed, "job": job.id, "code": job.code_hash},
        **{"step": step, "tokens": step * job.tokens // job.cfg.max_iters},
        **{"machine": describe_machine(machine), "torch": str(torch.__version__)},
    }


def describe_machine(machine: Machine) -> str:
    """The machine of a run, in words, and the dtype that it trains in."""
    cuda = machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device) if cuda else f"{platform.machine()} CPU"
    threads = "" if cuda else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, {str(machine.dtype).removeprefix('torch.')}"


class Diverged(Exception):
    """A run whose loss or gradient was not finite: at which step and learning rate."""

    def __init__(self, step: int, lr: float) -> None:
        super().__init__()
        self.step, self.lr = step, lr


def train_run(job: Job, machine: Machine) -> float:
    """Trains a job to its end, from a checkpoint of step 0 on; the validation loss there.

    Raises Diverged, and InterruptedRunError after a signal.
    """
    going_on = checkpoints.Checkpoints(job.folder).any()
    run = train.Run.open({**job.given, "resume": going_on, "overwrite": not going_on}, job.folder, machine)
    if run.step == 0:
        run.save()
    try:
        run.fit(job.name)
    except StoppedError:
        raise Diverged(run.step + 1, train.learning_rate(run.step, run.cfg)) from None
    except InterruptedRunError as stop:
        raise InterruptedRunError(str(stop).replace("go on with --resume", "the same command goes on")) from None
    finally:
        torch._dynamo.reset()  # what was compiled for one arm is of no use to the next
    if run.val_loss is None or not math.isfinite(run.val_loss):
        raise Diverged(run.step, train.learning_rate(run.step - 1, run.cfg))
    return run.val_loss


def measure_run(job: Job, study: Study, machine: Machine, loss: float) -> Done:
    """The row of a run that was trained to its end. What is measured already is read from its folder."""
    torch.set_float32_matmul_precision("highest")
    path = job.folder / "ckpt.pt"
    options = Options(n_seq=study.n_seq, seq_len=study.seq_len, device=str(machine.device))
    look = functools.cache(lambda: api.open(path, options, lab=LAB, calibration=True))
    if not (file := job.folder / "detect.json").is_file():
        api.detect(look()).save(file)
    found = Findings.load(file)
    numbers: Measures = {"loss": loss, **measures.of_findings(found)}
    if study.int8:
        numbers |= cached_json(job.folder / "int8.json", lambda: measures.of_int8(look()))
    made = lambda: {"points": schema.to_json(course(job, options, study.int8))}
    points = cached_json(job.folder / "course.json", made)["points"]
    of_run = identity(job, job.cfg.max_iters, machine)
    last = Point(of_run["step"], of_run["tokens"], loss, numbers)
    ablations: dict[str, Any] = {}
    if study.ablations:
        if not (file := job.folder / "ablate.json").is_file():
            api.ablate(look(), study.ablations, study.probes).save(file)
        ablation = Ablation.load(file)
        numbers, ablations = numbers | measures.of_ablation(ablation), measures.ablations(ablation)
    return Done(
        **of_run,
        status=DONE,
        lr=None,
        loss=loss,
        weights=files.content_hash(checkpoint.load(path).model)[:16],
        verdicts=found.verdicts.words,
        measures=numbers,
        ablations=schema.from_json(Ablations, ablations),
        course=[*schema.from_json(list[Point], points), last],
        where=measures.where(found),
    )


def course(job: Job, options: Options, int8: bool) -> list[Point]:
    """What the checkpoints at the study's points show, but for the last, on the same sequences.

    A run that was stopped has one of another step too, which is not looked at.
    """
    losses = {row["step"]: row["val_loss"] for row in rows_of(job.folder / "log.jsonl")}
    points = []
    for step, path in checkpoints.Checkpoints(job.folder).all().items():
        if step < job.cfg.max_iters and step % job.cfg.keep_every == 0:
            look = api.open(path, options, lab=LAB)
            subject = look.subjects[0]
            observation = observe(subject, look.ids, options.batch_size, desc=f"step {step}")
            found = summarise(subject, observation, **look.about)
            numbers = {"loss": losses.get(step), **measures.of_findings(found)}
            numbers |= measures.of_int8(look) if int8 else {}
            points.append(Point(step, step * job.tokens // job.cfg.max_iters, losses.get(step), numbers))
    return points
