"""Probes of what a model knows of language under any intervention: minimal pairs, and linear probes on its states.

`conditions` maps names to functions (ids (B, T), numbers of the sequences (B,)) -> context manager under which the
model runs. The first is the clean model, with which the others are compared.
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
FEWEST = 100  # words to train on, and to test on
RIDGE = 100.0  # the probes' penalty: a few percent of a standardised feature's sum of squares over the training words

# ------------------------------------------------------------------------------------------ minimal pairs


class Pair(NamedTuple):
    """Two sentences, of which one is grammatical."""

    good: str
    bad: str
    phenomenon: str
    field: str


def minimal_pairs(path: Path, per_paradigm: int, seed: int = 0) -> list[Pair]:
    """Draws `per_paradigm` random pairs of each paradigm in blimp.jsonl (BLiMP, Warstadt et al. 2020)."""
    paradigms: dict[str, list[Pair]] = {}
    for pair in map(json.loads, read_lines(path)):
        field = pair["field"].replace("/", "_")  # the release writes syntax_semantics in two ways
        texts = pair["sentence_good"], pair["sentence_bad"]
        paradigms.setdefault(pair["UID"], []).append(Pair(*texts, pair["linguistics_term"], field))
    rng = np.random.default_rng(seed)
    draw = lambda pairs: rng.choice(len(pairs), min(per_paradigm, len(pairs)), replace=False)
    return [paradigms[uid][i] for uid in sorted(paradigms) for i in sorted(draw(paradigms[uid]))]


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a file. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def blimp(
    subject: Subject, reader: Reader, pairs: list[Pair], conditions: TextConditions, batch_size: int = 64
) -> Blimp:
    """Measures accuracy on minimal pairs under every condition.

    A pair is right if its good sentence has strictly more log-probability, summed over all its tokens. The first token
    counts too if a token can come before it (`Reader.opened`). Raises UserError for a model that does not predict the
    next token of a text.
    """
    if subject.shift != 1:
        raise UserError("BLiMP needs the probability of a sentence, which only a model of the next token gives")
    reader, first_token = reader.opened()
    encoded = [frame(reader, ids) for ids in reader.tokenizer.encode([s for p in pairs for s in (p.good, p.bad)])]
    fit = [max(map(len, encoded[2 * i : 2 * i + 2])) <= reader.block_size for i in range(len(pairs))]
    fitting = [pair for pair, fits in zip(pairs, fit, strict=True) if fits]
    if not fitting:
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
        pairs=len(fitting),
        left_out=len(pairs) - len(fitting),
        conditions=[
            BlimpCondition(
                name=name,
                **vars(accuracy_of(pair_right[:, 0], clean[:, 0])),
                accuracy_per_token=pair_right[:, 1].mean().item(),
                by_field=_accuracy_by([pair.field for pair in fitting], pair_right[:, 0], clean[:, 0]),
                by_phenomenon=_accuracy_by([pair.phenomenon for pair in fitting], pair_right[:, 0], clean[:, 0]),
            )
            for name, pair_right in right.items()
        ],
    )


def accuracy_of(right: Tensor, clean: Tensor) -> Accuracy:
    """Returns the accuracy on items (N,) that are right (1) or wrong (0), and its paired change from `clean`."""
    change = right - clean
    return Accuracy(
        n=len(right),
        accuracy=right.mean().item(),
        ci95=metrics.rate_ci(right),
        change=change.mean().item(),
        change_ci95=metrics.bootstrap_ci(lambda i: change[i].mean().item(), len(change)),
    )


def _accuracy_by(groups: list[str], right: Tensor, clean: Tensor) -> dict[str, Accuracy]:
    """Returns the accuracy of each group of pairs; `groups` names the group of every pair."""
    members = {name: [group == name for group in groups] for name in sorted(set(groups))}
    return {name: accuracy_of(right[where], clean[where]) for name, where in members.items()}


def frame(reader: Reader, ids: Iterable[int] | np.ndarray) -> list[int]:
    """Returns a text's ids between the special tokens, as a list."""
    return [*reader.prefix_ids, *map(int, ids), *reader.suffix_ids]


