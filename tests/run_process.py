"""Runs of the scripts in processes of their own: started, watched, stopped, and compared to the last bit."""
import importlib
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from conftest import STAGES, TINY, draw_few, scalars

import util.run
from util.batches import DeviceLoader
from util.run.checkpoint import load_checkpoint
from util.run.options import launch
from util.toy_data import ToyCIFAR

FLAGS = [*TINY, "--save_freq", "3", "--keep_checkpoints", "2"]
# Of the 127 images of `draw_few`, 5 steps an epoch in stage 1, and 3 of the 58 that the other stages draw.
DRAW = ["--batch_size", "20", "--num_samples", "10", "--eval_freq", "2"]
STAGE_FLAGS = {"pretrain_bns": ["--batch_size", "24"], "lineprob_bns": DRAW,
               "finetune_ipdpp": [*DRAW, "--sampling_freq", "2"]}
BEGUN = "steps an epoch"  # printed just before the first step
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what it takes back, which is what it should do
# The server imports everything once, and every run is a fork of it that has the modules but no threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["run_process", *(f"main_cifar10_{stage}" for stage in STAGES)])
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # where the server looks for them


def run_script(stage, flags, console, save_every=0.0, largest_file=-1, environment=None, prepare=None):
    """The body of a run's process: the command line main_cifar10_<stage>.py <flags>, its output appended to a file.

    Args:
        save_every: stands in for SAVE_EVERY of util.run.
        largest_file: bytes that the process may write to one file, -1 for any number.
        environment: dict of variables, as a launcher of several processes sets them.
        prepare: called before the script.
    """
    with open(console, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    os.environ.update(environment or {})
    util.run.SAVE_EVERY = save_every
    ToyCIFAR.__init__ = draw_few
    if prepare:
        prepare()
    sys.argv = [f"main_cifar10_{stage}.py", *flags]
    script = importlib.import_module(f"main_cifar10_{stage}")
    launch(script.main, script.get_args_parser())


def all_flags(stage, folder, flags):
    return [*FLAGS, *STAGE_FLAGS[stage], "--output_dir", str(folder), *map(str, flags)]


class Run:
    """One process that runs the script of `stage` for the run in `folder`. settings: arguments of `run_script`."""

    def __init__(self, stage, folder, *flags, environment=None, **settings):
        self.folder = Path(folder)
        self.console = Path(f"{folder}.console{(environment or {}).get('RANK', '')}")
        self.started = time.time_ns()
        self.said_before = self.console.stat().st_size if self.console.exists() else 0
        self.process = SERVER.Process(
            target=run_script, args=(stage, all_flags(stage, folder, flags), self.console),
            kwargs={"environment": environment, **settings}, daemon=True)
        self.process.start()

    def has_written(self, pattern="*.pth"):
        """Whether this run has written a checkpoint or, by the pattern of temporary files, writes one right now."""
        try:
            return any(path.stat().st_mtime_ns > self.started for path in self.folder.glob(pattern))
        except FileNotFoundError:  # renamed just now
            return False

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

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        return self.end()

    def end(self, timeout=120):
        """Wait for the run's end and return its exit code."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running\n{self.output()}"
        return self.process.exitcode


def pair(stage, folder, *flags, **settings):
    """Two processes of one run, the first first, with the environment of torchrun."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [Run(stage, folder, *flags, environment={**shared, "RANK": rank, "LOCAL_RANK": rank}, **settings)
            for rank in ("0", "1")]


def outputs(*runs, code=0):
    """Run to the end, which must have this exit code; what each has printed."""
    for run in runs:
        assert run.end() == code, run.output()
    return [run.output() for run in runs]


def finish(stage, folder, *flags, code=0, **settings):
    """As `outputs`, of a run of one process."""
    return outputs(Run(stage, folder, *flags, **settings), code=code)[0]


def at_step(epoch, step, action):
    """Have this process call `action()` before it trains on a batch, numbered from 0, of an epoch after the first."""
    original = DeviceLoader.epoch

    def watched(self, number_of_epoch, subset):
        for number, batch in enumerate(original(self, number_of_epoch, subset)):
            if (number_of_epoch, number) == (epoch, step):
                action()
            yield batch
    DeviceLoader.epoch = watched


def signal_self(*signums, pause=0.0):
    """Send signals to this process, `pause` seconds after one another."""
    for number, signum in enumerate(signums):
        time.sleep(pause if number else 0.0)
        os.kill(os.getpid(), signum)


def differences(folder, reference, stage):
    """What differs between two finished runs, as a list of words; empty where they are the same to the last bit."""
    one, two = (load_checkpoint(Path(run) / f"{stage}_cifar10_if100.pth") for run in (folder, reference))
    parts = ("model", "optimizer", "scaler", "epoch", "history", "subset")
    found = [f"{name} of the final checkpoint" for name in parts if not identical(one[name], two[name])]
    if (Path(folder) / "log.txt").read_bytes() != (Path(reference) / "log.txt").read_bytes():
        found.append("log.txt")
    curves = [scalars(run) for run in (folder, reference)]
    for points in curves:  # what no two runs share
        del points["train/images_per_second"]
    if curves[0] != curves[1]:
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
    reference, killed = (Path(folder) / f"{stage}_{name}" for name in ("reference", "killed"))
    start = [extractor] if extractor else []

    def begin(run_folder):
        return Run(stage, run_folder, "--epochs", epochs, "--resume", "auto", *start)

    finish(stage, Path(folder) / f"{stage}_warm_up", "--epochs", 1)
    began = time.monotonic()
    run = begin(reference)
    run.wait_until(lambda: BEGUN in run.output())
    startup = time.monotonic() - began
    outputs(run)
    epoch = (time.monotonic() - began - startup) / epochs

    landed = 0
    for number in range(kills):
        run, phase = begin(killed), ("start-up", "writing", "training")[number % 3]
        if phase != "start-up":
            run.wait_until(run.has_written if phase == "training" else lambda run=run: BEGUN in run.output())
        moment = time.monotonic() + rng.uniform(0, startup if phase == "start-up" else epoch)
        alive = run.wait_until(lambda moment=moment: time.monotonic() > moment)
        if alive and phase == "writing":
            alive = run.wait_until(lambda run=run: run.has_written(".*.pth.tmp"))
        landed += alive and run.kill() == -signal.SIGKILL
    outputs(begin(killed))
    return differences(killed, reference, stage), landed
