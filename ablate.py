"""What changes when it cannot?    python ablate.py CHECKPOINT [--flag ...]

  python ablate.py out/quickstart                        all interventions
  python ablate.py out/quickstart --only spike_zero      one, with its controls
  python ablate.py gpt2 --only sink_mask --no-probes     of the Hugging Face hub

Spikes and sinks removed in ten ways, each beside matched controls: what they
do to the loss, where, whether one needs the other, what int8 costs; with
data/blimp and data/ud_ewt prepared, also what they do to grammar and to what
can be read off the states. Writes ablate.json, detect.json (what there is on
the same text) and report.html, a page with both, beside the checkpoint.
"""

from pathlib import Path

from detect import detect, flags, folder_of, open_checkpoint, output_paths
from spikesink import files
from spikesink.edit import interventions, outcomes, probes, quantise
from spikesink.errors import UserError, cli
from spikesink.show import ablation_figures, figures, report

ROOT = Path(__file__).resolve().parent
SCHEMA = "spikesink-ablation-1"
NOTE = (
    "What is edited is fixed by the clean model on the same text: spikes are the entries that the ratio rule marks, at "
    "every tap of the residual stream where an edit reaches all that follows; sinks are keys with alpha > 0.3 and at "
    "least T/4 queries, head by head. edited: entries, tokens, keys, heads or sub-layers, over all sequences. Means, "
    "directions and the step-up come from other text. spikes left, sinks left: how many of the very same are still "
    "there, in the sequences that had what was edited. Intervals: 95%, paired bootstrap over sequences. "
    + quantise.NOTE
)


def ablate(opened, args):
    """Ablation findings of an opened checkpoint; of an encoder-decoder, the decoder's, with the other `parts`."""
    first, *others = (ablate_part(subject, opened, args) for subject in opened.subjects)
    return {**first, "parts": {found["part"]: found for found in others}} if others else first


def ablate_part(subject, opened, args):
    """Ablation findings of one Subject; `opened` needs other text to take means from."""
    reference = interventions.Reference(subject, opened.other_ids, args.batch_size)
    table, removals = chosen(subject, opened, args.only)
    conditions = outcomes.conditions_of(table | removals, reference)
    desc = f"ablate {subject.part}".strip()
    measured = outcomes.measure(subject, opened.ids, conditions, args.batch_size, desc)
    entries = outcomes.entries(table, measured)
    return {
        "schema": SCHEMA,
        **opened.about,
        "part": subject.part,
        "calibration": {"n_seq": len(opened.other_ids)},
        "note": NOTE,
        "taps": [{"layer": tap.layer, "kind": tap.kind} for tap in subject.streams],
        "baseline": outcomes.baseline(measured),
        "interventions": entries,
        "removals": outcomes.entries(removals, measured),
        "two_by_two": outcomes.two_by_two(entries),
        "attention": outcomes.attention(measured),
        "int8": int8(subject, opened, args),
        "probes": probe(subject, opened, entries, conditions) if args.probes and subject.part != "cross" else {},
    }


def chosen(subject, opened, only):
    """The interventions that are wanted, and those on whole tokens, heads and sub-layers."""
    table, removals = interventions.INTERVENTIONS, interventions.REMOVALS
    starts = subject.start is not None or opened.about["data"]["bos"]
    if not starts:  # there is no BOS to remove
        table = {**table, "bos_remove": table["bos_remove"]._replace(edit=interventions.nothing)}
    keep = lambda table: {name: one for name, one in table.items() if not only or name in only}
    return keep(table), keep(removals)


def int8(subject, opened, args):
    """What 8 bits cost, by granularity; the `reason` where that cannot be tried."""
    try:
        return quantise.quantised_losses(subject, opened.ids, opened.other_ids, args.batch_size)
    except UserError as error:
        return {"reason": str(error)}


def left_to_probe(entries):
    """The conditions that changed something, each intervention with its first control; the clean model before all."""
    changed = (e for e in entries if e["edited"])
    return ["none", *(name for e in changed for name in (e["name"], f"{e['name']}/{e['control'][0]['name']}"))]


def blimp(subject, reader, conditions):
    """BLiMP under every condition. Raises UserError."""
    pairs = probes.minimal_pairs(prepared("blimp", "blimp.jsonl"), PAIRS)
    return probes.blimp(subject, reader, pairs, outcomes.on_texts(subject, conditions, shared=True))


def ud_ewt(subject, reader, conditions):
    """Linear probes on UD English EWT under every condition. Raises UserError."""
    train, test = (probes.sentences(prepared("ud_ewt", f"{s}.conllu"), n) for s, n in SENTENCES.items())
    return probes.linear(subject, reader, train, test, outcomes.on_texts(subject, conditions, shared=False))


# sizes at which an interval is some +- 3% wide, and all of it takes a minute for the quickstart's model
PAIRS, SENTENCES = 12, {"train": 600, "test": 300}  # pairs of each paradigm; sentences
PROBES = {"blimp": blimp, "linear": ud_ewt}


def prepared(dataset, file):
    """The path of a prepared file. Raises UserError naming what prepares it."""
    path = ROOT / "data" / dataset / file
    if not path.is_file():
        raise UserError(f"{dataset} is not prepared: python data/{dataset}/prepare.py")
    return path


def probe(subject, opened, entries, conditions):
    """What grammar and the states say under every condition; for a probe that cannot be run, the `reason`."""
    conditions = {"none": interventions.nothing} | conditions
    conditions = {name: conditions[name] for name in left_to_probe(entries)}
    found = {}
    for name, run_probe in PROBES.items():
        try:
            found[name] = run_probe(subject, opened.reader, conditions)
        except UserError as error:
            found[name] = {"reason": str(error)}
    return found


def main():
    parser = flags(__doc__)
    names = [*interventions.INTERVENTIONS, *interventions.REMOVALS]
    part = parser.add_argument_group("some of it")
    part.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    part.add_argument("--no-probes", dest="probes", action="store_false", help="leave BLiMP and the linear probes out")
    args = parser.parse_args()
    if not args.checkpoint:
        raise UserError("which checkpoint? Give ckpt.pt, or a Hugging Face folder or hub name")
    opened = open_checkpoint(args, calibration=True)
    path = opened.about["checkpoint"]["path"]
    json_path, html_path = output_paths(path, args, "ablate.json", "report.html")
    found = detect(opened, args)
    ablation = ablate(opened, args)
    files.save_json(folder_of(path) / "detect.json", found)
    files.save_json(json_path, ablation)
    report.page(html_path, found, ablation)
    print(f"measured on {report.conditions(found)}\n\n{report.ablation_terminal(ablation)}")
    if args.figures:
        tables = (figures.DETECTION, found), (ablation_figures.ABLATION, ablation)
        print(f"\n{report.figure_files(args.figures, *tables)}")
    print(f"\nfindings: {json_path}\npage:     {html_path}")


if __name__ == "__main__":
    cli(main)
