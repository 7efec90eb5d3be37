"""Every arm of configs/: builds it at 125M and at nano scale, trains the small one, detects, and prints a table.

  python -m benchmarks.arms [ARM ...] [--steps=20] [--dataset=stdlib] [--markdown]

20 steps show that an arm works, not what it does: for that there are seeds, time and the literature. With --markdown
the output is configs/README.md.
"""

import ast
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.loader import Tokens
from model import GPT, GPTConfig
from spikesink.errors import Flags, cli
from spikesink.measure.observe import observe
from spikesink.measure.summarise import summarise
from spikesink.models.subject import Subject
from spikesink.show.text import grid
from train import Run, TrainConfig
from trainer import config
from trainer.machine import Machine

ROOT = Path(__file__).resolve().parents[1]
NOT_ARMS = ("quickstart", "backcopy")
MARKDOWN = """# Arms

A file per arm, holding only the lines that differ from the baseline (`prenorm`: GPT-2 small, every default). Sizes are
in `scale/` and are taken first, so an arm keeps what it says: `python train.py postnorm scale/nano --dataset=stdlib`.

Parameters and training FLOPs per token are at GPT-2 small's size, T = 1024; the loss and the rest after {steps} steps
at nano scale, one seed: a sign of life, not a finding. Made by
`python -m benchmarks.arms --markdown > configs/README.md`.
"""


def arm_names() -> list[str]:
    """Names of the arms: the baseline, then the others by name."""
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    return ["prenorm", *(name for name in names if name not in ("prenorm", *NOT_ARMS))]


def changes(name: str) -> tuple[str, str]:
    """(first line of an arm's docstring, its assignments as text)."""
    tree = ast.parse((ROOT / "configs" / f"{name}.py").read_text())
    lines = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    return (ast.get_docstring(tree) or " ").splitlines()[0].rstrip("."), ", ".join(lines).replace(" = ", "=")


def try_arm(name: str, steps: int, dataset: str) -> dict[str, Any]:
    """One row: size at 125M, and loss, spike and sink of the nano model after `steps` steps."""
    (full, _), _, _ = config.load((GPTConfig, TrainConfig), [name], ROOT)
    with torch.device("meta"):
        large = GPT(full)
    options = [f"--dataset={dataset}", f"--max_iters={steps}", "--warmup_iters=10", "--dtype=float32", "--no-compile"]
    with tempfile.TemporaryDirectory() as folder:
        overrides, _ = config.parse_argv((GPTConfig, TrainConfig), ["scale/nano", name, *options], ROOT)
        trial = Run.open(overrides, folder, Machine.find())
        for _ in range(steps):
            loss = trial.update().loss
        data = Tokens(dataset, "val", 64, trial.cfg.bos)
        subject = Subject.of_gpt(trial.model, str)
        found = summarise(subject, observe(subject, data.read(range(16))[0], progress=False))
    return {
        "arm": name,
        "params": large.num_params(),
        "flops": large.flops_per_token(full.block_size),
        "loss": loss,
        "val_loss": found.data.loss,
        "spike": found.largest_ratio,
        "sink": found.sinks.first,
    }


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("arms", nargs="*", metavar="ARM", help="default: all")
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--dataset", default="stdlib")
    flags.add_argument("--markdown", action="store_true", help="print configs/README.md")
    args = flags.parse_args()
    rows = [try_arm(name, args.steps, args.dataset) for name in tqdm(args.arms or arm_names(), disable=None)]
    forms = {"loss": ".3f", "val_loss": ".3f", "spike": ".1f", "sink": ".3f"}
    header = ["arm", "params (M)", "MFLOPs/token", "loss", "val loss", "top1/median", "Sink_1 (0.3)"]
    cells = [
        [
            row["arm"],
            *(f"{row[key] / 1e6:.1f}" for key in ("params", "flops")),
            *(format(row[key], form) for key, form in forms.items()),
        ]
        for row in rows
    ]
    if not args.markdown:
        print(grid(header, cells))
        return
    print(MARKDOWN.format(steps=args.steps))
    print("| arm | changes | what and whence | " + " | ".join(header[1:]) + " |")
    print("|" + "---|" * (len(header) + 2))
    for row in cells:
        text, assignments = changes(row[0])
        print("| " + " | ".join([f"`{row[0]}`", f"`{assignments}`" if assignments else "-", text, *row[1:]]) + " |")


if __name__ == "__main__":
    cli(main)
