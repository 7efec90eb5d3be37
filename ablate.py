"""What changes when it cannot? The loss with spikes and sinks removed, each beside a random control.

  python ablate.py out/quickstart/ckpt.pt

Takes detect.py's flags; of an encoder-decoder, edits the decoder's stream and self-attention. Writes ablate.json,
detect.json (what there is on the same text) and one page with both.
"""

import contextlib
from functools import partial

import torch
from tqdm import tqdm

from detect import detect, flags, folder_of, open_checkpoint, output_paths
from spikesink import findings, intervene, metrics, report
from spikesink.errors import UserError, run
from spikesink.subject import batches

SCHEMA = "spikesink-ablation-1"
NOTE = (
    "Spike interventions edit every entry that the ratio rule marks in the clean model, at every tap of the residual "
    "stream where an edit reaches all that follows (each sub-layer; each block of a pre-norm Hugging Face model; of an "
    "encoder-decoder, the decoder's); their control edits as many random other channels "
    "of the same tokens. sink_mask masks, in each head, the keys that are sinks there in the clean model (a softmax "
    "renormalises the rest); its control masks as many random other keys. edited: entries or keys. Means come from "
    "other text. Intervals: 95%, paired bootstrap over sequences."
)


def measure(subject, ids, batch_size, intervention, desc):
    """Loss per sequence (N,) in nats, and how many entries were edited.

    `intervention(batch ids, seed)` is a context manager that yields {"edited": n}.
    """
    losses, edited = torch.empty(len(ids), dtype=torch.float64), 0
    for seed, (rows, batch) in enumerate(tqdm([*batches(ids, batch_size)], desc=desc, disable=None, leave=False)):
        with intervention(batch, seed=seed) as count:
            losses[rows] = subject.losses(batch).double().mean(1)
        edited += count["edited"]
    return losses, edited


@contextlib.contextmanager
def nothing(ids, seed):
    """The intervention that changes nothing."""
    yield {"edited": 0}


def effect(name, baseline, losses, edited):
    """One entry of the findings: the loss under an intervention against the clean loss, paired by sequence."""
    delta = losses - baseline
    return {
        "name": name,
        "edited": edited,
        "loss": losses.mean().item(),
        "ppl": losses.mean().exp().item(),
        "delta_loss": delta.mean().item(),
        "ci95": metrics.bootstrap_ci(lambda i: delta[i].mean().item(), len(delta)),
    }


def table_of(subject, means):
    """{name: (kind, name of its control, intervention(batch ids, control=, seed=))}."""
    spikes = partial(intervene.spikes, subject, means=means)
    table = {
        f"spike_{edit}": ("spike", "random_channels", partial(spikes, edit=edit)) for edit in intervene.SPIKE_EDITS
    }
    table["sink_mask"] = ("sink", "random_keys", partial(intervene.sinks, subject))
    return table


def ablate(opened, batch_size):
    """Ablation findings of an opened checkpoint; `opened` needs other text to calibrate on."""
    subject, ids = opened.subjects[0], opened.ids
    baseline, _ = measure(subject, ids, batch_size, nothing, "baseline")
    means = intervene.ChannelMeans(subject, opened.other_ids, batch_size)
    rows = []
    for name, (kind, control, intervention) in table_of(subject, means).items():
        real = measure(subject, ids, batch_size, partial(intervention, control=False), name)
        random = measure(subject, ids, batch_size, partial(intervention, control=True), control)
        entry = effect(name, baseline, *real)
        rows.append({**entry, "kind": kind, "control": [effect(control, baseline, *random)]})
    return {
        "schema": SCHEMA,
        **opened.about,
        "calibration": {"n_seq": len(opened.other_ids)},
        "note": NOTE,
        "baseline": {"loss": baseline.mean().item(), "ppl": baseline.mean().exp().item()},
        "interventions": rows,
    }


def main():
    args = flags(__doc__).parse_args()
    if not args.checkpoint:
        raise UserError("which checkpoint? Give ckpt.pt, or a Hugging Face folder or hub name")
    opened = open_checkpoint(args, calibration=True)
    path = opened.about["checkpoint"]["path"]
    json_path, html_path = output_paths(path, args, "ablate.json", "report.html")
    found = detect(opened, args)
    ablation = ablate(opened, args.batch_size)
    findings.save(folder_of(path) / "detect.json", found)
    findings.save(json_path, ablation)
    report.page(html_path, found, ablation)
    print(f"measured on {report.conditions(found)}\n")
    print(report.grid(*report.ablation_rows(ablation)))
    print(f"\n{NOTE}\n\nfindings: {json_path}\npage:     {html_path}")


if __name__ == "__main__":
    run(main)
