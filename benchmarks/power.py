"""Measures how large a spike and how strong a sink must be to be found: power and false alarms on planted truth.

  python -m benchmarks.power            writes results/power.json, power.md and power.png; some minutes on 2 CPU cores
  python -m benchmarks.power --quick --out DIR       tries a few sizes with one seed

Spikes are planted in random streams (normal, with outlier channels, with heavy tails), on the sum and behind a norm.
Sinks are planted in models of model.py with random weights. Their queries and keys are scaled so that logits vary as in
trained models (standard deviation 1), and each sequence has one planted token among the keys that T/4 queries see.
Power is the share of planted tokens that the rule marks; false alarms are the share of other tokens that it marks.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.report import Part, document
from model import GPT, GPTConfig
from spikesink import schema
from spikesink.errors import Flags, cli
from spikesink.files import save_text
from spikesink.measure import calibrate, planted
from spikesink.measure.findings import Nulls
from spikesink.measure.observe import Ordinary, observe
from spikesink.measure.spikes import PRIMARY, PRIMARY_SPIKE_RULE, SPIKE_RATIO, Usual, spike_entries
from spikesink.models.subject import Subject, sub_layers_of
from train import ROOT, provenance

N, H = 100, 4  # sequences, heads
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The values that are tried."""

    sizes: tuple[int, ...] = (5, 10, 15, 20, 25, 28, 30, 32, 35, 40, 60, 100)  # of spikes, over the usual |h|
    widths: tuple[int, ...] = (64, 256, 1024, 4096)
    gains: tuple[float, ...] = (0.1, 1.0, 3.0, 10.0)  # a norm's gain in the spike's channel, over that of the others
    alphas: tuple[float, ...] = (0.1, 0.15, 0.2, 0.25, 0.28, 0.3, 0.32, 0.35, 0.4, 0.5, 0.7, 0.9)  # of sinks
    shapes: tuple[tuple[int, int], ...] = ((64, 64), (256, 64), (768, 64), (256, 256))  # width C, length T
    prevalences: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.9)  # shares of sequences that have a spike
    samples: tuple[int, ...] = (8, 16, 60, 100)
    seeds: int = 3
    draws: int = 20


QUICK = Plan((5, 100), (64, 256), (1.0,), (0.3, 0.9), ((64, 64),), (0.9,), (8, 16), seeds=1, draws=2)


