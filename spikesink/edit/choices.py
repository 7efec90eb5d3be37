"""Multiple choice from a file in HellaSwag's form: which ending of a context has most log-probability?

Scores are lm-evaluation-harness's: acc takes the ending of the largest summed log p; acc_norm divides that by the
ending's length, in characters as there, so that the numbers can stand beside published ones.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..errors import UserError
from ..models.subject import Subject, batches
from ..text.sequences import Reader
from ..text.tokenizers import spans_of
from .findings import Choices, ChoicesCondition
from .outcomes import TextConditions
from .probes import accuracy_of, padded, read_lines

CONTEXTS = ("ctx", "context", "query")  # what a file may call the text before the endings


class Question(NamedTuple):
    """A context, its endings, and the number of the right one."""

    context: str
    endings: list[str]
    label: int


def questions(path: str | Path) -> list[Question]:
    """Reads the questions of a JSONL file, in its order. Raises UserError naming the file and the line."""
    read = [_question(line, f"{path}, line {n}") for n, line in enumerate(read_lines(Path(path)), 1) if line.strip()]
    if not read:
        raise UserError(f"{path} holds no question")
    return read


def _question(line: str, where: str) -> Question:
    problem = 'is no question: {"ctx": TEXT, "endings": [TEXT, TEXT, ...], "label": 0}'
    try:
        row = json.loads(line)
        context, endings = next(row[key] for key in CONTEXTS if key in row), row["endings"]
        label = int(row["label"]) if isinstance(row["label"], str) else row["label"]  # the hub's has "3"
    except (ValueError, KeyError, TypeError, StopIteration):
        raise UserError(f"{where} {problem}") from None
    texts = [context, *endings] if isinstance(endings, list) else []
    if not (len(texts) > 2 and all(isinstance(text, str) and text.strip() for text in texts) and type(label) is int):
        raise UserError(f"{where} {problem}")
    if not 0 <= label < len(endings):
        raise UserError(f"{where} has the label {label}, and endings 0 to {len(endings) - 1}")
    return Question(context, endings, label)


def multiple_choice(
    subject: Subject, reader: Reader, posed: list[Question], conditions: TextConditions, batch_size: int = 64
) -> Choices:
    """Accuracy under every condition, the clean model's first.

    Context, a space and ending are encoded together. A token is the ending's if it reaches beyond the context. What is
    longer than the model's window loses the context's first tokens; BOS stays. Raises UserError for a model that does
    not predict the next token, and where no question fits.
    """
    if subject.shift != 1:
        raise UserError(
            "multiple choice needs the probability of an ending, which only a model of the next token gives"
        )
    encoded = spans_of(reader.tokenizer, [f"{q.context} {ending}" for q in posed for ending in q.endings])
    room = reader.block_size - len(reader.prefix_ids)
    fitting, rows, n_ending, cropped = [], [], [], 0
    for question in posed:
        ends = len(question.context.rstrip())
        tokens = [encoded.pop(0) for _ in question.endings]
        sizes = [sum(end > ends for _, end in spans) for _, spans in tokens]
        if max(sizes) < room + len(reader.prefix_ids):
            fitting.append(question)
            n_ending += sizes
            cropped += max(len(ids) for ids, _ in tokens) > room
            rows += [[*reader.prefix_ids, *ids[-int(min(room, len(ids))) :]] for ids, _ in tokens]
    if not fitting:
        raise UserError(f"no ending fits into the model's {reader.block_size} tokens")
    scores = {name: torch.zeros(len(rows), dtype=torch.float64) for name in conditions}
    for numbers, batch in tqdm([*batches(padded(rows), batch_size)], desc="choices", disable=None, leave=False):
        for name, condition in conditions.items():
            with condition(batch, numbers):
                losses = subject.losses(batch).double()
            for number, loss in zip(numbers.tolist(), losses, strict=True):
                scores[name][number] = -loss[len(loss) - n_ending[number] :].sum()
    length = torch.tensor([len(ending) for q in fitting for ending in q.endings])
    right = {name: (_right(fitting, score), _right(fitting, score / length)) for name, score in scores.items()}
    clean = next(iter(right.values()))
    return Choices(
        questions=len(fitting),
        left_out=len(posed) - len(fitting),
        cropped=cropped,
        chance=sum(1 / len(q.endings) for q in fitting) / len(fitting),
        conditions=[
            ChoicesCondition(name=name, **vars(accuracy_of(acc, clean[0])), normalised=accuracy_of(norm, clean[1]))
            for name, (acc, norm) in right.items()
        ],
    )


def _right(posed: list[Question], scores: torch.Tensor) -> torch.Tensor:
    """1 for each question (N,) whose right ending has the highest score, else 0; `scores`: all endings in a row."""
    parts = scores.split([len(question.endings) for question in posed])
    return torch.tensor([float(part.argmax() == q.label) for part, q in zip(parts, posed, strict=True)]).double()
