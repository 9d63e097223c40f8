"""Runs of the scripts in processes of their own: started, watched, stopped, and compared to the last bit."""
import importlib
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import TINY, draw_few
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import util.run
from util.batches import EpochBatches
from util.run.checkpoint import load_checkpoint
from util.run.options import launch
from util.toy_data import ToyCIFAR

STAGES = ("pretrain_bns", "lineprob_bns", "finetune_ipdpp")
FLAGS = [*TINY, "--save_freq", "3", "--keep_checkpoints", "2"]
# Of the 127 images of `draw_few`, 5 steps an epoch in stage 1, and 3 of the 58 that the other stages draw.
DRAW = ["--batch_size", "20", "--num_samples", "10", "--eval_freq", "2"]
STAGE_FLAGS = {"pretrain_bns": ["--batch_size", "24"], "lineprob_bns": DRAW,
               "finetune_ipdpp": [*DRAW, "--sampling_freq", "2"]}
BEGUN = "steps an epoch"  # printed just before the first step
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what it takes back, which is what it should do
# The server imports everything once, and every run is a fork of it that has the modules but no threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["run_process", "main_cifar10_finetune_ipdpp", "main_cifar10_lineprob_bns",
                               "main_cifar10_pretrain_bns", "matplotlib.backends.backend_agg"])
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # where the server looks for them


