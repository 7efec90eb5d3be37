"""What changes when it cannot? Spikes and sinks removed in ten ways, each beside matched controls.

  python ablate.py out/quickstart/ckpt.pt
  python ablate.py gpt2 --only spike_zero sink_mask --probes

Takes detect.py's flags. Answers what spikes and sinks do to the loss, where, and whether one needs the other; with
data/blimp and data/ud_ewt prepared, also what they do to grammar and to what can be read off the states; and what int8
does to the model. Writes ablate.json, detect.json (what there is on the same text) and report.html, a page with both.
"""

from detect import detect, flags, folder_of, open_checkpoint, output_paths
from spikesink import findings, intervene, outcomes, report
from spikesink.errors import UserError, run

SCHEMA = "spikesink-ablation-1"
NOTE = (
    "What is edited is fixed by the clean model on the same text: spikes are the entries that the ratio rule marks, at "
    "every tap of the residual stream where an edit reaches all that follows; sinks are keys with alpha > 0.3 and at "
    "least T/4 queries, head by head. edited: entries, tokens, keys, heads or sub-layers, over all sequences. Means, "
    "directions and the step-up come from other text. spikes left, sinks left: how many of the very same are still "
    "there, in the sequences that had what was edited. Intervals: 95%, paired bootstrap over sequences."
)


def ablate(opened, args):
    """Ablation findings of an opened checkpoint; of an encoder-decoder, the decoder's, with the other `parts`."""
    first, *others = (ablate_part(subject, opened, args) for subject in opened.subjects)
    return {**first, "parts": {found["part"]: found for found in others}} if others else first


def ablate_part(subject, opened, args):
    """Ablation findings of one Subject; `opened` needs other text to take means from."""
    reference = intervene.Reference(subject, opened.other_ids, args.batch_size)
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
    }


def chosen(subject, opened, only):
    """The interventions that are wanted, and those on whole tokens, heads and sub-layers."""
    table, removals = intervene.INTERVENTIONS, intervene.REMOVALS
    starts = subject.start is not None or opened.about["data"]["bos"]
    if not starts:  # there is no BOS to remove
        table = {**table, "bos_remove": table["bos_remove"]._replace(edit=intervene.nothing)}
    keep = lambda table: {name: one for name, one in table.items() if not only or name in only}
    return keep(table), keep(removals)


def main():
    parser = flags(__doc__)
    names = [*intervene.INTERVENTIONS, *intervene.REMOVALS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    args = parser.parse_args()
    if not args.checkpoint:
        raise UserError("which checkpoint? Give ckpt.pt, or a Hugging Face folder or hub name")
    opened = open_checkpoint(args, calibration=True)
    path = opened.about["checkpoint"]["path"]
    json_path, html_path = output_paths(path, args, "ablate.json", "report.html")
    found = detect(opened, args)
    ablation = ablate(opened, args)
    findings.save(folder_of(path) / "detect.json", found)
    findings.save(json_path, ablation)
    report.page(html_path, found, ablation)
    print(f"measured on {report.conditions(found)}\n\n{report.ablation_terminal(ablation)}")
    print(f"\nfindings: {json_path}\npage:     {html_path}")


if __name__ == "__main__":
    run(main)
