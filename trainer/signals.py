"""Signals that ask a run to stop, and which all ranks take notice of at the same step."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType

import torch

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopSignals:
    """Remembers which of SIGNALS asked this process to stop after the step that it is at.

    `received`: its name, or None. A second Ctrl-C or SIGTERM ends the process at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within, the signals come here."""
        before = {name: signal.signal(getattr(signal, name), self.receive) for name in SIGNALS}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """What Python calls at a signal."""
        self.received = signal.Signals(number).name
        if number != signal.SIGUSR1:
            signal.signal(number, signal.default_int_handler)

    def votes(self, device: torch.device) -> torch.Tensor:
        """(3,): 1 for the signal that this rank received. Summed over the ranks, they are `elected` from."""
        return torch.tensor([float(name == self.received) for name in SIGNALS], device=device)

    @staticmethod
    def elected(votes: Sequence[float]) -> str | None:
        """The name of the first signal that a rank received, or None."""
        return next((name for name, ranks in zip(SIGNALS, votes, strict=True) if ranks), None)
