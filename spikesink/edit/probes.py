"""What a model knows of language, under any intervention: minimal pairs, and linear probes on its frozen states.

`conditions` maps names to functions (ids (B, T), numbers of the sequences (B,)) -> context manager under which the
model runs; the first is the model left alone, which the others are compared with.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..hooks import on_streams
from ..measure import metrics
from ..models.subject import Subject, batches
from ..text.sequences import PADDING, Reader
from ..text.tokenizers import Spans, spans_of
from .findings import Accuracy, Blimp, BlimpCondition, Linear, LinearCondition, Selectivity, WordCounts
from .outcomes import TextConditions

RESAMPLES = 1000  # of every bootstrap
FEWEST = 100  # words, to train and to test
RIDGE = 100.0  # the probes' penalty: a few percent of what a standardised feature sums to over the training words

# ------------------------------------------------------------------------------------------ minimal pairs


class Pair(NamedTuple):
    """Two sentences, of which one is grammatical."""

    good: str
    bad: str
    phenomenon: str
    field: str


def minimal_pairs(path: Path, per_paradigm: int, seed: int = 0) -> list[Pair]:
    """BLiMP's pairs (Warstadt et al. 2020): of each paradigm in blimp.jsonl, `per_paradigm` drawn at random."""
    paradigms: dict[str, list[Pair]] = {}
    for pair in map(json.loads, read_lines(path)):
        field = pair["field"].replace("/", "_")  # the release writes syntax_semantics in two ways
        kept = Pair(pair["sentence_good"], pair["sentence_bad"], pair["linguistics_term"], field)
        paradigms.setdefault(pair["UID"], []).append(kept)
    rng = np.random.default_rng(seed)
    draw = lambda pairs: rng.choice(len(pairs), min(per_paradigm, len(pairs)), replace=False)
    return [paradigms[uid][i] for uid in sorted(paradigms) for i in sorted(draw(paradigms[uid]))]


def read_lines(path: Path) -> list[str]:
    """The lines of a file. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def blimp(
    subject: Subject, reader: Reader, pairs: list[Pair], conditions: TextConditions, batch_size: int = 64
) -> Blimp:
    """Accuracy on minimal pairs under every condition.

    A pair is right if its good sentence has strictly more log-probability, summed over all its tokens, the first one
    too where something can stand before it (`Reader.opened`). Raises UserError for a model that does not predict the
    next token of a text.
    """
    if subject.shift != 1:
        raise UserError("BLiMP asks for the probability of a sentence, which only a model of the next token gives")
    reader, first_token = reader.opened()
    encoded = [frame(reader, ids) for ids in reader.tokenizer.encode([s for p in pairs for s in (p.good, p.bad)])]
    fit = [max(map(len, encoded[2 * i : 2 * i + 2])) <= reader.block_size for i in range(len(pairs))]
    kept = [pair for pair, fits in zip(pairs, fit, strict=True) if fits]
    if not kept:
        raise UserError(f"no pair of BLiMP fits into the model's {reader.block_size} tokens")
    ids = padded([ids for i, ids in enumerate(encoded) if fit[i // 2]])
    reader.check_ids(ids, "BLiMP")
    scores = {name: torch.zeros(len(ids), 2, dtype=torch.float64) for name in conditions}  # sum, mean over tokens
    for rows, batch in tqdm([*batches(ids, batch_size)], desc="blimp", disable=None, leave=False):
        for name, condition in conditions.items():
            with condition(batch, rows):
                losses = subject.losses(batch).double()
            scores[name][rows] = -torch.stack((losses.sum(1), losses.mean(1)), dim=1)
    right = {name: (s.view(-1, 2, 2)[:, 0] > s.view(-1, 2, 2)[:, 1]).double() for name, s in scores.items()}
    clean = next(iter(right.values()))
    return Blimp(
        normalisation=f"a sentence's score is the sum of log p over its tokens (Warstadt et al. 2020), {first_token}",
        pairs=len(kept),
        left_out=len(pairs) - len(kept),
        conditions=[
            BlimpCondition(
                name=name,
                **vars(accuracy_of(of[:, 0], clean[:, 0])),
                accuracy_per_token=of[:, 1].mean().item(),
                by_field=_by([pair.field for pair in kept], of[:, 0], clean[:, 0]),
                by_phenomenon=_by([pair.phenomenon for pair in kept], of[:, 0], clean[:, 0]),
            )
            for name, of in right.items()
        ],
    )


def accuracy_of(right: Tensor, clean: Tensor) -> Accuracy:
    """Accuracy, and its paired change, of pairs (N,) that are right (1) or not (0)."""
    change = right - clean
    return Accuracy(
        n=len(right),
        accuracy=right.mean().item(),
        ci95=metrics.rate_ci(right),
        change=change.mean().item(),
        change_ci95=metrics.bootstrap_ci(lambda i: change[i].mean().item(), len(change)),
    )


def _by(groups: list[str], right: Tensor, clean: Tensor) -> dict[str, Accuracy]:
    """The accuracy of each group of pairs; `groups`: the name of every pair's."""
    members = {name: [group == name for group in groups] for name in sorted(set(groups))}
    return {name: accuracy_of(right[where], clean[where]) for name, where in members.items()}


