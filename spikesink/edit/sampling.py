"""What a model says after a prompt, left alone or under an intervention: a whole pass for each token."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError, say_once
from ..measure.observe import Ordinary
from ..models.subject import Subject
from ..options import Sampling
from ..text.sequences import Reader
from ..text.tokenizers import NoTokenizer, text_of
from .clean_pass import CleanPass
from .findings import Continuation
from .outcomes import Condition

OnText = Callable[[str, int, str], None]  # (clean or the intervention, number of the sample, a piece of its text)


def next_logits(
    subject: Subject, ids: Tensor, condition: Condition | None, ordinary: Ordinary | None
) -> tuple[Tensor, int]:
    """(logits (V,) of the token after ids (1, T), how much was edited), from one pass. The clean model fixes for these
    very ids what an edit changes."""
    with contextlib.ExitStack() as stack:
        edited = 0
        if condition:
            clean = CleanPass.run(subject, ids, ordinary=ordinary)
            edit = condition(clean)
            edited = edit.edited
            stack.enter_context(clean.prefix(edit.stage))
            stack.enter_context(edit)
        return subject.logits(ids.to(subject.device))[0, -1], edited


def drawn(row: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token from logits (V,), as GPT.generate draws it, on the CPU."""
    row = row.float().cpu()
    if not row.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are broken, or overflow")
    if sampling.top_k:
        row = row.masked_fill(row < row.topk(min(sampling.top_k, len(row))).values[-1], -torch.inf)
    if not sampling.temperature:
        return int(row.argmax())
    return int(torch.multinomial(((row - row.max()) / sampling.temperature).softmax(-1), 1, generator=generator))


def prompt_ids(subject: Subject, reader: Reader, prompt: str) -> list[int]:
    """ids (T,) of a prompt, without the special tokens around it. Says where it does not fit into the model's window.

    Raises UserError where it is empty, and for a model that does not predict the next token of a text.
    """
    if subject.shift != 1:
        raise UserError("this model does not predict the next token of a text, so it cannot continue one")
    if isinstance(reader.tokenizer, NoTokenizer):
        raise UserError("the model has no tokenizer at hand, so a prompt cannot be read")
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
def continuations(
    subject: Subject,
    reader: Reader,
    start: list[int],
    sampling: Sampling,
    on_text: OnText | None,
    name: str,
    condition: Condition | None = None,
    ordinary: Ordinary | None = None,
) -> tuple[list[Continuation], int]:
    """(samples after the ids `start` (T,), how much was edited for them). A sample ends after n_tokens, or at a token
    that ends a text. `on_text` gets the text of each piece by piece, whole characters only."""
    samples, n_edited = [], 0
    known = reader.meta.get("vocab_size")  # ids from here on pad the vocabulary
    for number in range(sampling.n_samples):
        generator, ids = torch.Generator().manual_seed(sampling.seed + number), [*start]
        prompt = text = shown = text_of(reader.tokenizer, start)
        for remaining in tqdm(range(sampling.n_tokens)[::-1], name, disable=True if on_text else None, leave=False):
            logits, edited = next_logits(subject, window(reader, ids), condition, ordinary)
            ids.append(drawn(logits[:known], sampling, generator))
            n_edited += edited
            ends = ids[-1] in reader.end_ids
            text = text if ends else text_of(reader.tokenizer, ids)
            if on_text and not (remaining and not ends and text.endswith("\ufffd")):
                on_text(name, number, text[len(shown) :])
                shown = text
            if ends:
                break
        losses = subject.losses(window(reader, ids))[0, len(start) - len(ids) :]
        samples.append(Continuation(ids=ids[len(start) :], text=text[len(prompt) :], loss=losses.mean().item()))
    return samples, n_edited
