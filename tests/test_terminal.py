"""What becomes of a run whose terminal is closed, or whose output cannot be written."""
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from run_process import Run, at_step, finish, signal_self

from util.run.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]


class Terminal:
    """A terminal; `name` is what a process opens to be in it."""

    def __init__(self):
        self.ours, self.theirs = os.openpty()
        self.name, self.text = os.ttyname(self.theirs), ""
        os.set_blocking(self.ours, False)

    def shows(self, text):
        try:
            self.text += os.read(self.ours, 2**16).decode()
        except BlockingIOError:  # nothing new
            pass
        return text in self.text

    def close(self):
        os.close(self.theirs)
        os.close(self.ours)


def move_into(name):
    """Make the terminal this process's own."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # the first that a session opens becomes its own
    for number in (0, 1, 2):
        os.dup2(terminal, number)


@pytest.mark.slow
def test_closed_terminal_saves_and_ends_the_run(tmp_path):
    terminal = Terminal()
    run = Run("pretrain_bns", tmp_path / "run", "--epochs", 10000, "--save_freq", 10000, save_every=60.0,
              prepare=functools.partial(move_into, terminal.name))
    assert run.wait_until(lambda: terminal.shows("epoch 2  train_loss"))
    terminal.close()
    assert run.end() == 128 + signal.SIGHUP
    saved, = (tmp_path / "run").glob("checkpoint-*.pth")
    assert load_checkpoint(saved)["epoch"] >= 2


def ignore_hangups():
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(1, 0, functools.partial(signal_self, signal.SIGHUP))


@pytest.mark.slow
def test_run_under_nohup_goes_on(tmp_path):
    output = finish("pretrain_bns", tmp_path / "run", "--epochs", 3, prepare=ignore_hangups)
    assert "epoch 2  train_loss" in output and "stopping" not in output


def lose_terminal(name):
    """The terminal is closed, and no signal says so, as for a run that its shell has disowned."""
    move_into(name)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.slow
def test_run_whose_terminal_has_gone_goes_on_in_silence(tmp_path):
    terminal = Terminal()
    run = Run("pretrain_bns", tmp_path / "run", "--epochs", 6, prepare=functools.partial(lose_terminal, terminal.name))
    assert run.wait_until(lambda: terminal.shows("epoch 1  train_loss"))
    terminal.close()
    assert run.end() == 0 and (tmp_path / "run" / "pretrain_bns_cifar10_if100.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["| head -n 1", ">&- 2>&-"])
def test_run_whose_output_cannot_be_written_goes_on(redirection, tmp_path):
    folder = tmp_path / "run"
    flags = [*TINY, "--epochs", "1", "--batch_size", "256", "--output_dir", str(folder)]
    command = f"{sys.executable} main_cifar10_pretrain_bns.py {' '.join(flags)} {redirection}"
    end = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Error" not in end.stderr and (folder / "pretrain_bns_cifar10_if100.pth").exists()
