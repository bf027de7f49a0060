"""A SIGTERM or Ctrl-C that ends a run after its step."""

import ctypes
import os
import signal
import sys

import torch
from accelerate import Accelerator


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Termination:
    """Notices SIGTERM, as clusters send it before they kill, and Ctrl-C, in place of dying of it.

    From construction to `close`. ``requested`` tells, after each step, whether any process got one, so that all stop
    at the same step. A second Ctrl-C ends the step at once, as if it were the first.
    """

    def __init__(self):
        self._received: set[int] = set()
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self) -> None:
        """Back to what the signals did before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, signum, frame) -> None:
        if signum == signal.SIGINT and signum in self._received:
            self.close()
            raise KeyboardInterrupt
        self._received.add(signum)

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any process has been told to end; all processes must ask at the same point."""
        flag = torch.tensor(float(bool(self._received)), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum") > 0)


def follow_launcher() -> None:
    """Get a SIGTERM when `accelerate launch` ends before this process, as it does of one; on Linux.

    It does not pass a SIGTERM on: without this, the training would go on alone, and hold its folder.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # it sets this one
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def ignore_termination(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: a signal to the whole group must not take the data from the last step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