def frame(reader: Reader, ids: Iterable[int] | np.ndarray) -> list[int]:
    """A text's ids between the special tokens, as a list."""
    return [*reader.prefix_ids, *map(int, ids), *reader.suffix_ids]


def padded(rows: list[list[int]], padding: int = PADDING) -> Tensor:
    """Lists of ids -> (N, T), padding after the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([row + [padding] * (longest - len(row)) for row in rows])


# ------------------------------------------------------------------------------------------- linear probes


class Sentence(NamedTuple):
    """A sentence of a treebank; heads count from 0, -1 for the root."""

    words: list[str]  # with the space before them, if there is one
    tags: list[str]  # universal part of speech
    heads: list[int]
    relations: list[str]  # to the head, without subtypes


def sentences(path: Path, n: int, seed: int = 0) -> list[Sentence]:
    """`n` random sentences of a CoNLL-U file. Raises UserError."""
    import conllu

    blocks = [block for block in "".join(read_lines(path)).split("\n\n") if block.strip()]
    rng = np.random.default_rng(seed)
    found: list[Sentence] = []
    for i in sorted(rng.choice(len(blocks), min(n, len(blocks)), replace=False)):
        try:
            found += [_sentence(tokens) for tokens in conllu.parse(blocks[i])]
        except (conllu.exceptions.ParseException, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not CoNLL-U: {str(error).splitlines()[0]}") from None
    return found


def _sentence(tokens: Any) -> Sentence:
    words: list[str] = []
    spaced, until = False, {}
    for token in tokens:
        glued = (token["misc"] or {}).get("SpaceAfter") == "No"
        if isinstance(token["id"], tuple):  # 3-4 don't: its words are glued to each other; 8.1: elided, no word
            if token["id"][1] == "-":
                until = {i: False for i in range(token["id"][0], token["id"][2])} | {token["id"][2]: not glued}
            continue
        words.append((" " if spaced else "") + token["form"])
        spaced = until.get(token["id"], not glued)
    own = [token for token in tokens if isinstance(token["id"], int)]
    return Sentence(
        words,
        [token["upos"] for token in own],
        [token["head"] - 1 for token in own],
        [token["deprel"].split(":")[0] for token in own],
    )


@dataclass(frozen=True)
class Words:
    """The words of sentences that fit into the model, all in a row, and where their tokens are."""

    ids: Tensor  # (N, T)
    of_token: Tensor  # (N, T): the number of the word that a token is of, -1 for none
    sentence: np.ndarray  # of each word
    index: np.ndarray  # of each word, in its sentence


def word_of_tokens(words: list[str], spans: Spans) -> list[int]:
    """The word, by its number, that each token of the words' joined text is of, from the characters it stands for.

    It is the word that has most of these, white space not counted; the first of words that have as many. A token of
    white space alone, or of nothing, is of the word that it stands before; -1 at the end of the text.
    """
    owner, text = [number for number, word in enumerate(words) for _ in word], "".join(words)
    numbers = []
    for start, end in spans:
        mine = [owner[i] for i in range(start, end) if not text[i].isspace()] or owner[start : start + 1]
        numbers.append(max(mine, key=mine.count, default=-1))
    return numbers


def words_of(reader: Reader, read: list[Sentence]) -> Words:
    """The words of sentences, each encoded as a whole, by `word_of_tokens`. Left out: words that have no token of their
    own, and those that do not fit into the model with all their tokens.

    Raises UserError if nothing fits, or for a tokenizer that does not tell which characters a token stands for.
    """
    rows: list[list[int]] = []
    numbers: list[list[int]] = []  # of each row's tokens: the number of their word, -1 for none
    where: list[tuple[int, int]] = []
    room = reader.block_size - len(reader.prefix_ids) - len(reader.suffix_ids)
    encoded = spans_of(reader.tokenizer, ["".join(sentence.words) for sentence in read])
    for n, (sentence, (ids, spans)) in enumerate(zip(read, encoded, strict=True)):
        words = word_of_tokens(sentence.words, spans)
        kept = int(min(len(ids), max(0, room)))
        while kept and words[kept - 1] in words[kept:]:
            kept -= 1
        number = {word: len(where) + i for i, word in enumerate(sorted({*words[:kept]} - {-1}))}
        if number:
            where += [(n, word) for word in number]
            rows.append(frame(reader, ids[:kept]))
            ends = [[-1] * len(special) for special in (reader.prefix_ids, reader.suffix_ids)]
            numbers.append([*ends[0], *(number.get(word, -1) for word in words[:kept]), *ends[1]])
    if not rows:
        raise UserError(f"no word of the treebank fits into the model's {reader.block_size} tokens")
    framed = padded(rows)
    reader.check_ids(framed, "the treebank")
    return Words(framed, padded(numbers, -1), *np.array(where).T)


@torch.no_grad()
def states(subject: Subject, words: Words, conditions: TextConditions, batch_size: int = 64) -> dict[str, Tensor]:
    """The state of each word after every tap under every condition: {name: (taps, words, C)}, means over its tokens."""
    front = subject.n_register + (subject.start is not None)  # what the streams have before the first token
    count = words.of_token[words.of_token >= 0].bincount(minlength=len(words.index))
    sums: dict[str, dict[int, Tensor]] = {name: {} for name in conditions}

    def pool(into: dict[int, Tensor], index: int, number: Tensor, x: Tensor) -> None:
        x = x.detach().float().view(len(number), -1, x.size(-1))[:, front:].cpu()
        of = number[:, : x.size(1)]
        if index not in into:
            into[index] = torch.zeros(len(words.index), x.size(-1))
        into[index].index_add_(0, of[of >= 0], x[of >= 0])

    for rows, batch in tqdm([*batches(words.ids, batch_size)], desc="states", disable=None, leave=False):
        number = words.of_token[rows, : batch.size(1)]
        for name, condition in conditions.items():
            functions = [functools.partial(pool, sums[name], i, number) for i in range(len(subject.streams))]
            with condition(batch, rows), on_streams(subject.streams, functions):
                subject.losses(batch)
    return {name: torch.stack([of[i] for i in sorted(of)]) / count[:, None] for name, of in sums.items()}


class Task(NamedTuple):
    """A classification of words or of pairs of words, beside its control."""

    first: np.ndarray  # (K,), number of the word
    second: np.ndarray | None  # of the other word
    label: np.ndarray  # (K,), class
    control: np.ndarray  # (K,), class of the control task


def drawn(text: str, seed: int = 0) -> float:
    """A number in [0, 1) that is a fixed random function of a text."""
    digest = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class Labels:
    """Labels -> classes, commonest first; and the control task of Hewitt & Liang 2019: of each word type, always the
    same label, drawn from the labels' distribution."""

    def __init__(self, labels: Sequence[str]) -> None:
        counts = Counter(labels).most_common()
        self.names = {name: i for i, (name, _) in enumerate(counts)}
        self.upto = np.cumsum([count for _, count in counts]) / len(labels)

    def classes(self, labels: Iterable[str]) -> np.ndarray:
        """int64 (K,); -1 for a label that was never seen, which no probe can get right."""
        return np.array([self.names.get(label, -1) for label in labels], dtype=np.int64)

    def control(self, types: Iterable[str]) -> np.ndarray:
        """int64 (K,): the class drawn for each word type."""
        return np.array([np.searchsorted(self.upto, drawn(word), side="right") for word in types], dtype=np.int64)