def run_script(stage, flags, console, save_every=0.0, largest_file=-1, few=True, environment=None, prepare=None):
    """The body of a run's process: the command line main_cifar10_<stage>.py <flags>, its output appended to a file."""
    with open(console, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    os.environ.update(environment or {})
    util.run.SAVE_EVERY = save_every
    if few:
        ToyCIFAR.__init__ = draw_few
    if prepare:
        prepare()
    sys.argv = [f"main_cifar10_{stage}.py", *flags]
    script = importlib.import_module(f"main_cifar10_{stage}")
    launch(script.main, script.get_args_parser())


def all_flags(stage, folder, flags):
    return [*FLAGS, *STAGE_FLAGS[stage], "--output_dir", str(folder), *map(str, flags)]


class Run:
    """One process that runs the script of `stage` for the run in `folder`.

    Args:
        save_every: stands in for SAVE_EVERY of util.run.
        largest_file: bytes that the process may write to one file, -1 for any number.
        few: draw the few toy images of conftest, not all.
        environment: dict of variables, as a launcher of several processes sets them.
        prepare: called in the process before the script.
    """

    def __init__(self, stage, folder, *flags, environment=None, **settings):
        self.folder = Path(folder)
        self.console = Path(f"{folder}.console{(environment or {}).get('RANK_OF_TEST', '')}")
        self.started = time.time_ns()
        self.said_before = self.console.stat().st_size if self.console.exists() else 0
        self.process = SERVER.Process(
            target=run_script, args=(stage, all_flags(stage, folder, flags), self.console),
            kwargs={"environment": environment, **settings}, daemon=True)
        self.process.start()

    def writes(self, pattern=".*.pth.tmp"):
        """Whether this run is writing a checkpoint right now, or was when it was killed."""
        try:
            return any(path.stat().st_mtime_ns > self.started for path in self.folder.glob(pattern))
        except FileNotFoundError:  # renamed just now
            return False

    def has_written(self):
        """Whether this run has written a checkpoint."""
        return self.writes("*.pth")

    def wait_until(self, condition, timeout=120):
        """Wait for `condition()` or the run's end; whether it is still running."""
        end = time.monotonic() + timeout
        while not condition() and self.process.is_alive():
            assert time.monotonic() < end, self.output()
            time.sleep(0.0005)
        return self.process.is_alive()

    def output(self):
        """What this run, not one before it in the same folder, has printed."""
        return self.console.read_bytes()[self.said_before:].decode() if self.console.exists() else ""

    def says(self, text):
        return text in self.output()

    def kill(self, signum=signal.SIGKILL):
        os.kill(self.process.pid, signum)
        return self.end()

    def end(self, timeout=120):
        """Wait for the run's end and return its exit code."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running\n{self.output()}"
        return self.process.exitcode


def finish(stage, folder, *flags, code=0, **settings):
    """Run to the end, which must have this exit code; what the run printed."""
    run = Run(stage, folder, *flags, **settings)
    assert run.end() == code, run.output()
    return run.output()


def at_step(epoch, step, action):
    """Have this process call `action()` before it trains on a batch, numbered from 0, of an epoch after the first."""
    original = EpochBatches.__iter__

    def watched(self):
        for number, batch in enumerate(original(self)):
            if (self.epoch, number) == (epoch, step):
                action()
            yield batch
    EpochBatches.__iter__ = watched


def signal_self(*signums, pause=0.0):
    """Send signals to this process, `pause` seconds after one another."""
    for number, signum in enumerate(signums):
        time.sleep(pause if number else 0.0)
        os.kill(os.getpid(), signum)


def tensorboard(folder):
    """Sorted (tag, step, value) of all of TensorBoard's scalars, but for what no two runs share."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    of_the_machine = ("train/images_per_second", "train/peak_memory_gib")
    return sorted((tag, event.step, 0.0 if tag in of_the_machine else event.value)
                  for tag in events.Tags()["scalars"] for event in events.Scalars(tag))


def differences(folder, reference, stage):
    """What differs between two finished runs, as a list of words; empty where they are the same to the last bit."""
    one, two = (load_checkpoint(Path(run) / f"{stage}_cifar10_if100.pth") for run in (folder, reference))
    parts = ("model", "optimizer", "scaler", "epoch", "history", "subset")
    found = [f"{name} of the final checkpoint" for name in parts if not identical(one[name], two[name])]
    if (Path(folder) / "log.txt").read_bytes() != (Path(reference) / "log.txt").read_bytes():
        found.append("log.txt")
    if tensorboard(folder) != tensorboard(reference):
        found.append("TensorBoard's scalars")  # a picture is drawn after the checkpoint, and may be missing
    return found


def identical(one, two):
    """Whether two nested structures of tensors and plain values are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(identical(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(identical, one, two))
    return one == two


def kill_and_resume(stage, folder, extractor, kills, epochs, rng):
    """Compare a run killed `kills` times with one left alone, both in `folder`. Returns differences, kills landed.

    The kills come, in turn, during start-up, amid the writing of a checkpoint, and in an epoch after that, at moments
    of the random.Random `rng`. extractor: file that the run starts from, or None.
    """
    reference, killed = Path(folder) / f"{stage}_reference", Path(folder) / f"{stage}_killed"
    start = ["--resume", extractor] if extractor else []
    again = ["--epochs", epochs, "--resume", "auto", *start[1:]]
    finish(stage, Path(folder) / f"{stage}_warm_up", "--epochs", 1)
    run = Run(stage, reference, "--epochs", epochs, *start)
    run.wait_until(lambda: run.says(BEGUN))
    startup = (time.time_ns() - run.started) / 1e9
    assert run.end() == 0, run.output()
    epoch = ((time.time_ns() - run.started) / 1e9 - startup) / epochs

    landed = writing = 0
    for number in range(kills):
        run = Run(stage, killed, *again)
        alive = wait_for_the_moment(run, ("start-up", "writing", "training")[number % 3], startup, epoch, rng)
        landed += alive and run.kill() == -signal.SIGKILL
        writing += run.writes()
    last = Run(stage, killed, *again)
    assert last.end() == 0, last.output()
    found = differences(killed, reference, stage)
    resumed = last.console.read_text().count("continuing ")
    print(f"{stage}: {epochs} epochs, killed {landed} times, {writing} of them amid a write, continued from a "
          f"checkpoint {resumed} times: " + (f"DIFFERENT: {', '.join(found)}" if found else "identical"), flush=True)
    return found, landed


def wait_for_the_moment(run, phase, startup, epoch, rng):
    """Wait for a moment of the phase in which `run` is to be killed; whether it still runs then.

    startup, epoch: seconds that these take.
    """
    if phase == "training":
        run.wait_until(run.has_written)
    elif phase == "writing":
        run.wait_until(lambda: run.says(BEGUN))
    moment = time.monotonic() + rng.uniform(0, startup if phase == "start-up" else epoch)
    alive = run.wait_until(lambda: time.monotonic() > moment)
    if alive and phase == "writing":
        alive = run.wait_until(run.writes)
    return alive
