"""What becomes of a run whose terminal is closed, or whose output cannot be written."""
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from run_process import at_step, finish, signal_self

from util.run.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


def close_terminal():
    """Amid epoch 1: nothing can be written any more, and a signal says why."""
    reader, writer = os.pipe()
    os.close(reader)
    for number in (1, 2):
        os.dup2(writer, number)
    signal_self(signal.SIGHUP)


def test_closed_terminal_saves_and_ends_the_run(tmp_path):
    finish("pretrain_bns", tmp_path / "run", "--epochs", 9, "--save_freq", 9, save_every=60.0,
           code=128 + signal.SIGHUP, prepare=functools.partial(at_step, 1, 0, close_terminal))
    saved, = (tmp_path / "run").glob("checkpoint-*.pth")
    assert load_checkpoint(saved)["epoch"] == 1


def ignore_hangups():
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(1, 0, functools.partial(signal_self, signal.SIGHUP))


def test_run_under_nohup_goes_on(tmp_path):
    output = finish("pretrain_bns", tmp_path / "run", "--epochs", 3, prepare=ignore_hangups)
    assert "epoch 2  train_loss" in output


@pytest.mark.parametrize("redirection", ["| head -n 1", ">&- 2>&-"])
def test_run_whose_output_cannot_be_written_goes_on(redirection, tmp_path):
    folder = tmp_path / "run"
    flags = [*TINY, "--epochs", "1", "--batch_size", "256", "--output_dir", str(folder)]
    command = f"{sys.executable} main_cifar10_pretrain_bns.py {' '.join(flags)} {redirection}"
    end = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Error" not in end.stderr and (folder / "pretrain_bns_cifar10_if100.pth").exists()