def tasks_of(read: list[Sentence], words: Words, train: np.ndarray, seed: int = 0) -> dict[str, Task]:
    """The tasks on the words of sentences; `train`: bool (words,), those that labels and offsets are learned from.

    pos: a word's universal tag. label: its relation to its head, the control by its own type. edge: is the second word
    the head of the first? Against another word of the sentence, its offset drawn from those of true heads, so that
    distance alone does not tell; the control is a coin for each pair of types.
    """
    number = {where: k for k, where in enumerate(zip(words.sentence.tolist(), words.index.tolist(), strict=True))}
    type_of = [read[n].words[i].strip().lower() for n, i in number]
    tags = [read[n].tags[i] for n, i in number]
    heads = [number.get((n, read[n].heads[i]), -1) for n, i in number]
    relations = [read[n].relations[i] for n, i in number]
    everyone = np.arange(len(number))
    linked = everyone[np.array(heads) >= 0]
    head = np.array(heads)[linked]

    of_tags = Labels([tags[k] for k in everyone[train]])
    of_relations = Labels([relations[k] for k in linked[train[linked]]])
    rng = np.random.default_rng(seed)
    offsets = (head - linked)[train[linked]]
    others = np.array([_other_word(k, h, words.sentence, offsets, rng) for k, h in zip(linked, head, strict=True)])
    has = others >= 0
    first, second = np.concatenate((linked[has], linked[has])), np.concatenate((head[has], others[has]))
    coin = [drawn(f"{type_of[a]} {type_of[b]}") < 0.5 for a, b in zip(first, second, strict=True)]
    pick = lambda values, which: [values[k] for k in which]
    return {
        "pos": Task(everyone, None, of_tags.classes(tags), of_tags.control(type_of)),
        "edge": Task(first, second, np.repeat([1, 0], has.sum()), np.array(coin, dtype=np.int64)),
        "label": Task(
            linked, head, of_relations.classes(pick(relations, linked)), of_relations.control(pick(type_of, linked))
        ),
    }