def padded(rows: list[list[int]], padding: int = PADDING) -> Tensor:
    """Returns lists of ids as (N, T), with padding after the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([row + [padding] * (longest - len(row)) for row in rows])


# ------------------------------------------------------------------------------------------- linear probes


class Sentence(NamedTuple):
    """A sentence of a treebank; heads count from 0, -1 for the root."""

    words: list[str]  # each with the space before it, if there is one
    tags: list[str]  # universal parts of speech
    heads: list[int]
    relations: list[str]  # to the head, without subtypes


def sentences(path: Path, n: int, seed: int = 0) -> list[Sentence]:
    """Draws `n` random sentences of a CoNLL-U file. Raises UserError."""
    import conllu

    blocks = [block for block in "".join(read_lines(path)).split("\n\n") if block.strip()]
    rng = np.random.default_rng(seed)
    drawn: list[Sentence] = []
    for i in sorted(rng.choice(len(blocks), min(n, len(blocks)), replace=False)):
        try:
            drawn += [_sentence(tokens) for tokens in conllu.parse(blocks[i])]
        except (conllu.exceptions.ParseException, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not CoNLL-U: {str(error).splitlines()[0]}") from None
    return drawn


def _sentence(tokens: Any) -> Sentence:
    words: list[str] = []
    spaced, until = False, {}
    for token in tokens:
        glued = (token["misc"] or {}).get("SpaceAfter") == "No"
        if isinstance(token["id"], tuple):  # "3-4 don't": its words have no space between; 8.1: elided, no word
            if token["id"][1] == "-":
                until = {i: False for i in range(token["id"][0], token["id"][2])} | {token["id"][2]: not glued}
            continue
        words.append((" " if spaced else "") + token["form"])
        spaced = until.get(token["id"], not glued)
    rows = [token for token in tokens if isinstance(token["id"], int)]
    tags, heads = [row["upos"] for row in rows], [row["head"] - 1 for row in rows]
    return Sentence(words, tags, heads, [row["deprel"].split(":")[0] for row in rows])


@dataclass(frozen=True)
class Words:
    """The words of all sentences that fit into the model, numbered through, and their tokens."""

    ids: Tensor  # (N, T)
    numbers: Tensor  # (N, T): the number of each token's word, -1 for none
    sentence: np.ndarray  # (words,), number of each word's sentence
    index: np.ndarray  # (words,), position of each word in its sentence


def token_words(words: list[str], spans: Spans) -> list[int]:
    """Returns the number of the word that each token of the words' joined text belongs to, by the token's characters.

    It is the word with most of these characters, without white space; the first one in a tie. A token of white space
    alone, or of no characters, belongs to the word after it; at the end of the text it gets -1.
    """
    owner, text = [number for number, word in enumerate(words) for _ in word], "".join(words)
    numbers = []
    for start, end in spans:
        owners = [owner[i] for i in range(start, end) if not text[i].isspace()] or owner[start : start + 1]
        numbers.append(max(owners, key=owners.count, default=-1))
    return numbers


def words_of(reader: Reader, treebank: list[Sentence]) -> Words:
    """Returns the words of sentences, each sentence encoded as a whole, by `token_words`. It leaves out words that have
    no token of their own, and words of which some token does not fit into the model.

    Raises UserError if no word fits, or for a tokenizer that does not tell which characters a token stands for.
    """
    rows: list[list[int]] = []
    numbers: list[list[int]] = []  # the word number of each row's tokens, -1 for none
    places: list[tuple[int, int]] = []
    n_free = reader.block_size - len(reader.prefix_ids) - len(reader.suffix_ids)
    encoded = spans_of(reader.tokenizer, ["".join(sentence.words) for sentence in treebank])
    for n, (sentence, (ids, spans)) in enumerate(zip(treebank, encoded, strict=True)):
        words = token_words(sentence.words, spans)
        n_tokens = int(min(len(ids), max(0, n_free)))
        while n_tokens and words[n_tokens - 1] in words[n_tokens:]:
            n_tokens -= 1
        number = {word: len(places) + i for i, word in enumerate(sorted({*words[:n_tokens]} - {-1}))}
        if number:
            places += [(n, word) for word in number]
            rows.append(frame(reader, ids[:n_tokens]))
            ends = [[-1] * len(special) for special in (reader.prefix_ids, reader.suffix_ids)]
            numbers.append([*ends[0], *(number.get(word, -1) for word in words[:n_tokens]), *ends[1]])
    if not rows:
        raise UserError(f"no word of the treebank fits into the model's {reader.block_size} tokens")
    framed = padded(rows)
    reader.check_ids(framed, "the treebank")
    return Words(framed, padded(numbers, -1), *np.array(places).T)


@torch.no_grad()
def states(subject: Subject, words: Words, conditions: TextConditions, batch_size: int = 64) -> dict[str, Tensor]:
    """Returns the mean state of each word's tokens after every tap under every condition: {name: (taps, words, C)}."""
    front = subject.n_register + (subject.start is not None)  # number of positions before the first token
    counts = words.numbers[words.numbers >= 0].bincount(minlength=len(words.index))
    sums: dict[str, dict[int, Tensor]] = {name: {} for name in conditions}

    def pool(into: dict[int, Tensor], index: int, number: Tensor, x: Tensor) -> None:
        x = x.detach().float().view(len(number), -1, x.size(-1))[:, front:].cpu()
        number = number[:, : x.size(1)]
        if index not in into:
            into[index] = torch.zeros(len(words.index), x.size(-1))
        into[index].index_add_(0, number[number >= 0], x[number >= 0])

    for rows, batch in tqdm([*batches(words.ids, batch_size)], desc="states", disable=None, leave=False):
        number = words.numbers[rows, : batch.size(1)]
        for name, condition in conditions.items():
            functions = [functools.partial(pool, sums[name], i, number) for i in range(len(subject.streams))]
            with condition(batch, rows), on_streams(subject.streams, functions):
                subject.losses(batch)
    return {name: torch.stack([taps[i] for i in sorted(taps)]) / counts[:, None] for name, taps in sums.items()}


