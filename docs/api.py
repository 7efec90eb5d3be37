"""Shows the Python API in one script: python -m docs.api

It trains a one-layer GPT in memory on the backcopy task. The model's head has nothing to do most of the time, and
therefore grows a sink. The script observes the model, removes the sink, and writes findings, page and figures to
out/api. Instead of a model in memory, `spikesink.open` also takes a checkpoint, a Hugging Face folder or a hub name.
"""

from pathlib import Path

import torch

import spikesink
from data.loader import Tokens
from model import GPT, GPTConfig
from spikesink.errors import cli
from spikesink.text.tokenizers import tokenizer_of

OUT = Path("out/api")
STEPS, BATCH, T = 200, 32, 64


def train() -> tuple[GPT, Tokens]:
    """Trains a model with plain AdamW. Returns it and its training data. train.py has all that a real run needs."""
    torch.manual_seed(0)
    data = Tokens("backcopy", "train", T, bos=True, seed=0)
    config = GPTConfig(n_layer=1, n_head=1, n_embd=128, block_size=T, vocab_size=data.meta["vocab_size"])
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.optimizer_groups(weight_decay=0.0), lr=2e-3, betas=(0.9, 0.95))
    for step in range(STEPS):
        x, y = data.batch(step, BATCH)  # depends on (seed, step) alone, so every model gets the same batches
        loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained for {STEPS} steps: loss {loss.item():.3f}")
    return model, data


def main() -> None:
    """Trains, observes and edits a model, and writes the results."""
    model, data = train()
    ids = Tokens("backcopy", "val", T, bos=True).read(range(128))[0]
    with spikesink.open(model, tokenizer=tokenizer_of(data.meta), tokens=ids, n_seq=64) as look:
        findings = spikesink.detect(look)
        print(f"spike: {findings.verdicts.spike.verdict}, sink: {findings.verdicts.sink.verdict}")
        print(f"Sink_1 at epsilon 0.3: {findings.sinks.at(0.3).first:.0%} of heads")
        clean = look.loss()
        with spikesink.sink_mask(look):
            print(f"without sinks: {look.loss() - clean:+.4f} nats per token")
            with spikesink.spike_zero(look):  # interventions can be combined in any order
                print(f"without sinks and spikes: {look.loss() - clean:+.4f} nats per token")
        with spikesink.sink_mask(look, control="random_keys"):
            print(f"without as many random keys: {look.loss() - clean:+.4f} nats per token")
        assert look.loss() == clean  # outside the blocks the model is unchanged
    findings.save(OUT / "detect.json")
    spikesink.page(OUT / "detect.html", findings)
    print(spikesink.figures(OUT, findings))


if __name__ == "__main__":
    cli(main)
