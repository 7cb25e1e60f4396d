"""Ctrl-C and SIGTERM, which schedulers send: the first asks a run to stop, a second one stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def handled_by(handler: Callable) -> Iterator[None]:
    """Call `handler` for both signals. Elsewhere than in the main thread Python has no signals, and nothing changes."""
    ours = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in NUMBERS if ours}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that holds the number of the first signal once it has come. The second one raises KeyboardInterrupt."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    with handled_by(ask), answered_at_once(b"\nstopping after this step (press again to stop now)\n"):
        yield asked


@contextlib.contextmanager
def answered_at_once(answer: bytes) -> Iterator[None]:
    """Write `answer` to stderr when the first of the signals comes.

    Python runs a handler only between two of its own instructions, and a backward pass is one instruction that may take
    minutes. So a thread answers: Python writes the signal's number into a socket right away, and the thread reads it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)

    def wait() -> None:
        while number := ours.recv(1):  # nothing comes once the other end is closed
            if number[0] in NUMBERS:
                os.write(2, answer)
                return

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        pythons.close()
        thread.join()
        ours.close()