class Task(NamedTuple):
    """A classification of words or of pairs of words, and its control task."""

    first: np.ndarray  # (K,), number of the word
    second: np.ndarray | None  # (K,), number of the other word
    label: np.ndarray  # (K,), class
    control: np.ndarray  # (K,), class in the control task


def text_uniform(text: str, seed: int = 0) -> float:
    """Returns a number in [0, 1) that is a fixed pseudo-random function of a text."""
    digest = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class Labels:
    """Maps labels to classes, commonest first; and makes the control task of Hewitt & Liang 2019: each word type always
    has the same label, drawn from the labels' distribution."""

    def __init__(self, labels: Sequence[str]) -> None:
        counts = Counter(labels).most_common()
        self.names = {name: i for i, (name, _) in enumerate(counts)}
        self.upto = np.cumsum([count for _, count in counts]) / len(labels)

    def classes(self, labels: Iterable[str]) -> np.ndarray:
        """Returns int64 (K,); -1 for an unknown label, which no probe can get right."""
        return np.array([self.names.get(label, -1) for label in labels], dtype=np.int64)

    def control(self, types: Iterable[str]) -> np.ndarray:
        """Returns the class drawn for each word type: int64 (K,)."""
        return np.array([np.searchsorted(self.upto, text_uniform(t), side="right") for t in types], dtype=np.int64)


def tasks_of(treebank: list[Sentence], words: Words, train: np.ndarray, seed: int = 0) -> dict[str, Task]:
    """Returns the tasks on the words of sentences. `train`: bool (words,), the words that give labels and offsets.

    pos: a word's universal tag. label: its relation to its head; the control goes by its own type. edge: is the second
    word the head of the first, or another word of the sentence? The other word's offset is drawn from those of true
    heads, so that distance alone does not tell. The control is a coin flip for each pair of types.
    """
    number = {place: k for k, place in enumerate(zip(words.sentence.tolist(), words.index.tolist(), strict=True))}
    types = [treebank[n].words[i].strip().lower() for n, i in number]
    tags = [treebank[n].tags[i] for n, i in number]
    heads = [number.get((n, treebank[n].heads[i]), -1) for n, i in number]
    relations = [treebank[n].relations[i] for n, i in number]
    all_words = np.arange(len(number))
    linked = all_words[np.array(heads) >= 0]
    head = np.array(heads)[linked]

    tag_labels = Labels([tags[k] for k in all_words[train]])
    relation_labels = Labels([relations[k] for k in linked[train[linked]]])
    rng = np.random.default_rng(seed)
    offsets = (head - linked)[train[linked]]
    others = np.array([_other_word(k, h, words.sentence, offsets, rng) for k, h in zip(linked, head, strict=True)])
    paired = others >= 0
    first, second = np.concatenate((linked[paired], linked[paired])), np.concatenate((head[paired], others[paired]))
    coin = [text_uniform(f"{types[a]} {types[b]}") < 0.5 for a, b in zip(first, second, strict=True)]
    labels = relation_labels.classes(relations[k] for k in linked), relation_labels.control(types[k] for k in linked)
    return {
        "pos": Task(all_words, None, tag_labels.classes(tags), tag_labels.control(types)),
        "edge": Task(first, second, np.repeat([1, 0], paired.sum()), np.array(coin, dtype=np.int64)),
        "label": Task(linked, head, *labels),
    }


def _other_word(
    word: int, head: int, sentence: np.ndarray, offsets: np.ndarray, rng: np.random.Generator, tries: int = 20
) -> int:
    """Draws a word of the same sentence, neither itself nor its head, at an offset that heads have; -1 if none fits."""
    for other in word + rng.choice(offsets, tries):
        if 0 <= other < len(sentence) and sentence[other] == sentence[word] and other not in (word, head):
            return other
    return -1


