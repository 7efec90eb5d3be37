"""Monitors spikes and sinks while a Hugging Face model is fine-tuned, by transformers' Trainer and by a PyTorch loop.

  python docs/examples/finetune_hf.py               a tiny GPT-2 with new weights, on bytes; under a minute on a CPU
  python docs/examples/finetune_hf.py --model gpt2  a model from the hub or a folder, with its own tokenizer

The text is data/stdlib, which is made on first use, or any file (--text FILE). Needs pip install -e .[hf,lab]
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # needed if this repository is not installed

from data.loader import Tokens
from spikesink.measure.monitor import Monitor, MonitorCallback


def windows_of(args: argparse.Namespace) -> torch.Tensor:
    """Token ids (N, T): the text in windows, encoded by the model's tokenizer, or as bytes for the tiny GPT-2."""
    if args.text:
        text = Path(args.text).read_text(encoding="utf-8")
    else:
        x, _ = Tokens("stdlib", "train", 2**16, False, args.seed).batch(0, 4)
        text = bytes(i for i in x.flatten().tolist() if i < 256).decode(errors="replace")
    if args.model:
        ids = transformers.AutoTokenizer.from_pretrained(args.model)(text, verbose=False)["input_ids"]
    else:
        ids = list(text.encode())
    return torch.tensor(ids[: len(ids) // args.length * args.length]).view(-1, args.length)


def model_of(args: argparse.Namespace) -> transformers.PreTrainedModel:
    """The model to fine-tune."""
    torch.manual_seed(args.seed)
    if args.model:
        return transformers.AutoModelForCausalLM.from_pretrained(args.model)
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": args.length, "vocab_size": 256}
    config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
    return transformers.AutoModelForCausalLM.from_config(config)


def with_trainer(model: transformers.PreTrainedModel, windows: torch.Tensor, args: argparse.Namespace) -> None:
    """Trains with transformers.Trainer. The monitor's numbers are in its log, and go where `report_to` sends that."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            logging_steps=args.every,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in windows]
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(MonitorCallback(trainer, every=args.every))  # the only added line
        trainer.train()
    looks = {row["step"]: row for row in trainer.state.log_history if "sink/heads" in row}
    for row in trainer.state.log_history:
        if "loss" in row and (look := looks.get(row["step"])):
            spike_and_sinks = f"spike {look['spike/largest_ratio']:.0f}x, sinks {look['sink/heads']:.0%} of heads"
            print(f"step {row['step']}: loss {row['loss']:.3f}, {spike_and_sinks}")


def in_a_loop(model: transformers.PreTrainedModel, windows: torch.Tensor, args: argparse.Namespace) -> None:
    """Trains in a plain PyTorch loop. The monitor takes three lines."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    draw = torch.Generator().manual_seed(args.seed)
    monitor = Monitor(model, every=args.every)  # line 1
    for step in range(1, args.steps + 1):
        batch = windows[torch.randint(len(windows), (args.batch_size,), generator=draw)]
        with monitor(step):  # line 2
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor.row:  # line 3
            print(f"step {step}: loss {loss.item():.3f}, {monitor.words()}")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", help="a causal model from the hub or a folder; default: a tiny new GPT-2")
    flags.add_argument("--text", metavar="FILE", help="default: data/stdlib")
    flags.add_argument("--steps", type=int, default=100)
    flags.add_argument("--every", type=int, default=20, help="steps between measurements")
    flags.add_argument("--batch_size", type=int, default=8)
    flags.add_argument("--length", type=int, default=128, help="tokens of a window")
    flags.add_argument("--learning_rate", type=float, default=2e-3)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    windows = windows_of(args)
    for name, train in (("transformers.Trainer", with_trainer), ("a plain loop", in_a_loop)):
        print(f"== {name}")
        train(model_of(args).train(), windows, args)


if __name__ == "__main__":
    main()
