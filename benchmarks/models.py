"""Measures spikes and sinks of public models, and lists what others have published on them.

  python -m benchmarks.models                          models from the Hugging Face hub
  python -m benchmarks.models --folder DIR             models from DIR, by their names; the others from the hub
  python -m benchmarks.models --folder DIR --only smollm2-135m-instruct-q4_1 all-minilm-l6-v2
  python -m benchmarks.models --ablation ablate.json   adds the findings of ablate.py on a model

The command writes results/models.json after every row, and goes on from there when it is run again. The table is
results/models.md; a row that could not be measured says so. The text is Python's own documentation, while published
numbers are of other texts. Each model runs at T = 64 and 1,024 (or its longest), with and without BOS if it has one.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

import spikesink
from benchmarks.report import Part, document
from spikesink import schema
from spikesink.edit.findings import Ablation
from spikesink.errors import Flags, UserError, cli
from spikesink.files import save_text
from spikesink.measure.findings import Findings, Interval, Measures
from spikesink.show.ablation_text import cause_in_words
from spikesink.show.text import Column, number, table, visible, with_interval
from train import ROOT, provenance


@dataclass(frozen=True)
class Model:
    """A public model, and what others found in it."""

    name: str
    hub: str  # its name on the hub
    published: str = "nothing found"
    source: str = ""
    bos: tuple[bool, ...] = (False, True)  # run without BOS, with BOS


BLUORION = "bluorion, refine_massive_activations"
GU = "Gu et al. 2410.10781, quoted"
AUDIT, PYTHIA_AUDIT, BERT = "Rahulrayy's audit", "Pythia audit", "Bondarenko, quoted"
MODELS = (
    Model(
        "gpt2",
        "openai-community/gpt2",
        "channel 447, position 0, blocks 2 to 9: 2480 to 3024; zeroing is free",
        BLUORION,
    ),
    Model("gpt2-xl", "openai-community/gpt2-xl", "Sink_1 77%", GU),
    Model(
        "llama-3.2-1b",
        "meta-llama/Llama-3.2-1B",
        "position 0, blocks 1 to 13: 195 to 217, without BOS 369 to 411",
        BLUORION,
    ),
    Model(
        "llama-2-7b", "meta-llama/Llama-2-7b-hf", "Sink_1 92.5%; zeroing: perplexity 5.13 to 8977", f"{GU}; Sun et al."
    ),
    Model("llama-2-13b", "meta-llama/Llama-2-13b-hf", "Sink_1 91.7%", GU),
    Model("llama-3-8b", "meta-llama/Meta-Llama-3-8B", "Sink_1 99.0%", GU),
    Model("mistral-7b", "mistralai/Mistral-7B-v0.1", "Sink_1 97.5%", GU),
    Model("gemma-3-1b", "google/gemma-3-1b-pt", "BOS 2592 at block 0 rising to 95,232 at block 18", BLUORION),
    Model("gemma-3-270m", "google/gemma-3-270m"),
    Model("gemma-2-2b", "google/gemma-2-2b", "none without BOS, 728 to 2544 with", BLUORION),
    Model("olmo-2-7b", "allenai/OLMo-2-1124-7B", "none by Sun et al.'s rule", BLUORION),
    Model("pythia-70m", "EleutherAI/pythia-70m", "heads with BOS score >= .5: 0%", PYTHIA_AUDIT),
    Model("pythia-160m", "EleutherAI/pythia-160m", "heads with BOS score >= .5: 23%", PYTHIA_AUDIT),
    Model("pythia-410m", "EleutherAI/pythia-410m", "heads with BOS score >= .5: 45%", PYTHIA_AUDIT),
    Model("pythia-2.8b", "EleutherAI/pythia-2.8b", "heads with BOS score >= .5: 66%", PYTHIA_AUDIT),
    Model("opt-125m", "facebook/opt-125m", "inf norm 340, kurtosis 1778", "Bondarenko 2306.12929, quoted"),
    Model("bert-base", "google-bert/bert-base-uncased", "inf norm 735, kurtosis 3076, trained anew", BERT, (True,)),
    Model("roberta-base", "FacebookAI/roberta-base", bos=(True,)),
    Model("gated-1b-baseline", "QwQZh/gated_attention/1B_baseline", "sink mass .439, residual 370x", AUDIT),
    Model("gated-1b-headwise", "QwQZh/gated_attention/1B_gate_headwise", "sink mass .057, residual 4.1x", AUDIT),
    Model("gated-1b-elementwise", "QwQZh/gated_attention/1B_gate_elementwise", "sink mass .019, residual 2.2x", AUDIT),
    Model("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", bos=(False,)),
    Model("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
    Model("smollm2-135m-instruct-q4_1", "smollm2-135m-instruct-q4_1.gguf"),
    Model("all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2", bos=(True,)),
    Model("all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2", bos=(True,)),
)
SHORT, LONG = 64, 1024


@dataclass(frozen=True)
class Row:
    """The measurements of one model under one condition by name, see `row_of`, or the reason why it was not run."""

    model: str
    asked_len: int
    bos: bool
    not_run: str | None = None
    measured: dict[str, Any] = field(default_factory=dict)


def row_of(model: Model, asked_len: int, bos: bool, findings: Findings, commit: str) -> Row:
    """Makes a row from a model's findings."""
    spikes, overlap, verdict = findings.spikes, findings.co_occurrence, findings.verdicts.spike
    top, steps, sink_1 = spikes.tokens[0], findings.anatomy if spikes.sum.tokens else None, findings.sinks.at()
    shares = lambda null: [null.rules["spike"].tokens, null.rules["gu"].tokens]
    measured = {
        "seq_len": findings.data.seq_len,
        "commit": commit,
        "n_seq": findings.data.n_seq,
        "weights": findings.model.get("weights"),
        "loss": findings.data.loss,
        "spike_verdict": verdict.verdict,
        "spike_tokens": spikes.sum.fraction,
        "spike_sequences": verdict.rate,
        "spike_sequences_ci95": verdict.ci95,
        "states": spikes.sum.states,
        "read_tokens": spikes.read.fraction if spikes.read else None,
        "last_tokens": spikes.sum.last,
        "first_tokens": spikes.by_position[0],
        "largest": max(layer.max for layer in findings.attended),
        "ratio": findings.largest_ratio,
        "channel": top.channel,
        "token": visible(top.text),
        "position": top.position,
        "kurtosis": findings.largest_kurtosis,
        "step_up": steps.step_up.name if steps else None,
        "step_down": steps.step_down.name if steps and steps.step_down else None,
        "episodes": [
            f"{e.start.name} to {e.end.name}: {e.tokens:.0%} of them, |h| {e.magnitude:.4g}, channel {e.channel}"
            for e in (steps.episodes if steps else ())
        ],
        "holds": verdict.holds,
        "sink_1": sink_1.first,
        "sink_1_ci95": sink_1.first_ci95,
        "sink_tokens": findings.sinks.primary_rule.fraction,
        "p_sink_given_spike": overlap.p_sink_given_spike,
        "p_sink_given_spike_ci95": overlap.ci95.p_sink_given_spike,
        "nulls": {name: shares(null) for name, null in findings.nulls.items() if isinstance(null, Measures)},
    }
    return Row(model.name, asked_len, bos, measured=measured)


