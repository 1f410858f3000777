"""Ctrl-C and the signals of schedulers and closing terminals, as exceptions that wait for the end of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_IGNORABLE = (signal.SIG_DFL, signal.default_int_handler)  # whoever has set anything else, such as nohup, means it


class _Stops:
    """The handlers of this process, in place while any run goes on: a second signal does not wait."""

    def __init__(self) -> None:
        self.runs, self.busy, self.waiting, self.came = 0, False, 0, 0
        self.before: dict[int, signal._HANDLER] = {}

    def handle(self, number: int, frame: object) -> None:
        """Keep the first signal of a step; raise else."""
        if self.busy and not self.waiting:
            self.waiting = number
        else:
            self.stop(number)

    def stop(self, number: int) -> None:
        """End as the signal asks: exit code 130, 143, 129."""
        self.came = number
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


_stops = _Stops()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn the signals into exceptions while a run goes on, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _stops.runs:
        _stops.came = 0
        _stops.before = {n: signal.getsignal(n) for n in _STOPS if signal.getsignal(n) in _IGNORABLE}
        for number in _stops.before:
            signal.signal(number, _stops.handle)
    _stops.runs += 1
    try:
        yield
    finally:
        _stops.runs -= 1
        if not _stops.runs:
            for number, handler in _stops.before.items():
                signal.signal(number, handler)


def stopped_by() -> str:
    """The signal that ends the runs, or nothing."""
    return signal.Signals(_stops.came).name if _stops.came else ""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a signal wait until the `with` block is done."""
    _stops.busy = True
    try:
        yield
    finally:
        _stops.busy, waiting, _stops.waiting = False, _stops.waiting, 0
    if waiting:
        _stops.stop(waiting)
