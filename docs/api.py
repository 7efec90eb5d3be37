"""The Python API in one script, no notebook, no files between the steps: python -m docs.api

Trains a one-layer GPT in memory on the backcopy task, whose head is idle most of the time and grows a sink for it;
observes it, takes the sink out, and writes findings, page and figures to out/api. To open a checkpoint instead of
training, see `opened` at the end.
"""

from pathlib import Path

import torch

import detect
from data.loader import Tokens
from model import GPT, GPTConfig
from spikesink import files
from spikesink.edit import interventions
from spikesink.errors import cli
from spikesink.measure import findings
from spikesink.measure.anatomy import anatomy
from spikesink.measure.calibrate import nulls
from spikesink.measure.examples import Examples
from spikesink.measure.observe import observe
from spikesink.models.subject import Subject
from spikesink.show import figures, report
from spikesink.text.tokenizers import tokenizer_of

OUT = Path("out/api")
STEPS, BATCH, T = 200, 32, 64


def train():
    """(model, its training data): AdamW and nothing else; train.py is this with all that a real run needs."""
    torch.manual_seed(0)
    data = Tokens("backcopy", "train", T, bos=True, seed=0)
    config = GPTConfig(n_layer=1, n_head=1, n_embd=128, block_size=T, vocab_size=data.meta["vocab_size"])
    model = GPT(config)
    optimiser = torch.optim.AdamW(model.optimiser_groups(weight_decay=0.0), lr=2e-3, betas=(0.9, 0.95))
    for step in range(STEPS):
        x, y = data.batch(step, BATCH)  # a function of (seed, step): the same for every model
        loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    print(f"trained for {STEPS} steps: loss {loss.item():.3f}")
    return model, data


def look(subject, ids, vocab_size):
    """Findings, as detect.py makes them: the observation, its nulls, its anatomy, and what it was made on."""
    observation = observe(subject, ids, examples=Examples())
    parameters = subject.model.num_params()
    return findings.detection(
        subject,
        observation,
        checkpoint={"path": "in memory", "sha256": None, "step": STEPS, "tokens": STEPS * BATCH * T},
        model={"parameters": parameters},
        data={
            "name": "backcopy",
            "n_seq": len(ids),
            "seq_len": T,
            "tokens": ids.numel(),
            "bos": True,
            "dtype": "float32",
        },
        null=nulls(subject, ids, vocab_size),
        anatomy=anatomy(subject, ids, observation),
    )


def remove(subject, ids):
    """{what is removed: the change of the loss in nats per token}; interventions combine in any order."""
    clean = interventions.Clean.of(subject, ids)
    mask, control = interventions.sink_mask(clean), interventions.sink_mask(clean, control="random_keys")
    change = lambda: (subject.losses(ids) - clean.losses).mean().item()
    with mask:
        masked = change()
    with control:
        at_random = change()
    with mask, interventions.spike_zero(clean):
        both = change()
    assert torch.equal(subject.losses(ids), clean.losses)  # outside the blocks the model is as it was
    return {"sinks": masked, "as many random keys": at_random, "sinks and spikes": both}


def opened(path, n_seq=20):
    """(subject, ids) of a checkpoint or a Hugging Face model: what detect.py opens."""
    args = detect.flags("").parse_args([str(path), f"--n_seq={n_seq}"])
    found = detect.open_checkpoint(args)
    return found.subjects[0], found.ids


def main():
    """Train, look, remove, write."""
    model, data = train()
    ids = Tokens("backcopy", "val", T, bos=True).read(range(64))[0]
    subject = Subject.of_gpt(model, tokenizer_of(data.meta).decode)
    found = look(subject, ids, data.meta["vocab_size"])
    for name in ("spike", "sink", "co_occurrence"):
        print(f"{name}: {found['verdicts'][name]['verdict']}")
    print(f"Sink_1 at epsilon 0.3: {found['sinks']['gu']['0.3']['first']:.0%} of heads")
    for what, change in remove(subject, ids).items():
        print(f"without {what}: {change:+.4f} nats per token")
    files.save_json(OUT / "detect.json", found)
    report.page(OUT / "detect.html", found)
    print(report.figure_files(OUT, (figures.DETECTION, found)))


if __name__ == "__main__":
    cli(main)
