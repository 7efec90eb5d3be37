"""Builds every arm of configs/ at 125M and at nano scale, trains the small one, runs detect, and prints a table.

  python -m benchmarks.arms [ARM ...] [--steps=20] [--dataset=stdlib] [--markdown]

20 steps show that an arm works, not what it does; that takes seeds, time and the literature. With --markdown, the
command prints configs/README.md.
"""

import ast
import tempfile

from tqdm import tqdm

from data.loader import Tokens
from spikesink.errors import Flags, cli
from spikesink.measure.observe import observe
from spikesink.measure.summarise import summarise
from spikesink.models.subject import Subject
from spikesink.show.text import grid
from studies.jobs import params_and_flops
from studies.tables import markdown_table
from train import ROOT, SCHEMAS, Run
from trainer import config
from trainer.machine import Machine

NOT_ARMS = ("quickstart", "backcopy")
MARKDOWN = """# Arms

A file per arm, holding only the lines that differ from the baseline (`prenorm`: GPT-2 small, every default). Sizes are
in `scale/` and are taken first, so an arm keeps what it says: `python train.py postnorm scale/nano --dataset=stdlib`.

Parameters and training FLOPs per token are at GPT-2 small's size, T = 1024; the loss and the rest after {steps} steps
at nano scale, one seed: a sign of life, not a finding. Made by
`python -m benchmarks.arms --markdown > configs/README.md`.
"""


def arm_names() -> list[str]:
    """Names of the arms: the baseline, then the others in alphabetical order."""
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    return ["prenorm", *(name for name in names if name not in ("prenorm", *NOT_ARMS))]


def changes(name: str) -> tuple[str, str]:
    """(first line of an arm's docstring, its assignments as text)."""
    tree = ast.parse((ROOT / "configs" / f"{name}.py").read_text())
    lines = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    return (ast.get_docstring(tree) or " ").splitlines()[0].rstrip("."), ", ".join(lines).replace(" = ", "=")


HEADER = ["arm", "params (M)", "MFLOPs/token", "loss", "val loss", "top1/median", "Sink_1 (0.3)"]


def try_arm(name: str, steps: int, dataset: str) -> list[str]:
    """A row of the table: an arm's size at 125M, and loss, spike and sink of its nano model after `steps` steps."""
    parameters, flops = params_and_flops(config.build(SCHEMAS, config.parse_argv(SCHEMAS, [name], ROOT)[0])[0])
    options = [f"--dataset={dataset}", f"--max_iters={steps}", "--warmup_iters=10", "--dtype=float32", "--no-compile"]
    with tempfile.TemporaryDirectory() as folder:
        trial = Run.open(config.parse_argv(SCHEMAS, ["scale/nano", name, *options], ROOT)[0], folder, Machine.find())
        for _ in range(steps):
            loss = trial.update().loss
        subject = Subject.from_gpt(trial.model, str)
        ids = Tokens(dataset, "val", 64, trial.cfg.bos).read(range(16))[0]
        findings = summarise(subject, observe(subject, ids, progress=False))
    losses = f"{loss:.3f}", f"{findings.data.loss:.3f}"
    spike_and_sink = f"{findings.largest_ratio:.1f}", f"{findings.sinks.first:.3f}"
    return [name, f"{parameters / 1e6:.1f}", f"{flops / 1e6:.1f}", *losses, *spike_and_sink]


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("arms", nargs="*", metavar="ARM", help="default: all")
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--dataset", default="stdlib")
    flags.add_argument("--markdown", action="store_true", help="print configs/README.md")
    args = flags.parse_args()
    rows = [try_arm(name, args.steps, args.dataset) for name in tqdm(args.arms or arm_names(), disable=None)]
    if not args.markdown:
        print(grid(HEADER, rows))
        return
    described = []
    for name, *cells in rows:
        text, assignments = changes(name)
        described.append([f"`{name}`", f"`{assignments}`" if assignments else "-", text, *cells])
    lines = markdown_table(["arm", "changes", "what and whence", *HEADER[1:]], described)
    print("\n".join([MARKDOWN.format(steps=args.steps), *lines]))


if __name__ == "__main__":
    cli(main)
