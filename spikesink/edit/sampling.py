"""What a model says after a prompt, left alone or under an intervention: a whole pass for each token."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError, say_once
from ..measure.observe import Ordinary
from ..models.subject import Subject
from ..options import Sampling
from ..text.sequences import Reader
from ..text.tokenizers import text_of
from .clean_pass import CleanPass
from .findings import Continuation
from .outcomes import Condition

Logits = Callable[[Tensor], Tensor]  # ids (1, T) -> of what comes next, (V,)
OnText = Callable[[str, int, str], None]  # (clean or the intervention, number of the sample, a piece of its text)


def clean_logits(subject: Subject) -> Logits:
    """The model left alone."""
    return lambda ids: subject.logits(ids.to(subject.device))[0, -1]


def edited_logits(subject: Subject, condition: Condition, ordinary: Ordinary, edited: list[int]) -> Logits:
    """The model under an edit, which the clean model fixes anew for every text; `edited` gets how much each did."""

    def logits(ids: Tensor) -> Tensor:
        clean = CleanPass.of(subject, ids, ordinary=ordinary)
        edit = condition(clean)
        edited.append(edit.edited)
        with clean.prefix(edit.stage), edit:
            return subject.logits(ids.to(subject.device))[0, -1]

    return logits


def drawn(row: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token from logits (V,), as GPT.generate draws it, on the CPU."""
    row = row.float().cpu()
    if sampling.top_k:
        row = row.masked_fill(row < row.topk(min(sampling.top_k, len(row))).values[-1], -torch.inf)
    if not sampling.temperature:
        return int(row.argmax())
    return int(torch.multinomial((row / sampling.temperature).softmax(-1), 1, generator=generator))


def prompt_ids(subject: Subject, reader: Reader, prompt: str) -> list[int]:
    """ids (T,) of a prompt, without the special tokens around it. Says where it does not fit into the model's window.

    Raises UserError where it is empty, and for a model that does not predict the next token of a text.
    """
    if subject.shift != 1 or not subject.has_loss:
        raise UserError("this model does not predict the next token of a text, so it cannot continue one")
    ids = reader.encoded(prompt, "the prompt").tolist()
    if not ids:
        raise UserError("the prompt is empty")
    left_out = len(ids) + len(reader.prefix_ids) - reader.block_size
    if left_out > 0:
        say_once(f"the model reads {reader.block_size} tokens: the first {left_out} of the prompt are left out")
    return ids


def window(reader: Reader, ids: list[int]) -> Tensor:
    """What the model reads of ids (K,): the special tokens before a text, then the last ones that fit. (1, T)."""
    room = int(min(len(ids), reader.block_size - len(reader.prefix_ids)))
    return torch.tensor([[*reader.prefix_ids, *ids[len(ids) - room :]]])


@torch.no_grad()
def continuation(
    subject: Subject,
    reader: Reader,
    start: list[int],
    sampling: Sampling,
    number: int,
    name: str,
    logits: Logits,
    on_text: OnText | None,
) -> Continuation:
    """Sample `number` (from 0) after the ids `start` (T,), drawn from `logits`; `on_text` gets its text piece by piece,
    whole characters only."""
    generator = torch.Generator().manual_seed(sampling.seed + number)
    ids, known = [*start], reader.meta.get("vocab_size")  # beyond it: padding of the vocabulary
    before = text = shown = text_of(reader.tokenizer, start)
    for _ in tqdm(range(sampling.n_tokens), desc=name, disable=True if on_text else None, leave=False):
        ids.append(drawn(logits(window(reader, ids))[:known], sampling, generator))
        text = text_of(reader.tokenizer, ids)
        if on_text and not text.endswith("\ufffd"):
            on_text(name, number, text[len(shown) :])
            shown = text
    if on_text:
        on_text(name, number, text[len(shown) :])
    losses = subject.losses(window(reader, ids))[0, -sampling.n_tokens :]
    return Continuation(ids=ids[len(start) :], text=text[len(before) :], loss=losses.mean().item())
