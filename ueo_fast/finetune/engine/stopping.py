"""Signals that end a process, held back until what was learnt is saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from ueo_fast.finetune.data.loader import STOPPING

_SAID = b"\nstopping after this step; the same signal again stops at once\n"


class HeldSignals:
    """A block in which the first signal of :data:`STOPPING` only sets :attr:`pending`.

    :meth:`deliver` lets it do what it would have done. A second one does that at once. Signals that
    are ignored stay ignored, the handlers of before are back after the block, and in a thread that
    is not the main one, which gets no signals, nothing is done at all.

    Args:
        active: ``False`` leaves the signals alone.

    Attributes:
        pending: the signal that came, or ``None``.
    """

    def __init__(self, active: bool) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self.pending: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> HeldSignals:
        if self._active:
            for number in STOPPING:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: of a library in C
                    self._before[number] = before
                    signal.signal(number, self._hold)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._restore()
        if error is None:
            self.deliver()

    def deliver(self) -> None:
        """Let a signal that is pending do what it does without this block.

        Mostly that raises ``KeyboardInterrupt`` or ends the process; where it does not, the block
        goes on.
        """
        if self.pending is not None:
            number, self.pending = self.pending, None
            before = self._before[number]
            if callable(before):
                before(number, None)
            else:
                signal.signal(number, before)
                signal.raise_signal(number)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            self._restore()
            signal.raise_signal(number)
            return
        self.pending = number
        # Not print: the signal may have come while something was printed.
        if sys.stderr is not None:
            with suppress(OSError, ValueError, AttributeError):
                os.write(sys.stderr.fileno(), _SAID)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
