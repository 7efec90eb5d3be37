"""Do sinks need spikes, do spikes need sinks? Only what lies downstream of an edit is judged, and only if it took.

Remove spikes and look at sinks: a sink is judged if an earlier layer's spike on the same token was edited. Remove sinks
and look at spikes: a spike is judged if it first stands where a removed sink can have reached it, through tokens that
see the sink's key and the layers after. What lies upstream stays by construction, and says nothing.

1. Were they removed? Of the edited ones, at most REMOVED may be left. A sink is left if it is one by the rule; a spike
   if its entry is as large as the rule asks, or its token a spike anywhere from the edit on, with a tenth of |h| or
   more. Else "not removed".
2. How much went? `lost`: the share of the judged sinks' alpha, or of the judged spikes' |h|, that the edit takes; and
   how much more than each control takes (paired, bootstrap over sequences).
3. "yes": more than NEEDED lost, and more than MARGIN beyond every control, intervals included. "no": less than MARGIN
   lost, and not clearly more than MARGIN beyond any control. "partly": between, and more than MARGIN beyond every
   control. Else "cannot tell".
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..measure import metrics
from ..measure.findings import Interval
from ..measure.observe import state_at
from ..models.subject import Subject
from .clean_pass import CleanPass
from .findings import Cause, CauseControl, Lost
from .interventions import Edit

ASKED = {"spike": "sinks", "bos": "sinks", "sink": "spikes"}  # of an intervention's kind, what is asked for
# spike_direction is not among them: its random direction disturbs every other feature too, so that in planted models
# with half of their sinks by the spike it said "yes"
CAUSES = ("spike_zero", "spike_scale", "bos_ffn", "sink_mask")
REMOVED, SMALL = 0.1, 0.1
NEEDED, MARGIN = 0.5, 0.1
ENOUGH = 10  # sequences with something to judge: with fewer, an interval over sequences is none
SUMS = ("edited", "still", "judged", "left", "before", "after")  # what is counted of every sequence


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
    now = torch.zeros_like(clean.marked[0])
    before: list[int] = []  # the seams between the last tap and this one
    for i, seams in enumerate(seams_after(subject)):
        for s in before if subject.part != "cross" else ():
            sees = visible(clean, s)  # (queries, keys)
            of_key = edit.keys[s].any(1) if s in edit.keys else torch.zeros_like(now)
            others = sees & ~torch.eye(len(sees), dtype=torch.bool)  # a sink's own query is spared
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
    """What is judged under an edit on one batch: per tap and per seam, bool; None where nothing is.

    `edited_tokens` (B, T) at a tap, or `edited_keys` (B, H, T) at a seam, were to be removed; `written` (B, T): tokens
    edited there or before; `spikes` (B, T) and `sinks` (B, H, T) are those downstream.
    """

    def __init__(self, clean: CleanPass, edit: Edit, asked: str) -> None:
        subject = clean.subject
        self.clean = clean
        taps, seams = len(subject.streams), len(subject.attends)
        self.edited_tokens: list[Tensor | None] = [None] * taps
        self.written: list[Tensor | None] = [None] * taps
        self.spikes: list[Tensor | None] = [None] * taps
        self.edited_keys: list[Tensor | None] = [None] * seams
        self.sinks: list[Tensor | None] = [None] * seams
        attended = range(taps)[subject.attended]
        if asked == "sinks":
            written = torch.zeros_like(clean.marked[0])
            for i, after in enumerate(seams_after(subject)):
                written = written | edit.tokens[i] if i in edit.tokens else written
                if i in attended:
                    self.edited_tokens[i], self.written[i] = clean.marked[i] & written, written
                for s in after:
                    self.sinks[s] = clean.sinks[s] & written[:, None]
        else:
            self.edited_keys = [edit.keys.get(s) for s in range(seams)]
            last = run = torch.zeros_like(clean.marked[0])
            for i, reached in enumerate(reach(clean, edit)):
                if i in attended:  # a spike goes on through the stream: where it starts is what counts
                    run = clean.marked[i] & reached & (run | ~last)
                    self.spikes[i], last = run, clean.marked[i]

    def positions(self) -> Iterator[tuple[int, int]]:
        """(number within the batch, position) of every token that is judged, once."""
        of_taps = [found for found in self.spikes if found is not None]
        of_seams = [found.any(1) for found in self.sinks if found is not None]
        yield from torch.stack(of_taps + of_seams).any(0).nonzero().tolist() if of_taps or of_seams else ()

    def count_tap(self, i: int, marked: Tensor, magnitude: Tensor, entry: Tensor) -> Tensor:
        """What is there at tap i, in spike tokens, in every token's largest |h|, and in |h| of what is its largest
        entry in the clean model, (B, T) each: SUMS, (B, 6)."""
        clean, none = self.clean.magnitude[i], torch.zeros_like(marked)
        of_tap = (self.edited_tokens[i], self.written[i], self.spikes[i])
        edited, written, judged = (none if found is None else found for found in of_tap)
        large = (entry >= self.clean.threshold[i]) & (entry > SMALL * clean)
        still = (edited & large) | (written & marked & (magnitude > SMALL * clean))
        counts = (edited, still, judged, judged & marked, judged * clean, judged * magnitude)
        return torch.stack([count.double().sum(1) for count in counts], dim=1)

    def count_seam(self, i: int, sinks: Tensor, alpha: Tensor) -> Tensor:
        """What is there at seam i, in sinks and alpha (B, H, T): SUMS, (B, 6)."""
        none = torch.zeros_like(sinks)
        edited, judged = (none if found is None else found for found in (self.edited_keys[i], self.sinks[i]))
        counts = (edited, edited & sinks, judged, judged & sinks, judged * self.clean.alpha[i], judged * alpha)
        return torch.stack([count.double().sum((1, 2)) for count in counts], dim=1)

    def states(self) -> set[Hashable]:
        """The states of the tokens that are judged, by what they depend on: equal first tokens are one."""
        clean, subject = self.clean, self.clean.subject
        seen = clean.ids if subject.part == "cross" else subject.seen(clean.ids)
        return {state_at(subject, int(clean.numbers[n]), t, int(seen[n, t])) for n, t in self.positions()}


# ----------------------------------------------------------------------------------------------- the verdict


def cause(
    name: str, asked: str, edited: int, states: int, real: Tensor, controls: Mapping[str, Tensor], there: Tensor
) -> Cause:
    """What follows from SUMS (N, 6) under an intervention that `edited` something, and under its controls.

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
    """The share of what is judged that is lost, in SUMS (n, 6); with a `control`, how much more than under it."""
    before, after = SUMS.index("before"), SUMS.index("after")
    if not len(real):
        return Lost(share=None, ci95=None)
    gone = real[:, after] if control is None else real[:, after] - control[:, after]
    whole = 1.0 if control is None else 0.0
    share = lambda i: (whole - gone[i].sum() / real[i, before].sum()).item()
    return Lost(share=share(torch.arange(len(real))), ci95=metrics.bootstrap_ci(share, len(real)))