def subject_of(C: int, T: int, seed: int) -> Subject:
    """A random pre-norm model of two layers, whose attention logits have a standard deviation of about 1."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(n_layer=2, n_head=H, n_embd=C, block_size=T, vocab_size=256))
    with torch.no_grad():
        for _, kind, sub_layer in sub_layers_of(model):
            if kind == "attn":  # then q and k of normalised input have entries of variance 1
                sub_layer.f.c_attn.weight[: 2 * C].mul_(1 / (0.02 * C**0.5))
    return Subject.from_gpt(model, str)


def one_each(T: int, choices: int, draw: torch.Generator, prevalence: float = 1.0) -> torch.Tensor:
    """Marks one of the first `choices` tokens in a share `prevalence` of the sequences. Returns bool (N, T)."""
    tokens = torch.zeros(N, T, dtype=torch.bool)
    tokens[torch.arange(N), torch.randint(choices, (N,), generator=draw)] = True
    return tokens & (torch.rand(N, 1, generator=draw) < prevalence)


def share(hits: torch.Tensor) -> float:
    """The share of True."""
    return hits.double().mean().item()


def average(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def outlier_channels(tokens: int, C: int) -> torch.Tensor:
    """Normal states, with one channel in a hundred (at least three) 10 to 100 times as large in every token."""
    x, n = torch.randn(tokens, C), max(3, C // 100)
    x[:, :n] *= 10 ** torch.linspace(1, 2, n)
    return x


STREAMS: dict[str, Callable[[int, int], torch.Tensor]] = {  # name -> function for states (tokens, C)
    "normal": torch.randn,
    "outlier channels": outlier_channels,
    # with three degrees of freedom every token of a wide layer has some extreme entry
    "heavy tails": lambda tokens, C: torch.distributions.StudentT(torch.tensor(3.0)).sample((tokens, C)),
    "log-normal": lambda tokens, C: torch.randn(tokens, C).exp() * torch.randn(tokens, C).sign(),
}
TOKENS = 2048  # half of them define what is usual, the others are judged


def split(x: torch.Tensor) -> tuple[Usual, torch.Tensor]:
    """(what is usual in the first half of the tokens x (K, C), the other half)."""
    first, second = x.chunk(2)
    return Usual.from_states(first), second


def alarm_table(plan: Plan) -> list[Row]:
    """The share of tokens marked where nothing was planted, by the rule and by the layer's median alone."""
    rows = []
    for name, make in STREAMS.items():
        for C in plan.widths:
            marked, alone = [], []
            for seed in range(plan.seeds):
                torch.manual_seed(seed)
                usual, x = split(make(TOKENS, C))
                marked.append(share(spike_entries(x[None], usual).any(-1)))
                alone.append(share((x.abs() >= SPIKE_RATIO * usual.layer).any(-1)))
            rows.append({"stream": name, "C": C, "marked": max(marked), "by the median alone": max(alone)})
    for C, T in plan.shapes:
        observed = []
        for seed in range(plan.seeds):
            subject = subject_of(C, T, seed)  # sets the seed of the ids, too
            observed.append(observe(subject, torch.randint(256, (N, T)), N, progress=False))
        name = f"untrained model, T {T}"
        marked = [share(obs.spikes[PRIMARY_SPIKE_RULE]) for obs in observed]
        alone = [share(obs.sum.ratio >= SPIKE_RATIO) for obs in observed]
        rows.append({"stream": name, "C": C, "marked": max(marked), "by the median alone": max(alone)})
    return rows


def spike_curve(plan: Plan) -> list[Row]:
    """Power by the size of a planted spike: one entry of each token, in an ordinary channel or in the largest outlier
    channel. The size is over the usual |h| of the layer or of the channel, whichever is larger."""
    rows, planted_in = [], (("normal", 5), ("outlier channels", 2), ("outlier channels", -1))
    for C, (name, channel), size in itertools.product(plan.widths, planted_in, plan.sizes):
        power = []
        for seed in range(plan.seeds):
            torch.manual_seed(seed)
            usual, x = split(STREAMS[name](TOKENS, C))
            x[:, channel] = size * max(usual.layer, usual.channels[channel])
            power.append(share(spike_entries(x[None], usual)[0, :, channel]))
        kind = "an ordinary channel" if channel != 2 else "an outlier channel"
        rows.append({"C": C, "stream": name, "channel": kind, "size": size, "power": average(power)})
    return rows


def norm_table(plan: Plan) -> list[Row]:
    """A spike of 1000 x the median, as it is read behind RMSNorm, by the gain of its channel over the others'. No entry
    can be larger there than gain x sqrt(C)."""
    rows = []
    for C, gain in itertools.product(plan.widths, plan.gains):
        torch.manual_seed(0)
        first, second = torch.randn(TOKENS, C).chunk(2)
        second[:, 5] = 1000 * first.abs().median()
        weight = torch.ones(C)
        weight[5] = gain
        first, second = (torch.nn.functional.rms_norm(x, (C,), weight) for x in (first, second))
        usual = Usual.from_states(first)
        found = share(spike_entries(second[None], usual)[0, :, 5])
        ratio = (second[:, 5] / usual.layer).median().item()
        rows.append({"C": C, "gain": gain, "bound": gain * C**0.5 / 0.6745, "ratio": ratio, "found": found})
    return rows


