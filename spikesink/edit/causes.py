"""Do sinks need spikes, and do spikes need sinks?

We remove one and look at the other. Only what lies downstream of an edit is judged, because what lies upstream cannot
change. We remove spikes and look at sinks: a sink is judged if an earlier layer's spike on the same token was edited.
We remove sinks and look at spikes: a spike is judged if it begins where the removed sink's effect can arrive, that is
at tokens that see the sink's key, and in the layers after them.

1. Did the removal work? Of what was edited, at most REMOVED may remain; else the verdict is "not removed". A sink
   remains if the rule still calls it one. A spike remains if its entry is as large as the rule asks, or if its token
   has a spike anywhere from the edit on, with a tenth of the old |h| or more. After an edit of the size of states
   (SIZES), a spike remains if the norm of its token is more than twice the usual one. Such an edit cannot tell anything
   if a norm undoes it, as in post-norm models: if what the model computes moves by less than UNDONE of what it moves by
   under the control of the same size.
2. How much was lost? `lost` is the share of its alpha that a judged sink loses, or of its |h| that a judged spike
   loses, averaged over all of them; a gain counts as 100% at most. We also compute how much more that is than under
   each control (paired, bootstrap over sequences).
3. The verdict is "yes" if more than NEEDED is lost, and more than MARGIN beyond every control, intervals included. It
   is "no" if less than MARGIN is lost, or there is a gain, and the loss is not clearly more than MARGIN beyond any
   control. It is "partly" if the loss lies between, and is more than MARGIN beyond every control. Otherwise it is
   "cannot tell". A control of the same size counts only if its dose is within a factor of two.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..measure import metrics
from ..measure.findings import Interval
from ..measure.observe import state_key
from ..models.subject import Subject
from .clean_pass import CleanPass, TapState
from .findings import Cause, CauseControl, Lost
from .interventions import Edit

ASKED = {"spike": "sinks", "bos": "sinks", "sink": "spikes"}  # intervention's kind -> what we look at after it
CAUSES = ("spike_zero", "spike_scale", "bos_ffn", "sink_mask")
# For these we count what happens to the sinks downstream. Only CAUSES get a verdict: spike_direction's random direction
# disturbs every other feature too, and said "yes" in planted models in which the spike makes only half of the sinks.
EXPOSING = ("spike_zero", "spike_scale", "spike_mean", "spike_direction", "bos_ffn")
SIZES = ("spike_scale",)
SIZED, FACTOR = ("same_energy", "same_mass"), 2.0  # controls of the same size, and how far off their dose may be
REMOVED, SMALL, UNDONE = 0.1, 0.1, 1e-3
NEEDED, MARGIN = 0.5, 0.1
ENOUGH = 10  # sequences with something to judge; with fewer, we do not trust an interval over sequences
MOST = 2.0  # a gain counts as at most this multiple of the old value
# what we count in every sequence; share: the sum of the remaining shares
SUMS = ("edited", "still", "judged", "left", "share")


def seams_after(subject: Subject) -> list[list[int]]:
    """Returns, for every tap, the attention seams that read the stream there first. All seams of a decoder's attention
    to an encoder belong to the last tap."""
    places = [(tap.layer, tap.kind) for tap in subject.streams]
    readers: list[list[int]] = [[] for _ in places]
    for s, seam in enumerate(subject.attends):
        own = [i for i, place in enumerate(places) if place in ((seam.layer, seam.kind), (seam.layer, "block"))]
        readers[own[0] - 1 if own and subject.part != "cross" else -1].append(s)
    return readers


def reach(clean: CleanPass, edit: Edit) -> list[Tensor]:
    """Returns, for every tap, the tokens whose state an edit can have changed: bool (B, T). Values do not count,
    only which tokens see which."""
    subject, reached = clean.subject, []
    tokens = torch.zeros_like(clean.tap_states[0].marked)
    crossed: list[int] = []  # the seams between the last tap and this one
    for i, seams in enumerate(seams_after(subject)):
        for s in crossed if subject.part != "cross" else ():
            sees = visible(clean, s)  # (queries, keys)
            keys = edit.keys[s].any(1) if s in edit.keys else torch.zeros_like(tokens)
            spares = getattr(clean.calls[s].module, "spares_own", True)  # a sink's own query, but for encoders
            others = sees & ~torch.eye(len(sees), dtype=torch.bool) if spares else sees
            tokens = tokens | (tokens.float() @ sees.T.float() > 0) | (keys.float() @ others.T.float() > 0)
        tokens = tokens | edit.tokens[i] if i in edit.tokens else tokens
        reached.append(tokens)
        crossed = seams
    return reached


def visible(clean: CleanPass, seam: int) -> Tensor:
    """Returns which keys each query of a seam sees: bool (queries, keys), on the CPU."""
    call = clean.calls[seam]
    queries, keys = call.q.size(-2), call.k.size(-2)
    sees = call.module.seen(0, queries, keys).cpu()
    return sees.tril() if clean.subject.causal else sees


class Judged:
    """The spikes and sinks that are judged under an edit of one batch: bool, one tensor for each tap or seam.

    What was to be removed: `written` (B, T) at a tap has the tokens whose spikes were edited there or before, `keys`
    (B, H, T) at a seam the sinks. What lies downstream: `spikes` (B, T) and `sinks` (B, H, T). `resized`: whether the
    edit changes the size of whole states.
    """

    def __init__(self, clean: CleanPass, edit: Edit, asked: str, resized: bool = False) -> None:
        subject = clean.subject
        self.clean, self.resized = clean, resized
        empty = torch.zeros_like(clean.tap_states[0].marked)
        self.written, self.spikes = ([empty] * len(clean.tap_states) for _ in range(2))
        self.keys, self.sinks = ([torch.zeros_like(sinks) for sinks in clean.sinks] for _ in range(2))
        attended = subject.attended_taps
        if asked == "sinks":
            written = empty
            for i, seams in enumerate(seams_after(subject)):
                marked = clean.tap_states[i].marked
                written = written | (edit.tokens[i] & marked) if i in edit.tokens else written
                if i in attended:
                    self.written[i] = written
                for s in seams:
                    self.sinks[s] = clean.sinks[s] & written[:, None]
        else:
            self.keys = [edit.keys.get(s, keys) for s, keys in enumerate(self.keys)]
            previous = live = empty
            for i, reached in enumerate(reach(clean, edit)):
                large = clean.tap_states[i].half_spike | clean.tap_states[i].marked
                # a spike goes on along the stream, so what counts is where it begins
                live = (live & large) | (large & ~previous & reached)
                previous = large
                if i in attended:
                    self.spikes[i] = clean.tap_states[i].marked & live

    def positions(self) -> Iterator[tuple[int, int]]:
        """Yields (number within the batch, position) of every judged token once."""
        tokens = [*self.spikes, *(sinks.any(1) for sinks in self.sinks)]
        yield from torch.stack(tokens).any(0).nonzero().tolist()

    def count_tap(self, i: int, edited: TapState) -> Tensor:
        """Counts SUMS at tap i, whose state under the edit is `edited`: (B, 5)."""
        clean, written, judged = self.clean.tap_states[i], self.written[i], self.spikes[i]
        spikes = written & clean.marked
        large = edited.large & (edited.entry > SMALL * clean.entry)
        still = (spikes & large) | (written & edited.marked & (edited.magnitude > SMALL * clean.magnitude))
        if self.resized:
            still = spikes & (edited.norm > 2 * clean.norm.median(1, keepdim=True).values)
        share = judged * (edited.magnitude / clean.magnitude.clamp_min(1e-30)).clamp_max(MOST)
        return torch.stack([n.double().sum(1) for n in (spikes, still, judged, judged & edited.marked, share)], dim=1)

    def count_seam(self, i: int, sinks: Tensor, alpha: Tensor) -> Tensor:
        """Counts SUMS at seam i from sinks and alpha (B, H, T) under the edit: (B, 5)."""
        keys, judged = self.keys[i], self.sinks[i]
        share = judged * (alpha / self.clean.alpha[i].clamp_min(1e-30)).clamp_max(MOST)
        return torch.stack([n.double().sum((1, 2)) for n in (keys, keys & sinks, judged, judged & sinks, share)], 1)

    def states(self) -> set[Hashable]:
        """Returns the different states of the judged tokens; equal first tokens of sequences have one state."""
        clean, subject = self.clean, self.clean.subject
        ids = clean.ids if subject.part == "cross" else subject.stream_ids(clean.ids)
        return {state_key(subject, int(clean.numbers[n]), t, int(ids[n, t])) for n, t in self.positions()}


# ----------------------------------------------------------------------------------------------- the verdict


def matches(control: str, dose: float, target: float) -> bool:
    """Whether a control counts: one of the same size does only if its dose is within a FACTOR of the `target`."""
    return control not in SIZED or target / FACTOR <= dose <= target * FACTOR


def cause(
    name: str,
    asked: str,
    edited: int,
    states: int,
    sums: Tensor,
    controls: Mapping[str, Tensor],
    present: Tensor,
    undone: bool = False,
) -> Cause:
    """Returns the verdict from SUMS (N, 5) under an intervention that `edited` something, and under its controls.

    `present` (N,): how many of the `asked` there are; `states`: how many different states the judged tokens have;
    `undone`: whether a norm undoes the edit.
    """
    totals = dict(zip(SUMS, sums.sum(0).tolist(), strict=True))
    judged = sums[:, SUMS.index("judged")] > 0
    lost, n = lost_of(sums[judged]), int(judged.sum())
    compared = [
        CauseControl(name=control, lost=lost_of(other[judged]), beyond=lost_of(sums[judged], other[judged]))
        for control, other in controls.items()
    ]
    verdict, reason = needs_verdict(edited, totals, n, lost, compared, asked)
    if not present.any():
        verdict, reason = "cannot tell", f"there are no {asked}"
    elif undone and verdict == "no":
        verdict, reason = "cannot tell", "a norm undoes this edit, so what follows stays as it was"
    return Cause(
        by=name,
        removed="spikes" if asked == "sinks" else "sinks",
        asked=asked,
        there=int(present.sum()),
        **{key: int(totals[key]) for key in ("edited", "still", "judged", "left")},
        sequences=n,
        states=states,
        lost=lost,
        control=compared,
        verdict=verdict,
        reason=reason,
    )


def lost_of(sums: Tensor, control: Tensor | None = None) -> Lost:
    """Returns the mean share lost by what is judged in SUMS (n, 5), or with a `control` how much more than under it."""
    judged, share = SUMS.index("judged"), SUMS.index("share")
    if not len(sums):
        return Lost(share=None, ci95=None)
    whole = sums[:, judged] if control is None else control[:, share]
    mean = lambda i: ((whole[i] - sums[i, share]).sum() / sums[i, judged].sum()).item()
    return Lost(share=mean(torch.arange(len(sums))), ci95=metrics.bootstrap_ci(mean, len(sums)))


def needs_verdict(
    edited: int, totals: Mapping[str, float], n: int, lost: Lost, controls: Sequence[CauseControl], asked: str
) -> tuple[str, str]:
    """Returns (the verdict on whether the `asked` need what was removed, the reason), by the rules above."""
    removed = {"sinks": "spike", "spikes": "sink"}[asked]
    if not edited:
        return "cannot tell", "there is nothing to edit"
    if not totals["edited"]:
        return "cannot tell", f"there is no {removed} where it edits"
    if not totals["judged"]:
        return "out of reach", f"no {asked[:-1]} lies downstream of a {removed} that was removed"
    if totals["still"] > REMOVED * totals["edited"]:
        return "not removed", f"{totals['still'] / totals['edited']:.0%} of the {removed}s are still there"
    if n < ENOUGH or lost.ci95 is None:
        sequences = "sequence has" if n == 1 else "sequences have"
        return "cannot tell", f"{n} {sequences} something to judge; {ENOUGH} are needed"
    beyond = {control.name: control.beyond.ci95 for control in controls}
    intervals = [ci for ci in beyond.values() if ci]
    if not intervals or len(intervals) < len(beyond):
        return "cannot tell", "no control is matched, or one has no loss"
    (low, high), above = lost.ci95, min(ci[0] for ci in intervals) > MARGIN
    if above and low > NEEDED:
        return "yes", f"more than {NEEDED:.0%} is lost, and over {MARGIN:.0%} more than under every control"
    if high < MARGIN and all(ci[0] <= MARGIN for ci in intervals):
        return "no", f"less than {MARGIN:.0%} is lost, and not clearly more than under any control"
    if above and low > MARGIN and high < NEEDED:
        lost_range = f"between {MARGIN:.0%} and {NEEDED:.0%}"
        return "partly", f"{lost_range} is lost, and over {MARGIN:.0%} more than under every control"
    return "cannot tell", undecided(n, lost.ci95, {name: ci for name, ci in beyond.items() if ci})


def undecided(n: int, lost: Interval, beyond: Mapping[str, Interval]) -> str:
    """Says why there is no verdict on n sequences. Either a control stands in the way, whatever n is; or an interval
    contains a bound of the rule, and we estimate how many sequences would narrow it enough."""
    for name, (low, high) in beyond.items():
        if lost[1] < MARGIN and low > MARGIN:
            return f"little is lost, but there is a gain under {name}"
        if lost[0] > MARGIN and high < MARGIN:
            return f"about as much is lost under {name}"
    bounds = [("lost", lost, MARGIN), ("lost", lost, NEEDED), *((name, ci, MARGIN) for name, ci in beyond.items())]
    required = [
        (n * ((high - low) / 2 / max(abs((low + high) / 2 - bound), 0.01)) ** 2, name, bound)
        for name, (low, high), bound in bounds
        if low <= bound <= high
    ]
    enough, name, bound = max(required)
    interval = f"the interval of what is lost{'' if name == 'lost' else f' beyond {name}'} contains {bound:.0%}"
    return f"{interval}: about {max(n + 1, round(enough, -1)):,.0f} such sequences would decide"
