"""Do sinks need spikes, do spikes need sinks? Only what lies downstream of an edit is judged, and only if it took.

Remove spikes and look at sinks: a sink is judged if an earlier layer's spike on the same token was edited. Remove sinks
and look at spikes: a spike is judged if it begins where a removed sink can have reached it, through tokens that see the
sink's key and the layers after. What lies upstream stays by construction, and says nothing.

1. Were they removed? Of the edited ones, at most REMOVED may be left. A sink is left if it is one by the rule; a spike
   if its entry is as large as the rule asks, or its token a spike anywhere from the edit on, with a tenth of |h| or
   more. An edit of the size of a state (SIZES) leaves it if its norm is twice the usual. Else "not removed".
2. How much went? `lost`: the share of its alpha that a judged sink loses, or of its |h| that a judged spike loses, in
   the mean over all of them; a gain counts as 100% at most. And how much more that is than under each control (paired,
   bootstrap over sequences).
3. "yes": more than NEEDED lost, and more than MARGIN beyond every control, intervals included. "no": less than MARGIN
   lost, or a gain, and not clearly more than MARGIN beyond any control. "partly": between, and more than MARGIN beyond
   every control. Else "cannot tell". A control of the same size counts only if its dose is within a factor of two.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..measure import metrics
from ..measure.findings import Interval
from ..measure.observe import state_key
from ..models.subject import Subject
from .clean_pass import AtTap, CleanPass
from .findings import Cause, CauseControl, Lost
from .interventions import Edit

ASKED = {"spike": "sinks", "bos": "sinks", "sink": "spikes"}  # of an intervention's kind, what is asked for
CAUSES = ("spike_zero", "spike_scale", "bos_ffn", "sink_mask")
# Of these, what becomes of the sinks downstream is counted. Only CAUSES get a verdict: the random direction of
# spike_direction disturbs every other feature too, so that in planted models with half of their sinks by the spike it
# said "yes"
EXPOSING = ("spike_zero", "spike_scale", "spike_mean", "spike_direction", "bos_ffn")
SIZES = ("spike_scale",)
SIZED, FACTOR = ("same_energy", "same_mass"), 2.0  # controls of the same size, and how far off their dose may be
REMOVED, SMALL = 0.1, 0.1
NEEDED, MARGIN = 0.5, 0.1
ENOUGH = 10  # sequences with something to judge: with fewer, an interval over sequences is none
MOST = 2.0  # times as much: what a gain counts as, at most
# what is counted of every sequence; share: the sum of the shares that are left
SUMS = ("edited", "still", "judged", "left", "share")


def seams_after(subject: Subject) -> list[list[int]]:
    """Of every tap, the attention seams that read the stream there first; of a decoder's attention to an encoder, the
    last tap."""
    places = [(tap.layer, tap.kind) for tap in subject.streams]
    found: list[list[int]] = [[] for _ in places]
    for i, seam in enumerate(subject.attends):
        here = [at for at, place in enumerate(places) if place in ((seam.layer, seam.kind), (seam.layer, "block"))]
        found[here[0] - 1 if here and subject.part != "cross" else -1].append(i)
    return found


def reach(clean: CleanPass, edit: Edit) -> list[Tensor]:
    """At every tap, the tokens whose state an edit can have changed: bool (B, T). By what sees what, not by values."""
    subject, found = clean.subject, []
    now = torch.zeros_like(clean.at[0].marked)
    before: list[int] = []  # the seams between the last tap and this one
    for i, seams in enumerate(seams_after(subject)):
        for s in before if subject.part != "cross" else ():
            sees = visible(clean, s)  # (queries, keys)
            of_key = edit.keys[s].any(1) if s in edit.keys else torch.zeros_like(now)
            spares = getattr(clean.calls[s].module, "spares_own", True)  # a sink's own query, but for encoders
            others = sees & ~torch.eye(len(sees), dtype=torch.bool) if spares else sees
            now = now | (now.float() @ sees.T.float() > 0) | (of_key.float() @ others.T.float() > 0)
        now = now | edit.tokens[i] if i in edit.tokens else now
        found.append(now)
        before = seams
    return found


def visible(clean: CleanPass, seam: int) -> Tensor:
    """Which keys each query of a seam sees: bool (queries, keys), on the CPU."""
    call = clean.calls[seam]
    queries, keys = call.q.size(-2), call.k.size(-2)
    sees = call.module.seen(0, queries, keys).cpu()
    return sees.tril() if clean.subject.causal else sees


class Judged:
    """What is judged under an edit on one batch: bool, a tensor for each tap or seam.

    `written` (B, T) at a tap: tokens whose spikes were edited there or before, and were to be removed; `keys` (B, H, T)
    at a seam: sinks that were. `spikes` (B, T) and `sinks` (B, H, T) are those downstream. `of_size`: it is an edit of
    the size of states.
    """

    def __init__(self, clean: CleanPass, edit: Edit, asked: str, of_size: bool = False) -> None:
        subject = clean.subject
        self.clean, self.of_size = clean, of_size
        none = torch.zeros_like(clean.at[0].marked)
        self.written, self.spikes = ([none] * len(clean.at) for _ in range(2))
        self.keys, self.sinks = ([torch.zeros_like(found) for found in clean.sinks] for _ in range(2))
        attended = subject.attended_taps
        if asked == "sinks":
            written = none
            for i, after in enumerate(seams_after(subject)):
                marked = clean.at[i].marked
                written = written | (edit.tokens[i] & marked) if i in edit.tokens else written
                if i in attended:
                    self.written[i] = written
                for s in after:
                    self.sinks[s] = clean.sinks[s] & written[:, None]
        else:
            self.keys = [edit.keys.get(s, found) for s, found in enumerate(self.keys)]
            held = live = none
            for i, reached in enumerate(reach(clean, edit)):
                now = clean.at[i].held | clean.at[i].marked
                live = (live & now) | (now & ~held & reached)  # a spike goes on through the stream: where it begins
                held = now
                if i in attended:
                    self.spikes[i] = clean.at[i].marked & live

    def positions(self) -> Iterator[tuple[int, int]]:
        """(number within the batch, position) of every token that is judged, once."""
        found = [*self.spikes, *(sinks.any(1) for sinks in self.sinks)]
        yield from torch.stack(found).any(0).nonzero().tolist()

    def count_tap(self, i: int, now: AtTap) -> Tensor:
        """What is at tap i: SUMS, (B, 5)."""
        was, written, judged = self.clean.at[i], self.written[i], self.spikes[i]
        edited = written & was.marked
        large = now.large & (now.entry > SMALL * was.entry)
        still = (edited & large) | (written & now.marked & (now.magnitude > SMALL * was.magnitude))
        if self.of_size:
            still = edited & (now.norm > 2 * was.norm.median(1, keepdim=True).values)
        left = judged * (now.magnitude / was.magnitude.clamp_min(1e-30)).clamp_max(MOST)
        return torch.stack([n.double().sum(1) for n in (edited, still, judged, judged & now.marked, left)], dim=1)

    def count_seam(self, i: int, sinks: Tensor, alpha: Tensor) -> Tensor:
        """What is there at seam i, in sinks and alpha (B, H, T): SUMS, (B, 5)."""
        edited, judged = self.keys[i], self.sinks[i]
        left = judged * (alpha / self.clean.alpha[i].clamp_min(1e-30)).clamp_max(MOST)
        return torch.stack([n.double().sum((1, 2)) for n in (edited, edited & sinks, judged, judged & sinks, left)], 1)

    def states(self) -> set[Hashable]:
        """The states of the tokens that are judged, by what they depend on: equal first tokens are one."""
        clean, subject = self.clean, self.clean.subject
        seen = clean.ids if subject.part == "cross" else subject.stream_ids(clean.ids)
        return {state_key(subject, int(clean.numbers[n]), t, int(seen[n, t])) for n, t in self.positions()}


# ----------------------------------------------------------------------------------------------- the verdict


def matches(control: str, dose: float, wanted: float) -> bool:
    """Whether a control counts: of the same size only if its dose is, within a FACTOR, what is `wanted`."""
    return control not in SIZED or wanted / FACTOR <= dose <= wanted * FACTOR


def cause(
    name: str, asked: str, edited: int, states: int, real: Tensor, controls: Mapping[str, Tensor], there: Tensor
) -> Cause:
    """What follows from SUMS (N, 5) under an intervention that `edited` something, and under its controls.

    `there` (N,): how many there are of what is `asked` for; `states`: of how many different tokens the judged ones are.
    """
    sums = dict(zip(SUMS, real.sum(0).tolist(), strict=True))
    some = real[:, SUMS.index("judged")] > 0
    lost, n = lost_of(real[some]), int(some.sum())
    beside = [
        CauseControl(name=control, lost=lost_of(of[some]), beyond=lost_of(real[some], of[some]))
        for control, of in controls.items()
    ]
    verdict, reason = needs(edited, sums, n, lost, beside, asked)
    if not there.any():
        verdict, reason = "cannot tell", f"there are no {asked}"
    return Cause(
        by=name,
        removed="spikes" if asked == "sinks" else "sinks",
        asked=asked,
        there=int(there.sum()),
        **{key: int(sums[key]) for key in ("edited", "still", "judged", "left")},
        sequences=n,
        states=states,
        lost=lost,
        control=beside,
        verdict=verdict,
        reason=reason,
    )


def lost_of(real: Tensor, control: Tensor | None = None) -> Lost:
    """The mean share that the judged ones lose, in SUMS (n, 5); with a `control`, how much more than under it."""
    judged, share = SUMS.index("judged"), SUMS.index("share")
    if not len(real):
        return Lost(share=None, ci95=None)
    whole = real[:, judged] if control is None else control[:, share]
    mean = lambda i: ((whole[i] - real[i, share]).sum() / real[i, judged].sum()).item()
    return Lost(share=mean(torch.arange(len(real))), ci95=metrics.bootstrap_ci(mean, len(real)))


def needs(
    edited: int, sums: Mapping[str, float], n: int, lost: Lost, controls: Sequence[CauseControl], asked: str
) -> tuple[str, str]:
    """(the verdict on whether what is `asked` for needs what was removed, its reason), by the rules above."""
    removed = {"sinks": "spike", "spikes": "sink"}[asked]
    if not edited:
        return "cannot tell", "there is nothing to edit"
    if not sums["edited"]:
        return "cannot tell", f"there is no {removed} where it edits"
    if not sums["judged"]:
        return "out of reach", f"no {asked[:-1]} lies downstream of a {removed} that was removed"
    if sums["still"] > REMOVED * sums["edited"]:
        return "not removed", f"{sums['still'] / sums['edited']:.0%} of the {removed}s are still there"
    if n < ENOUGH or lost.ci95 is None:
        return (
            "cannot tell",
            f"{n} {'sequence has' if n == 1 else 'sequences have'} something to judge; {ENOUGH} are needed",
        )
    beyond = {control.name: control.beyond.ci95 for control in controls}
    known = [ci for ci in beyond.values() if ci]
    if not known or len(known) < len(beyond):
        return "cannot tell", "no control is matched, or one has no loss"
    (low, high), above = lost.ci95, min(ci[0] for ci in known) > MARGIN
    if above and low > NEEDED:
        return "yes", f"more than {NEEDED:.0%} is lost, and {MARGIN:.0%} beyond every control"
    if high < MARGIN and all(ci[0] <= MARGIN for ci in known):
        return "no", f"less than {MARGIN:.0%} is lost, not clearly more beyond any control"
    if above and low > MARGIN and high < NEEDED:
        return "partly", f"between {MARGIN:.0%} and {NEEDED:.0%} is lost, and {MARGIN:.0%} beyond every control"
    return "cannot tell", undecided(n, lost.ci95, {name: ci for name, ci in beyond.items() if ci})


def undecided(n: int, lost: Interval, beyond: Mapping[str, Interval]) -> str:
    """Why no verdict is reached: a control stands in the way, whatever n; or an interval holds a bound of the rule, and
    so many sequences would narrow it."""
    for name, (low, high) in beyond.items():
        if lost[1] < MARGIN and low > MARGIN:
            return f"little is lost, but under {name} there is a gain"
        if lost[0] > MARGIN and high < MARGIN:
            return f"{name} takes about as much"
    wanted = []
    bounds = [(lost, MARGIN), (lost, NEEDED), *((ci, MARGIN) for ci in beyond.values())]
    for (low, high), bound in bounds:
        if low <= bound <= high:
            wanted.append(n * ((high - low) / 2 / max(abs((low + high) / 2 - bound), 0.01)) ** 2)
    enough = max(n + 1, round(max(wanted, default=0.0), -1))
    return f"an interval holds a bound of the rule: about {enough:,.0f} sequences would decide"