@dataclass(frozen=True)
class Edited:
    """The effects of ablate.py's interventions on one model, and its answers on causes in words. Losses are in nats."""

    model: str
    n_seq: int
    seq_len: int
    bos: bool
    commit: str
    loss: float
    # intervention -> (change of the loss, its interval, {control: change of the loss})
    changes: dict[str, tuple[float, Interval | None, dict[str, float]]]
    causes: list[str]

    @classmethod
    def from_ablation(cls, ablation: Ablation, commit: str) -> "Edited":
        """Reads the findings of ablate.py."""
        changes = {
            entry.name: (entry.delta_loss, entry.ci95, {c.name: c.delta_loss for c in entry.controls_that_edited})
            for entry in ablation.entries
            if entry.edited
        }
        lost = lambda cause: with_interval(cause.lost.share, cause.lost.ci95, "z.0%")
        causes = [f"{cause_in_words(cause)} Lost: {lost(cause)}." for cause in ablation.causes]
        data, name = ablation.data, Path(ablation.checkpoint.path).stem
        return cls(name, data.n_seq, data.seq_len, data.bos, commit, ablation.baseline.loss, changes, causes)

    def parts(self) -> list[Part]:
        """What results/models.md says of the model."""
        header = ["intervention", "change of the loss, nats", "its controls"]
        rows = [
            [name, with_interval(delta, ci, "+.3f"), ", ".join(f"{c} {number(x, '+.3f')}" for c, x in controls.items())]
            for name, (delta, ci, controls) in self.changes.items()
        ]
        start = f"**{self.model}**, {self.n_seq} sequences of {self.seq_len}, {'with' if self.bos else 'no'} BOS, "
        start += f"commit {self.commit}; loss {self.loss:.3f} nats per token."
        return [start, (header, rows), "\n".join(f"- {text}" for text in self.causes)]


