"""Signals that ask a run to stop. All ranks stop at the same step."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType

import torch

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopSignals:
    """Records which of SIGNALS asked this process to stop after the current step. `received`: the name of the signal,
    or None. A second Ctrl-C or SIGTERM ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals within the block."""
        handlers = {name: signal.signal(getattr(signal, name), self.receive) for name in SIGNALS}
        try:
            yield
        finally:
            for name, handler in handlers.items():
                signal.signal(getattr(signal, name), handler)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Python calls this when a signal arrives."""
        self.received = signal.Signals(number).name
        if number != signal.SIGUSR1:
            signal.signal(number, signal.default_int_handler)

    def votes(self, device: torch.device) -> torch.Tensor:
        """(3,), with 1 for the signal that this rank received. `elected` takes the sum over the ranks."""
        return torch.tensor([float(name == self.received) for name in SIGNALS], device=device)

    @staticmethod
    def elected(votes: Sequence[float]) -> str | None:
        """The first signal of SIGNALS that any rank received, or None."""
        return next((name for name, ranks in zip(SIGNALS, votes, strict=True) if ranks), None)
