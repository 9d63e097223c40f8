"""SIGTERM and Ctrl-C as a request: the loop finishes its step, saves and leaves."""
import os
import signal


class Interrupted(Exception):
    """The run was asked to stop by signal `signum` and has saved what it had; the message says how to go on."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


class StopSignal:
    """While entered, the first SIGTERM or SIGINT only sets `signum`; the second ends the process at once."""

    def __init__(self):
        self.signum = None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum, _frame):
        self.signum = signum
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
        # not `print`, which fails where the signal comes amid another print
        os.write(1, f"\n{signal.Signals(signum).name}: stopping after this step (once more: at once)\n".encode())