def _other_word(
    word: int, head: int, sentence: np.ndarray, offsets: np.ndarray, rng: np.random.Generator, tries: int = 20
) -> int:
    """A word of the same sentence, neither itself nor its head, at an offset that heads have; -1 without luck."""
    for other in word + rng.choice(offsets, tries):
        if 0 <= other < len(sentence) and sentence[other] == sentence[word] and other not in (word, head):
            return other
    return -1


# what a probe sees of one word's state, or of two
FEATURES: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "pos": lambda a, b: a,
    "edge": lambda a, b: np.concatenate((a, b, a * b), axis=1),  # a map of (a, b) alone could not compare them
    "label": lambda a, b: np.concatenate((a, b), axis=1),
}


def right_of(task: Task, features: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Which test examples a probe and its control's probe get right: (K_test, 2).

    One least-squares classifier (ridge on one-hot classes) for both, retrained here; features standardised on `train`.
    """
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    both = np.stack((task.label, task.control), axis=1)
    classes = [both[train], both[~train]]
    sizes = classes[0].max(axis=0) + 1
    hot = np.concatenate(
        [np.eye(size, dtype=np.float32)[column] for size, column in zip(sizes, classes[0].T, strict=True)], axis=1
    )
    scaler = StandardScaler().fit(features[train])
    probe = Ridge(RIDGE).fit(scaler.transform(features[train]), hot)
    scores = np.split(probe.predict(scaler.transform(features[~train])), [sizes[0]], axis=1)
    guesses = np.stack([score.argmax(axis=1) for score in scores], axis=1)
    return (guesses == classes[1]).astype(np.float64)


def linear(
    subject: Subject,
    reader: Reader,
    train: list[Sentence],
    test: list[Sentence],
    conditions: TextConditions,
    batch_size: int = 64,
) -> Linear:
    """Linear probes on the states after every tap under every condition.

    A probe is trained anew under each condition: is the information still there, linearly? Selectivity is accuracy
    minus that of a control task (Hewitt & Liang 2019). Intervals: bootstrap over test sentences, paired with the first
    condition. Raises UserError where too few words fit into the model.
    """
    read = [*train, *test]
    words = words_of(reader, read)
    in_train = words.sentence < len(train)
    if min(in_train.sum(), (~in_train).sum()) < FEWEST:
        raise UserError(f"fewer than {FEWEST} words of the treebank fit into the model: nothing can be probed")
    tasks = tasks_of(read, words, in_train)
    tasks = {key: task for key, task in tasks.items() if len(set(in_train[task.first])) == 2}  # has both splits
    found = states(subject, words, conditions, batch_size)
    right = _right_under(tasks, found, in_train)
    draws = np.random.default_rng(0).multinomial(len(test), np.full(len(test), 1 / len(test)), RESAMPLES)
    clean = next(iter(found))

    def probes_of(name: str, key: str) -> list[Selectivity]:
        first = tasks[key].first
        sentence = words.sentence[first[~in_train[first]]] - len(train)
        return [
            Selectivity(
                index=i,
                layer=tap.layer,
                kind=tap.kind,
                **_selectivity(right[name, key, i], right[clean, key, i], sentence, draws),
            )
            for i, tap in enumerate(subject.streams)
        ]

    return Linear(
        pooling="the mean over a word's tokens: sentences are encoded whole, a token is of the word with most of it",
        features="standardised; label: both words' states; edge: those and their product",
        classifier=f"ridge regression on one-hot classes, penalty {RIDGE:g}",
        words=WordCounts(train=int(in_train.sum()), test=int((~in_train).sum())),
        left_out=sum(len(sentence.words) for sentence in read) - len(words.index),
        majority={key: _accuracy_of_commonest(task, in_train) for key, task in tasks.items()},
        conditions=[LinearCondition(name=name, tasks={key: probes_of(name, key) for key in tasks}) for name in found],
    )


def _right_under(
    tasks: Mapping[str, Task], found: Mapping[str, Tensor], in_train: np.ndarray
) -> dict[tuple[str, str, int], np.ndarray]:
    """`right_of` for every condition, task and tap; `found`: of `states`, the clean model first."""
    clean_name, clean = next(iter(found.items()))
    right: dict[tuple[str, str, int], np.ndarray] = {}
    with tqdm(total=len(found) * len(tasks) * len(clean), desc="probes", disable=None, leave=False) as bar:
        for name, of in found.items():
            for key, task in tasks.items():
                for i in range(len(clean)):
                    if name != clean_name and torch.equal(of[i], clean[i]):  # the very same states
                        right[name, key, i] = right[clean_name, key, i]
                    else:
                        x = of[i].numpy()
                        features = FEATURES[key](x[task.first], None if task.second is None else x[task.second])
                        right[name, key, i] = right_of(task, features, in_train[task.first])
                    bar.update()
    return right


def _accuracy_of_commonest(task: Task, in_train: np.ndarray) -> float:
    """The accuracy on the test words of the commonest answer among the training words."""
    commonest = np.bincount(task.label[in_train[task.first]]).argmax()
    return float((task.label[~in_train[task.first]] == commonest).mean())


def _selectivity(right: np.ndarray, clean: np.ndarray, sentence: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    """The numbers of a Selectivity, from what is right of test examples (K, 2): the task's and its control's."""
    sums = lambda values: np.bincount(sentence, values, minlength=draws.shape[1])
    n = sums(np.ones(len(sentence)))

    def rate(values: np.ndarray) -> tuple[float, list[float]]:
        of = sums(values)
        low, high = np.quantile((draws @ of) / np.maximum(draws @ n, 1), (0.025, 0.975))
        return float(of.sum() / n.sum()), [float(low), float(high)]

    selective, before = right[:, 0] - right[:, 1], clean[:, 0] - clean[:, 1]
    measured = {
        ("accuracy", "ci95"): right[:, 0],
        ("control_accuracy", None): right[:, 1],
        ("selectivity", "selectivity_ci95"): selective,
        ("change", "change_ci95"): selective - before,
        ("accuracy_change", "accuracy_change_ci95"): right[:, 0] - clean[:, 0],
    }
    entry: dict[str, Any] = {}
    for (name, interval), values in measured.items():
        value, ci95 = rate(values)
        entry |= {name: value} | ({interval: ci95} if interval else {})
    return entry
