"""How large must a spike, how strong a sink be to be found? Power and false alarms on planted ground truth.

  python -m benchmarks.power            writes results/power.json, power.md and power.png; some minutes on 2 CPU cores
  python -m benchmarks.power --quick --out DIR       a few sizes, one seed, to try it

Models of model.py with random weights, whose queries and keys are scaled so that logits vary as trained ones do
(standard deviation 1). Each sequence has one planted token: at any position for a spike; for a sink among the keys
that have at least T/4 queries. Power: planted tokens that the rule marks. False alarms: other tokens that it marks.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from model import GPT, GPTConfig
from spikesink import schema
from spikesink.errors import Flags, cli
from spikesink.files import save_text
from spikesink.measure import calibrate, planted
from spikesink.measure.findings import Nulls
from spikesink.measure.observe import observe
from spikesink.measure.spikes import SPIKE_RULES
from spikesink.models.subject import Subject, sub_layers_of
from studies.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
N, H = 100, 4  # sequences, heads
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is tried."""

    sizes: tuple[int, ...] = (5, 10, 15, 20, 25, 28, 30, 32, 35, 40, 60, 100, 300, 1000, 1200)  # of spikes, medians
    alphas: tuple[float, ...] = (0.1, 0.15, 0.2, 0.25, 0.28, 0.3, 0.32, 0.35, 0.4, 0.5, 0.7, 0.9)  # of sinks
    shapes: tuple[tuple[int, int], ...] = ((64, 64), (256, 64), (768, 64), (256, 256))  # width C, length T
    prevalences: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.9)  # shares of sequences that have a spike
    samples: tuple[int, ...] = (8, 16, 60, 100)
    seeds: int = 3
    draws: int = 20


QUICK = Plan((5, 100), (0.3, 0.9), ((64, 64),), (0.9,), (8, 16), seeds=1, draws=2)


def subject_of(C: int, T: int, seed: int) -> Subject:
    """A random pre-norm model of two layers, its logits of standard deviation about 1."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(n_layer=2, n_head=H, n_embd=C, block_size=T, vocab_size=256))
    with torch.no_grad():
        for _, kind, sub_layer in sub_layers_of(model):
            if kind != "attn":
                continue
            qk = sub_layer.f.c_attn.weight[: 2 * C]
            qk.mul_(1 / (0.02 * C**0.5))  # q and k of normalised input: entries of variance 1
    return Subject.of_gpt(model, str)


def one_each(T: int, choices: int, draw: torch.Generator, prevalence: float = 1.0) -> torch.Tensor:
    """One token of `choices` positions per sequence, in a `prevalence` of the sequences: bool (N, T)."""
    tokens = torch.zeros(N, T, dtype=torch.bool)
    tokens[torch.arange(N), torch.randint(choices, (N,), generator=draw)] = True
    return tokens & (torch.rand(N, 1, generator=draw) < prevalence)


def rates(hits: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float]:
    """(power, false alarms) of a rule's hits (N, T) where `tokens` were planted."""
    return (hits & tokens).sum().item() / int(tokens.sum()), (hits & ~tokens).sum().item() / int((~tokens).sum())


def spike_curve(plan: Plan, C: int, T: int) -> list[Row]:
    """A row per size and rule, averaged over seeds."""
    rows = []
    for size in plan.sizes:
        found: dict[str, list[tuple[float, float]]] = {rule: [] for rule in SPIKE_RULES}
        for seed in range(plan.seeds):
            draw = torch.Generator().manual_seed(seed)
            subject, tokens = subject_of(C, T, seed), one_each(T, T, draw)
            ids = torch.randint(256, (N, T), generator=draw)
            with planted.spikes(subject, tokens, channel=seed, size=size):
                obs = observe(subject, ids, batch_size=N, progress=False)
            for rule, of_seed in found.items():
                of_seed.append(rates(obs.spikes[rule], tokens))
        rows += [{"C": C, "T": T, "size": size, "rule": rule, **mean(pairs)} for rule, pairs in found.items()]
    return rows


