"""Compares ablate's verdicts on causes with models whose wiring we set by hand, so that the truth is known.

  python -m benchmarks.causes               writes results/causes.json and causes.md; some minutes on 2 CPU cores
  python -m benchmarks.causes --n 20 --out DIR       tries fewer models

The models are pre-norm and have three layers. Each sequence has a token A and, later, a token B. Layer 0 may have a
sink on A, whose value all later tokens read. The FFN of layer 1 may write a spike on A or B, and layer 2 may have sinks
there. WIRINGS sets what depends on what. Sizes, widths and positions are random, and half of the models have a channel
that is large in every token. The truth comes from a second model, which has the spikes (or sinks) removed from its
weights. Sinks need spikes ("yes") if they lose at least half of their alpha in it, do not ("no") if they lose less than
a tenth, and else "partly"; the same holds for spikes and their |h|. For spike_scale the wiring gives the truth: the
next layer reads a direction, which scaling does not change, unless a later sub-layer adds something of a fixed size.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.report import Part, document
from model import GPT, GPTConfig
from spikesink import schema
from spikesink.edit import causes, outcomes
from spikesink.edit.clean_pass import CleanPass, Reference
from spikesink.edit.interventions import INTERVENTIONS
from spikesink.errors import Flags, cli
from spikesink.files import save_text
from spikesink.models.subject import Subject
from spikesink.show.text import Table
from train import ROOT, provenance

T, VOCAB, HEADS = 32, 64, 4
# channels: the marks of A and B, what A's value brings, the spike, the large channel, what layer 1 adds
MARK_A, MARK_B, FROM_A, SPIKE, OUTLIER, ADDED = SPECIAL = range(6)
TOKEN_A, TOKEN_B = 62, 63
MARK = 8.0
TABLE = {name: INTERVENTIONS[name] for name in causes.CAUSES}


class Wiring(NamedTuple):
    """What depends on what in a model."""

    sink_on_a: bool  # layer 0 has sinks on A
    # what makes the spike: "A", the mark of A; "B", the mark of B; "both", the mark of B where A's value has arrived;
    # "again", as "B", and layers 0 and 2 write it too
    spike: str
    late: int | None  # heads of layer 2 whose sinks read the spike; the other heads read the mark; None: no sinks there
    first: bool = False  # A is the first token
    size: bool = False  # at the spike, layer 1 adds several times a usual state, which would drown a smaller spike


WIRINGS: dict[str, Callable[[torch.Generator], Wiring]] = {
    "sinks need spikes": lambda g: Wiring(False, "B", HEADS),
    "spikes need sinks": lambda g: Wiring(True, "both", None),
    "each needs the other": lambda g: Wiring(True, "both", HEADS),
    "neither": lambda g: Wiring(True, "B", 0),
    "sinks need spikes in part": lambda g: Wiring(True, "B", int(torch.randint(1, HEADS, (), generator=g))),
    "upstream only": lambda g: Wiring(True, "A", None),
    "removal fails": lambda g: Wiring(False, "again", HEADS),
    "the first token's sinks need its spike": lambda g: Wiring(False, "A", HEADS, first=True),
    "the first token's sinks do not": lambda g: Wiring(False, "A", 0, first=True),
    "sinks need the spike's size": lambda g: Wiring(False, "B", HEADS, size=True),
}


def planted(wiring: Wiring, C: int, size: float, logit: float, outlier: float, seed: int) -> GPT:
    """A model with this wiring, a spike of about `size`, and sinks with logits of about `logit`."""
    torch.manual_seed(seed)
    shape: Any = {"n_layer": 3, "n_head": HEADS, "n_embd": C, "block_size": T, "vocab_size": VOCAB}
    parts: Any = {"norm": "rmsnorm", "position": "none", "activation": "relu"}
    model = GPT(GPTConfig(**shape, **parts, bias=True, init_scale="one")).eval()
    stream: Any = model.transformer
    embedding, D = stream.wte.weight, C // HEADS
    with torch.no_grad():
        embedding.normal_()
        embedding[:, SPECIAL] = 0
        embedding[TOKEN_A, MARK_A] = embedding[TOKEN_B, MARK_B] = MARK
        for block in stream.h:
            block.attn.f.c_proj.weight[SPECIAL] = block.mlp.f.c_proj.weight[SPECIAL] = 0
            block.attn.f.c_attn.weight[:, SPECIAL] = block.mlp.f.c_fc.weight[:, SPECIAL] = 0
            block.attn.f.c_attn.weight[:C:D] = 0  # a constant query, which reads the first entry of a key
            block.attn.f.c_attn.bias[:C:D] = 1
        marked = MARK / (1 + MARK**2 / C) ** 0.5  # a mark behind the first norm, in a state of rms 1 but for the mark
        if wiring.sink_on_a:
            first = stream.h[0].attn.f
            _sink(first, range(HEADS), MARK_A, logit / marked)
            first.c_attn.weight[2 * C :: D, MARK_A] = 1 / marked
            first.c_proj.weight[FROM_A, ::D] = MARK / HEADS
        stream.h[0].mlp.f.c_proj.bias[OUTLIER] = outlier
        behind = MARK / (1 + (MARK**2 + outlier**2) / C) ** 0.5  # a mark behind later norms, with the large channel
        for layer in (0, 1, 2) if wiring.spike == "again" else (0 if wiring.size else 1,):
            _spike(stream.h[layer].mlp.f, wiring.spike, size, marked if layer == 0 else behind)
        mark, rms = MARK_A if wiring.spike == "A" else MARK_B, (1 + (MARK**2 + size**2 + outlier**2) / C) ** 0.5
        if wiring.size:
            f, added = stream.h[1].mlp.f, 6 * C**0.5  # six times a usual state's norm, where the spike is
            f.c_fc.weight[0] = 0
            f.c_fc.weight[0, SPIKE], f.c_fc.bias[0] = rms / size, -0.3
            f.c_proj.weight[ADDED, 0] = added / 0.7
        if wiring.late is not None:
            _sink(stream.h[2].attn.f, range(wiring.late), SPIKE, logit * rms / size)
            _sink(stream.h[2].attn.f, range(wiring.late, HEADS), mark, logit * rms / MARK)
    return model


def _sink(f: Any, heads: Iterable[int], channel: int, logit: float) -> None:
    """Makes keys sinks in some heads: their logit is `logit` times a channel's value behind the norm."""
    C = f.c_proj.weight.size(0)
    for head in heads:
        row = C + head * (C // HEADS)
        f.c_attn.weight[row] = 0
        f.c_attn.weight[row, channel] = logit * (C // HEADS) ** 0.5  # logits are divided by it


def _spike(f: Any, spike: str, size: float, marked: float) -> None:
    """Makes an FFN write a spike of about `size` on marked tokens. `marked` is a mark's value behind the norm."""
    f.c_fc.weight[0] = 0
    f.c_fc.weight[0, MARK_A if spike == "A" else MARK_B] = 1 / marked
    f.c_fc.bias[0] = -0.3
    if spike == "both":  # neither mark alone reaches 1.2
        f.c_fc.weight[0, FROM_A], f.c_fc.bias[0] = 1 / marked, -1.2
    f.c_proj.weight[SPIKE, 0] = size / (0.4 if spike == "both" else 0.7)


def without(model: GPT, target: str) -> GPT:
    """A copy of the model whose weights make no "spikes" or no "sinks", as `target` says."""
    other = GPT(model.config).eval()
    other.load_state_dict(model.state_dict())
    stream: Any = other.transformer
    C = model.config.n_embd
    with torch.no_grad():
        for block in stream.h:
            if target == "spikes":
                block.mlp.f.c_proj.weight[SPIKE] = 0
            else:
                block.attn.f.c_attn.weight[C : 2 * C : C // HEADS] = 0
    return other


def sequences(n: int, seed: int, first: bool) -> torch.Tensor:
    """Random ids (n, T), with one A among the first five tokens (or first), and one B among the next eight."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TOKEN_A, (n, T), generator=generator)
    ids[torch.arange(n), torch.randint(0, 1 if first else 5, (n,), generator=generator)] = TOKEN_A
    ids[torch.arange(n), torch.randint(5, 13, (n,), generator=generator)] = TOKEN_B
    return ids


def subject_of(model: GPT, wiring: Wiring) -> Subject:
    """A Subject of the model. For spike "again" only the tap after layer 0's FFN is writable, so that removal fails."""
    subject = Subject.from_gpt(model, str)
    if wiring.spike != "again":
        return subject
    taps = [dataclasses.replace(tap, writable=tap.name == "ffn 0") for tap in subject.streams]
    return dataclasses.replace(subject, streams=taps)


def truth(model: GPT, wiring: Wiring, name: str, ids: torch.Tensor) -> str:
    """The true answer to an intervention's question: from the wiring if it has none, else from the second model."""
    asked = causes.ASKED[TABLE[name].kind]
    clean = CleanPass.run(subject_of(model, wiring), ids)
    if wiring.spike == "again" and name == "spike_zero":
        return "not removed"
    if name == "bos_ffn" and not wiring.first:
        return "nothing there"
    if asked == "spikes" and not wiring.sink_on_a and wiring.late is None:
        return "nothing there"
    reachable = wiring.late is not None if asked == "sinks" else wiring.sink_on_a and wiring.spike in ("B", "both")
    if not reachable:
        return "out of reach"
    if name == "spike_scale":
        return "yes" if wiring.size else "no"
    judged = causes.Judged(clean, INTERVENTIONS["spike_zero" if asked == "sinks" else name].edit(clean, None), asked)
    other = CleanPass.run(Subject.from_gpt(without(model, "spikes" if asked == "sinks" else "sinks"), str), ids)
    at, full, reduced = (
        (judged.sinks, clean.alpha, other.alpha)
        if asked == "sinks"
        else (judged.spikes, [tap.entry for tap in clean.tap_states], [x[..., SPIKE].abs() for x in other.streams])
    )
    shares = [(y / x)[mask] for mask, x, y in zip(at, full, reduced, strict=True)]
    lost = 1 - float(torch.cat(shares).clamp_max(causes.MOST).mean())
    return "yes" if lost >= causes.NEEDED else "no" if lost < causes.MARGIN else "partly"


def try_model(i: int) -> list[dict[str, Any]]:
    """Draws model `i`, and returns its verdicts: a row for each intervention."""
    generator = torch.Generator().manual_seed(i)
    draw = lambda low, high: low + (high - low) * float(torch.rand((), generator=generator))
    name = [*WIRINGS][i % len(WIRINGS)]
    wiring = WIRINGS[name](generator)
    C = (48, 64, 96)[int(torch.randint(3, (), generator=generator))]
    n, size, logit, outlier = int(draw(12, 33)), draw(100, 400), draw(4, 8), draw(0, 60) * (i // len(WIRINGS) % 2)
    model, ids = planted(wiring, C, size, logit, outlier, i), sequences(2 * n, i, wiring.first)
    subject = subject_of(model, wiring)
    reference = Reference(subject, ids[n:])
    measured = outcomes.measure_outcomes(subject, ids[:n], outcomes.conditions_of(TABLE, reference), 8, "causes")
    drawn = {"seed": i, "width": C, "spike": size, "logit": logit, "outlier": outlier, "late": wiring.late}
    start = {"wiring": name, "model": {**drawn, "sequences": n}}
    judged = [(truth(model, wiring, cause.by, ids[:n]), cause) for cause in outcomes.causes_of(TABLE, measured)]
    return [{**start, "truth": true, **schema.to_json(cause)} for true, cause in judged]


def table(rows: list[dict[str, Any]]) -> Table:
    """Counts rows by truth and verdict."""
    verdicts = ["yes", "partly", "no", "cannot tell", "not removed", "out of reach"]
    counts = Counter((row["truth"], row["verdict"]) for row in rows)
    header = ["truth", *(f"said: {verdict}" for verdict in verdicts)]
    truths = [verdict for verdict in verdicts if verdict != "cannot tell"]
    return Table(header, [[true, *(str(counts[true, v] or "–") for v in verdicts)] for true in truths])


def wrong(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose verdict is an answer, but not the true one."""
    return [row for row in rows if row["verdict"] in ("yes", "partly", "no") and row["verdict"] != row["truth"]]


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--n", type=int, default=240, metavar="N", help="number of models (default: 240)")
    flags.add_argument("--out", type=Path, default=ROOT / "results", metavar="DIR", help="default: results/")
    options = flags.parse_args()
    rows = [row for i in tqdm(range(options.n), desc="causes", disable=None) for row in try_model(i)]
    answers = [row for row in rows if row["verdict"] in ("yes", "partly", "no")]
    sections: list[Part] = []
    for name in TABLE:
        sections += [f"## {name}", table([row for row in rows if row["by"] == name])]
    text = document(
        "# Are the verdicts on causes right?",
        f"`python -m benchmarks.causes` made {options.n} models with planted wiring and {len(rows)} verdicts on them. "
        f"{len(answers)} verdicts are answers (yes, partly, no), and {len(wrong(rows))} of these are wrong "
        f"({len(wrong(rows)) / max(1, len(answers)):.1%}). Commit {provenance()['git_commit'][:12]}.",
        " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
        *sections,
    )
    schema.save(options.out / "causes.json", {**provenance(), "rows": rows})
    save_text(options.out / "causes.md", text)
    print(text)


if __name__ == "__main__":
    cli(main)