def sink_curve(plan: Plan, C: int, T: int) -> list[Row]:
    """A row per alpha, averaged over seeds. Hits on other keys, in any head, are false alarms."""
    rows = []
    for alpha in plan.alphas:
        power, alarms, measured = [], [], []
        for seed in range(plan.seeds):
            draw = torch.Generator().manual_seed(seed)
            subject, tokens = subject_of(C, T, seed), one_each(T, T // 2, draw)
            ids = torch.randint(256, (N, T), generator=draw)
            ordinary = Ordinary.from_ids(subject, ids, N)
            keys = tokens.int().argmax(1).tolist()
            bias = [planted.bias_from_alpha(alpha, key, T) + 0.5 for key in keys]  # others: e^(1/2)
            with planted.sinks(subject, tokens, layer=1, head=seed, bias=torch.tensor(bias)):
                obs = observe(subject, ids, batch_size=N, progress=False, ordinary=ordinary)
            hits = obs.sink_heads > 0
            power.append((hits & tokens).sum().item() / int(tokens.sum()))
            alarms.append((hits & ~tokens).sum().item() / int((~tokens).sum()))
            measured.append(obs.max_alpha[tokens].mean().item())
        row = {"C": C, "T": T, "alpha": alpha, "measured": average(measured), "power": average(power)}
        rows.append({**row, "power_range": [min(power), max(power)], "false_alarms": average(alarms)})
    return rows


def verdict_of(n: int, prevalence: float, seed: int) -> str:
    """The verdict on spikes of 100x from n sequences, as if the model had 125M parameters: only the sample is small."""
    draw = torch.Generator().manual_seed(seed)
    subject, tokens = subject_of(64, 64, seed), one_each(64, 64, draw, prevalence)[:n]
    ids = torch.randint(256, (n, 64), generator=draw)
    ordinary = Ordinary.from_ids(subject, ids, n)
    with planted.spikes(subject, tokens, channel=3, size=100):
        obs = observe(subject, ids, batch_size=n, progress=False, ordinary=ordinary)
    null: Nulls = {"init": calibrate.measures_entry(observe(subject, ids[:16], batch_size=16, progress=False))}
    return calibrate.spike_verdict(obs, null, calibrate.weakness(n, 125e6, None, None)).verdict


def verdict_table(plan: Plan) -> list[Row]:
    """How often each spike verdict is given, by the share of sequences with a spike of 100x, and by sample size."""
    rows = []
    for prevalence, n in itertools.product(plan.prevalences, plan.samples):
        verdicts = [verdict_of(n, prevalence, seed) for seed in range(plan.draws)]
        shares = {word: verdicts.count(word) / plan.draws for word in ("present", "absent", "underpowered")}
        rows.append({"prevalence": prevalence, "n_seq": n, **shares})
    return rows


def draw(plan: Plan, results: dict[str, Any], path: Path) -> None:
    """Draws the power curves to a file."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    spike_axes, sink_axes = figure.subplots(1, 2)
    styles = ("-o", "-s", "-^", "--d")
    for C, style in zip(plan.widths, styles, strict=False):
        rows = [r for r in results["spikes"] if (r["C"], r["stream"]) == (C, "normal")]
        spike_axes.plot([r["size"] for r in rows], [r["power"] for r in rows], style, ms=3, label=f"C {C}")
    for (C, T), style in zip(plan.shapes, styles, strict=False):
        rows = [r for r in results["sinks"] if (r["C"], r["T"]) == (C, T)]
        sink_axes.plot([r["measured"] for r in rows], [r["power"] for r in rows], style, ms=3, label=f"C {C}, T {T}")
    spike_axes.set(xscale="log", xlabel="planted |h| / usual |h|", ylabel="power", title="Spike, on the sum")
    sink_axes.set(xlabel="planted alpha, as explicit maps have it on average", title="Sink, alpha > 0.3 in a head")
    for axes in (spike_axes, sink_axes):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def percent(x: float) -> str:
    """A share as text."""
    return f"{x:.2%}" if 0 < x < 0.1 else f"{x:.0%}"


def spike_sections(results: dict[str, Any], sizes: Sequence[int]) -> list[Part]:
    """The sections on spikes."""
    groups = itertools.groupby(results["spikes"], lambda r: (str(r["C"]), r["stream"], r["channel"]))
    spikes = [[*group, *(percent(r["power"]) for r in rows)] for group, rows in groups]
    alarms = [
        [r["stream"], str(r["C"]), percent(r["marked"]), percent(r["by the median alone"])] for r in results["alarms"]
    ]
    norms = [
        [str(r["C"]), f"{r['gain']:g}", f"{r['bound']:.3g}", f"{r['ratio']:.3g}", percent(r["found"])]
        for r in results["norms"]
    ]
    return [
        "## False alarms: tokens that are marked where nothing was planted (the worst of the seeds)",
        "At one tap. An outlier channel is large in every token, and with heavy tails every token of a wide layer has\n"
        "some extreme entry. By the layer's median alone these would be spikes.",
        (["stream", "width", "marked", "by 30 x the median alone"], alarms),
        "## Spikes on the sum: power by size, over the larger of the channel's and the layer's usual |h|",
        (["width", "stream", "planted in", *(f"{size}x" for size in sizes)], spikes),
        "## Behind a norm: a spike of 1,000 x the median, as read behind RMSNorm",
        "No entry can be larger there than its gain x sqrt(width), so the ratio is at most that over 0.6745. A spike\n"
        "that is not found there may still be present in the sum.",
        (["width", "gain of its channel", "largest possible ratio", "ratio", "found"], norms),
    ]


def markdown(plan: Plan, results: dict[str, Any]) -> str:
    """The text of results/power.md."""
    sink_rows, verdict_rows = [], []
    for C, T in plan.shapes:
        rows = [r for r in results["sinks"] if (r["C"], r["T"]) == (C, T)]
        most = max(r["false_alarms"] for r in rows)
        sink_rows.append([str(C), str(T), *(f"{r['power']:.0%}" for r in rows), f"at most {most:.2%}"])
    for n in plan.samples:
        rows = [r for r in results["verdicts"] if r["n_seq"] == n]
        cells = [f"{r['present']:.0%} / {r['absent']:.0%} / {r['underpowered']:.0%}" for r in rows]
        verdict_rows.append([str(n), *cells])
    return document(
        "# Power and false alarms on planted truth",
        f"`python -m benchmarks.power`, commit {results['commit']}, torch {torch.__version__}.\n"
        f"The spike rule: {PRIMARY.text}.\n"
        f"Streams are random tensors of {TOKENS} tokens. Half define the usual, half are judged; {plan.seeds} seeds.\n"
        f"Sinks and verdicts are of random models: {plan.seeds} seeds x {N} sequences, each with a planted token.",
        "![power](power.png)",
        *spike_sections(results, plan.sizes),
        "## Sinks: power by planted alpha (mean over sequences), and false alarms (share of other tokens, any head)",
        (["C", "T", *(f"{alpha:g}" for alpha in plan.alphas), "false alarms"], sink_rows),
        f"## The verdict on spikes of 100x, by how many sequences have one ({plan.draws} draws each)",
        "present / absent / underpowered, as if the model had 125M parameters.",
        (["sequences", *(f"{p:.0%}" for p in plan.prevalences)], verdict_rows),
    )


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="try a few sizes with one seed")
    flags.add_argument("--out", type=Path, default=ROOT / "results", metavar="DIR", help="default: results/")
    args = flags.parse_args()
    plan = QUICK if args.quick else Plan()
    results = {
        "commit": provenance()["git_commit"][:7],
        "alarms": alarm_table(plan),
        "spikes": spike_curve(plan),
        "norms": norm_table(plan),
        "sinks": [row for C, T in tqdm(plan.shapes, disable=None) for row in sink_curve(plan, C, T)],
        "verdicts": verdict_table(plan),
    }
    schema.save(args.out / "power.json", results)
    text = markdown(plan, results)
    save_text(args.out / "power.md", text)
    draw(plan, results, args.out / "power.png")
    print(text)


if __name__ == "__main__":
    cli(main)