# model, perplexity: clean, with massive activations zeroed, and with them set to their mean; source
PUBLISHED_EDITS = (
    ("gpt2", 30.42, 30.57, 30.42, BLUORION),
    ("llama-3.2-1b", 9.08, 6249.0, 9.08, BLUORION),
    ("llama-2-7b", 5.13, 8977.0, 5.13, "Sun et al. 2402.17762, quoted"),
)


def edits_in_words(edited: list[Edited]) -> list[Part]:
    """The section of results/models.md on interventions; empty if there are none."""
    if not edited:
        return []
    published = [
        [name, f"{math.log(zero / ppl):+.3f}", f"{math.log(mean / ppl):+.3f}", source]
        for name, ppl, zero, mean, source in PUBLISHED_EDITS
    ]
    header = ["published", "zeroed, nats", "set to their mean, nats", "source"]
    parts = [part for model in edited for part in model.parts()]
    return ["## What changes without them", *parts, (header, published)]


def conditions() -> list[tuple[Model, int, bool]]:
    """Every row of the table: (model, T, BOS)."""
    return [(model, T, bos) for model in MODELS for T in (SHORT, LONG) for bos in model.bos]


def target_of(model: Model, folder: Path | None) -> str:
    """The model's path in the folder (by its name, or the last part of its hub name), else its name on the hub."""
    for name in (model.name, f"{model.name}.gguf", model.hub.split("/")[-1]):
        if folder and (folder / name).exists():
            return str(folder / name)
    return model.hub


def measure(model: Model, asked_len: int, bos: bool, folder: Path | None, n_long: int, commit: str) -> Row:
    """Measures one row. If the model cannot be opened, the row holds the reason."""
    target = target_of(model, folder)
    options: dict[str, Any] = {"n_seq": 100} if asked_len == SHORT else {"n_seq": n_long, "nulls": min(4, n_long)}
    reason = ""
    for seq_len in (asked_len, 512) if asked_len == LONG else (asked_len,):
        try:
            with spikesink.open(target, seq_len=seq_len, bos=bos, **options) as look:
                return row_of(model, asked_len, bos, spikesink.detect(look), commit)
        except UserError as error:
            reason = reason or str(error).splitlines()[0][:160]
    return Row(model.name, asked_len, bos, not_run=reason)


_of = lambda key: lambda row: row.measured[key]
_with_ci = lambda key, form: lambda row: with_interval(row.measured[key], row.measured[f"{key}_ci95"], form)
COLUMNS = [
    Column("model", lambda row: row.model),
    Column("T", _of("seq_len"), "d"),
    Column("BOS", lambda row: "yes" if row.bos else "no"),
    Column("sequences", _of("n_seq"), "d"),
    Column("spike tokens", _of("spike_tokens"), ".2%"),
    Column("sequences with one", _with_ci("spike_sequences", ".0%")),
    Column("states", _of("states"), "d"),
    Column("as read", _of("read_tokens"), ".2%"),
    Column("last", _of("last_tokens"), ".2%"),
    Column("largest h", _of("largest"), ".4g"),
    Column("top1/median", _of("ratio"), ".0f"),
    Column("kurtosis", _of("kurtosis")),
    Column("Sink_1", _with_ci("sink_1", ".1%")),
    Column("sink tokens", _of("sink_tokens"), ".2%"),
    Column("P(sink given spike)", _with_ci("p_sink_given_spike", ".0%")),
    Column("loss", _of("loss"), ".3f"),
]