def needs(
    edited: int, sums: Mapping[str, float], n: int, lost: Lost, controls: Sequence[CauseControl], asked: str
) -> tuple[str, str]:
    """(the verdict on whether what is `asked` for needs what was removed, its reason), by the rules above."""
    removed = {"sinks": "spike", "spikes": "sink"}[asked]
    if not edited or not sums["edited"]:
        return "cannot tell", f"there is no {removed} to remove"
    if not sums["judged"]:
        return "out of reach", f"no {asked[:-1]} lies downstream of a {removed} that was removed"
    if sums["still"] > REMOVED * sums["edited"]:
        return "not removed", f"{sums['still'] / sums['edited']:.0%} of the {removed}s are still there"
    if n < ENOUGH or lost.ci95 is None:
        return (
            "cannot tell",
            f"{n} {'sequence has' if n == 1 else 'sequences have'} something to judge; {ENOUGH} are needed",
        )
    if not controls:
        return "cannot tell", "no control had anything to edit"
    beyond = [control.beyond.ci95 for control in controls if control.beyond.ci95]
    low, high = lost.ci95
    above, below = min(ci[0] for ci in beyond) > MARGIN, all(ci[0] <= MARGIN for ci in beyond)
    if above and low > NEEDED:
        return "yes", f"more than {NEEDED:.0%} is lost, and {MARGIN:.0%} beyond every control"
    if high < MARGIN and below:
        return "no", f"less than {MARGIN:.0%} is lost, not clearly more beyond any control"
    if above and low > MARGIN and high < NEEDED:
        return "partly", f"between {MARGIN:.0%} and {NEEDED:.0%} is lost, and {MARGIN:.0%} beyond every control"
    return "cannot tell", undecided(n, [lost.ci95, *beyond])


def undecided(n: int, intervals: Sequence[Interval]) -> str:
    """Why no verdict is reached: an interval that holds a bound, and the sequences that would narrow it; or values that
    no more sequences would change."""
    wanted = []
    for low, high in intervals:
        middle = (low + high) / 2
        bound = min((MARGIN, NEEDED), key=lambda b: abs(b - middle))
        if low <= bound <= high:
            wanted.append(n * ((high - low) / 2 / max(abs(middle - bound), 0.01)) ** 2)
    if wanted:
        enough = max(n + 1, round(max(wanted), -1))
        return f"an interval holds a bound of the rule: about {enough:,.0f} sequences would decide"
    return "a control takes about as much"