def sink_curve(plan: Plan, C: int, T: int) -> list[Row]:
    """A row per alpha, averaged over seeds; other heads' and other keys' hits are false alarms."""
    rows = []
    for alpha in plan.alphas:
        pairs, measured = [], []
        for seed in range(plan.seeds):
            draw = torch.Generator().manual_seed(seed)
            subject, tokens = subject_of(C, T, seed), one_each(T, T // 2, draw)
            ids = torch.randint(256, (N, T), generator=draw)
            bias = [planted.bias_for(alpha, k, T) + 0.5 for k in tokens.int().argmax(1).tolist()]  # others: e^(1/2)
            with planted.sinks(subject, tokens, layer=1, head=seed, bias=torch.tensor(bias)):
                obs = observe(subject, ids, batch_size=N, progress=False)
            pairs.append(rates(obs.sink_heads > 0, tokens))
            measured.append(obs.max_alpha[tokens].mean().item())
        rows.append({"C": C, "T": T, "alpha": alpha, "measured": sum(measured) / plan.seeds, **mean(pairs)})
    return rows


def mean(pairs: list[tuple[float, float]]) -> Row:
    """Seeds' (power, false alarms) as their means, with the extremes."""
    power, alarms = zip(*pairs, strict=True)
    return {
        "power": sum(power) / len(power),
        "power_range": [min(power), max(power)],
        "false_alarms": sum(alarms) / len(alarms),
    }


def verdict_of(n: int, prevalence: float, seed: int) -> str:
    """The verdict on spikes of 100x from n sequences, as if the model were large: only the sample is small."""
    draw = torch.Generator().manual_seed(seed)
    subject, tokens = subject_of(64, 64, seed), one_each(64, 64, draw, prevalence)[:n]
    ids = torch.randint(256, (n, 64), generator=draw)
    with planted.spikes(subject, tokens, channel=3, size=100):
        obs = observe(subject, ids, batch_size=n, progress=False)
    null: Nulls = {"init": calibrate.measures(observe(subject, ids[:16], batch_size=16, progress=False))}
    return calibrate.spike_verdict(obs, null, calibrate.weakness(n, 125e6, None, None)).verdict


def verdict_table(plan: Plan) -> list[Row]:
    """How often the spike verdict is what, by how many sequences have a spike of 100x, and by sample size."""
    rows = []
    for prevalence in plan.prevalences:
        for n in plan.samples:
            verdicts = [verdict_of(n, prevalence, seed) for seed in range(plan.draws)]
            shares = {word: verdicts.count(word) / plan.draws for word in ("present", "absent", "underpowered")}
            rows.append({"prevalence": prevalence, "n_seq": n, **shares})
    return rows


def draw(plan: Plan, found: dict[str, Any], path: Path) -> None:
    """The two power curves, with their false alarms."""
    figure = Figure(figsize=(12.6, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for (C, T), style in zip(plan.shapes, ("-o", "-s", "-^", "--d"), strict=False):
        for panel, rule in ((axes[0], "ratio"), (axes[1], "percentile")):
            rows = [r for r in found["spikes"] if (r["C"], r["T"], r["rule"]) == (C, T, rule)]
            panel.plot([r["size"] for r in rows], [r["power"] for r in rows], style, ms=3, label=f"C {C}, T {T}")
        rows = [r for r in found["sinks"] if (r["C"], r["T"]) == (C, T)]
        axes[2].plot([r["measured"] for r in rows], [r["power"] for r in rows], style, ms=3, label=f"C {C}, T {T}")
    axes[0].set(xscale="log", xlabel="planted |h| / median", ylabel="power", title="Spike, ratio rule (30x)")
    axes[1].set(xscale="log", xlabel="planted |h| / median", title="Spike, percentile rule (99.9th, half the layers)")
    axes[2].set(xlabel="planted alpha, as explicit maps have it on average", title="Sink, alpha > 0.3 in a head")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def markdown(plan: Plan, found: dict[str, Any]) -> str:
    """results/power.md."""
    of_spikes, of_sinks, of_verdicts = [], [], []
    for C, T in plan.shapes:
        for rule in SPIKE_RULES:
            rows = [r for r in found["spikes"] if (r["C"], r["T"], r["rule"]) == (C, T, rule)]
            alarms = [f"{r['false_alarms']:.2%}" for r in rows if r["size"] in (5, 100)]
            of_spikes.append([str(C), str(T), rule, *(f"{r['power']:.0%}" for r in rows), *alarms])
        rows = [r for r in found["sinks"] if (r["C"], r["T"]) == (C, T)]
        most = max(r["false_alarms"] for r in rows)
        of_sinks.append([str(C), str(T), *(f"{r['power']:.0%}" for r in rows), f"at most {most:.2%}"])
    for n in plan.samples:
        rows = [r for r in found["verdicts"] if r["n_seq"] == n]
        cells = [f"{r['present']:.0%} / {r['absent']:.0%} / {r['underpowered']:.0%}" for r in rows]
        of_verdicts.append([str(n), *cells])
    sizes = [*(f"{size}x" for size in plan.sizes), "false alarms at 5x", "at 100x"]
    lines = [
        "# What is found, and what is made up: planted ground truth",
        "",
        f"`python -m benchmarks.power`, commit {found['commit']}, 2 CPU cores, torch {torch.__version__}. Each number",
        f"is from {plan.seeds} seeds x {N} sequences with one planted token each; the seeds' extremes: power.json.",
        "",
        "![power](power.png)",
        "",
        "The massive rule asks for |h| > 100 as well: where the stream's median is 0.06 or less (C 64 and 256) even",
        "1,200x is not enough: it cannot see a small model's spikes. The percentile rule marks 3 to 7% of all tokens",
        "in any case.",
        "",
        "## Spikes: power by planted size (x the median), and false alarms (share of other tokens)",
        "",
        *markdown_table(["C", "T", "rule", *sizes], of_spikes),
        "",
        "## Sinks: power by planted alpha (mean over sequences), and false alarms (share of other tokens, any head)",
        "",
        *markdown_table(["C", "T", *(f"{alpha:g}" for alpha in plan.alphas), "false alarms"], of_sinks),
        "",
        f"## The verdict on spikes of 100x, by how many sequences have one ({plan.draws} draws each)",
        "",
        "present / absent / underpowered, as if the model had 125M parameters.",
        "",
        *markdown_table(["sequences", *(f"{p:.0%}" for p in plan.prevalences)], of_verdicts),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="a few sizes, one seed")
    flags.add_argument("--out", type=Path, default=ROOT / "results", metavar="DIR", help="default: results/")
    args = flags.parse_args()
    plan = QUICK if args.quick else Plan()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    spikes, sinks = [], []
    for C, T in tqdm(plan.shapes, disable=None):
        spikes += spike_curve(plan, C, T)
        sinks += sink_curve(plan, C, T)
    found = {
        "commit": commit.stdout.strip() or "unknown",
        "spikes": spikes,
        "sinks": sinks,
        "verdicts": verdict_table(plan),
    }
    schema.save(args.out / "power.json", found)
    save_text(args.out / "power.md", markdown(plan, found))
    draw(plan, found, args.out / "power.png")
    print(markdown(plan, found))


if __name__ == "__main__":
    cli(main)