def story(r: Row) -> str:
    """A line on where the spikes of a row are."""
    f = SimpleNamespace(**r.measured)
    holds = f"x{min(f.holds):g} to x{max(f.holds):g}" if f.holds else "none"
    return (
        f"- **{r.model}**, T {f.seq_len}, {'with' if r.bos else 'no'} BOS: spike {f.spike_verdict} (at {holds} of "
        f"the rule's thresholds); {number(f.first_tokens, '.0%')} of first tokens are spikes; the strongest is "
        f"{f.token} at position {f.position}, channel {f.channel}; step-up {f.step_up or '–'}, step-down "
        f"{f.step_down or '–'}. Episodes: {'; '.join(f.episodes or ()) or 'none'}."
    )


def markdown(rows: list[Row], edited: list[Edited]) -> str:
    """The text of results/models.md."""
    ran = [row for row in rows if not row.not_run]
    null_rows = [
        [*(column.cell(r) for column in COLUMNS[:3]), name.replace("_", " "), f"{spikes:.2%}", f"{sinks:.2%}"]
        for r in ran
        for name, (spikes, sinks) in r.measured["nulls"].items()
    ]
    here, weights = {row.model for row in ran}, {(row.model, row.measured["weights"]) for row in ran}
    published = [
        [m.name, m.hub, m.published, m.source, "measured" if m.name in here else "**not run**"] for m in MODELS
    ]
    return document(
        "# Public models: spikes and sinks, both sides of every norm",
        f"`python -m benchmarks.models`, commit {', '.join(sorted({r.measured['commit'] for r in ran}))}, torch\n"
        f"{torch.__version__}, float32, on Python's own documentation. Spikes are those of the sum, before any norm "
        "on\nthe stream. *as read*: those behind the norm, as sub-layers read them. *last*: those at the last tap,\n"
        "which no attention reads. *states* is the number of different states of the spikes. Intervals are 95%\n"
        "intervals over sequences.",
        table(COLUMNS, ran),
        "\n".join(f"- {name}: {kind}." for name, kind in sorted(weights) if kind),
        "## Where the spikes are",
        "\n".join(map(story, ran)),
        *edits_in_words(edited),
        "## Nulls: share of tokens",
        (["model", "T", "BOS", "measured on", "spikes", "sinks"], null_rows),
        "## What others have published",
        (["model", "hub", "published", "source", "here"], published),
        f"{len(rows) - len(ran)} of {len(rows)} rows were not run, because a file was missing or the hub not reached.",
    )


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--folder", type=Path, metavar="DIR", help="a folder of models, by the names in this file")
    flags.add_argument("--only", nargs="+", choices=[m.name for m in MODELS], metavar="NAME", help="run these models")
    flags.add_argument("--n_long", type=int, default=24, help="sequences at T = 1,024 (100 at T = 64)")
    flags.add_argument("--again", action="store_true", help="repeat rows that were run")
    flags.add_argument("--out", type=Path, default=ROOT / "results", metavar="DIR", help="default: results/")
    flags.add_argument("--ablation", type=Path, metavar="FILE", help="add a model's findings of ablate.py --json FILE")
    args = flags.parse_args()
    commit = provenance()["git_commit"][:7]
    file = args.out / "models.json"
    content = json.loads(file.read_text()) if file.is_file() else {"rows": [], "edited": []}
    old_rows, edited = schema.from_json(list[Row], content["rows"]), schema.from_json(list[Edited], content["edited"])
    if args.ablation:
        new = Edited.from_ablation(Ablation.load(args.ablation), commit)
        edited = [*(old for old in edited if old.model != new.model), new]
    rows = {(row.model, row.asked_len, row.bos): row for row in old_rows}
    save = lambda: schema.save(file, {"rows": [*rows.values()], "edited": edited})
    for model, T, bos in tqdm(conditions(), desc="models", disable=None):
        row = rows.setdefault((model.name, T, bos), Row(model.name, T, bos, not_run="not asked for"))
        wanted = args.ablation is None and (args.only is None or model.name in args.only)
        if wanted and (args.again or row.not_run):
            rows[model.name, T, bos] = measure(model, T, bos, args.folder, args.n_long, commit)
            save()
    save()
    text = markdown([rows[model.name, T, bos] for model, T, bos in conditions()], edited)
    save_text(args.out / "models.md", text)
    print(text)


if __name__ == "__main__":
    cli(main)