# the features that a probe gets from one word's state, or from two
FEATURES: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "pos": lambda a, b: a,
    "edge": lambda a, b: np.concatenate((a, b, a * b), axis=1),  # a linear map of (a, b) alone could not compare them
    "label": lambda a, b: np.concatenate((a, b), axis=1),
}


def right_of(task: Task, features: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Returns which test examples a probe and its control's probe get right: (K_test, 2).

    Both are one least-squares classifier (ridge on one-hot classes), trained here, on features standardised on `train`.
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
    """Runs linear probes on the states after every tap under every condition.

    A probe is trained anew under each condition, to see whether the information is still there linearly. Selectivity is
    accuracy minus that of a control task (Hewitt & Liang 2019). Intervals: bootstrap over test sentences, paired with
    the first condition. Raises UserError if too few words fit into the model.
    """
    treebank = [*train, *test]
    words = words_of(reader, treebank)
    in_train = words.sentence < len(train)
    if min(in_train.sum(), (~in_train).sum()) < FEWEST:
        raise UserError(f"fewer than {FEWEST} words of the treebank fit into the model: nothing can be probed")
    tasks = tasks_of(treebank, words, in_train)
    tasks = {key: task for key, task in tasks.items() if len(set(in_train[task.first])) == 2}  # has both splits
    word_states = states(subject, words, conditions, batch_size)
    right = _right_by_probe(tasks, word_states, in_train)
    draws = np.random.default_rng(0).multinomial(len(test), np.full(len(test), 1 / len(test)), RESAMPLES)
    clean = next(iter(word_states))

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
        features="standardised; label: both words' states; edge: both and their product",
        classifier=f"ridge regression on one-hot classes, penalty {RIDGE:g}",
        words=WordCounts(train=int(in_train.sum()), test=int((~in_train).sum())),
        left_out=sum(len(sentence.words) for sentence in treebank) - len(words.index),
        majority={key: _accuracy_of_commonest(task, in_train) for key, task in tasks.items()},
        conditions=[
            LinearCondition(name=name, tasks={key: probes_of(name, key) for key in tasks}) for name in word_states
        ],
    )


def _right_by_probe(
    tasks: Mapping[str, Task], word_states: Mapping[str, Tensor], in_train: np.ndarray
) -> dict[tuple[str, str, int], np.ndarray]:
    """Returns `right_of` for every condition, task and tap; `word_states` come from `states`, the clean model first."""
    clean_name, clean = next(iter(word_states.items()))
    right: dict[tuple[str, str, int], np.ndarray] = {}
    with tqdm(total=len(word_states) * len(tasks) * len(clean), desc="probes", disable=None, leave=False) as bar:
        for name, taps in word_states.items():
            for key, task in tasks.items():
                for i in range(len(clean)):
                    if name != clean_name and torch.equal(taps[i], clean[i]):  # the very same states
                        right[name, key, i] = right[clean_name, key, i]
                    else:
                        x = taps[i].numpy()
                        features = FEATURES[key](x[task.first], None if task.second is None else x[task.second])
                        right[name, key, i] = right_of(task, features, in_train[task.first])
                    bar.update()
    return right


def _accuracy_of_commonest(task: Task, in_train: np.ndarray) -> float:
    """Returns the accuracy on the test words of the commonest answer among the training words."""
    commonest = np.bincount(task.label[in_train[task.first]]).argmax()
    return float((task.label[~in_train[task.first]] == commonest).mean())


def _selectivity(right: np.ndarray, clean: np.ndarray, sentence: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    """Returns the numbers of a Selectivity from what is right of test examples (K, 2): in the task, in its control."""
    sums = lambda values: np.bincount(sentence, values, minlength=draws.shape[1])
    n = sums(np.ones(len(sentence)))

    def rate(values: np.ndarray) -> tuple[float, list[float]]:
        totals = sums(values)
        low, high = np.quantile((draws @ totals) / np.maximum(draws @ n, 1), (0.025, 0.975))
        return float(totals.sum() / n.sum()), [float(low), float(high)]

    selectivity, clean_selectivity = right[:, 0] - right[:, 1], clean[:, 0] - clean[:, 1]
    rows = {
        ("accuracy", "ci95"): right[:, 0],
        ("control_accuracy", None): right[:, 1],
        ("selectivity", "selectivity_ci95"): selectivity,
        ("change", "change_ci95"): selectivity - clean_selectivity,
        ("accuracy_change", "accuracy_change_ci95"): right[:, 0] - clean[:, 0],
    }
    entry: dict[str, Any] = {}
    for (name, ci95_name), values in rows.items():
        value, ci95 = rate(values)
        entry |= {name: value} | ({ci95_name: ci95} if ci95_name else {})
    return entry
