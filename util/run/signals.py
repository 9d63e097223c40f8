"""Ctrl-C, SIGTERM and a closed terminal end a run after its current epoch."""
import os
import signal
import time
from contextlib import suppress


class StopSignal:
    """Remembers SIGTERM, Ctrl-C or SIGHUP (a closed terminal) in `signum`. The run leaves after the current epoch.

    Another one, a second or more later, ends the process at once. (Ctrl-C under torchrun arrives twice, from the
    terminal and from torchrun, so signals within a second count as one.) `restore` undoes this.
    """

    def __init__(self):
        self.signum, self.came_at = None, 0.0
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum, _frame):
        if self.signum is not None and time.monotonic() - self.came_at >= 1:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if self.signum is None:
            self.signum, self.came_at = signum, time.monotonic()
            name = signal.Signals(signum).name
            # Not `print`, which fails where it interrupts another print. The terminal may be gone.
            with suppress(OSError):
                os.write(1, f"\n{name}: stopping after this epoch (once more: at once)\n".encode())
