"""Kill a run again and again, resume it each time, and compare its end with that of a run left alone.

    python tests/kill_resume.py --kills 20 --stage all

Every kill is a SIGKILL at a random moment: in turn during start-up, amid the writing of a checkpoint, and in an epoch
after that. Takes a few minutes on the CPU. Exit code 1: weights, optimiser state, log.txt or TensorBoard differ.
"""
import argparse
import importlib
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from util import run_folder
from util.checkpoint import load_checkpoint
from util.options import launch
from util.toy_data import ToyCIFAR

TRAINING = "steps an epoch"  # printed just before the first step
STAGES = ("pretrain_bns", "lineprob_bns", "finetune_ipdpp")
FLAGS = ["--toy_data", "--model", "test_resnet", "--input_size", "16", "--device", "cpu",
         "--save_freq", "3", "--keep_checkpoints", "2"]
STAGE_FLAGS = {"pretrain_bns": ["--batch_size", "48"], "lineprob_bns": ["--batch_size", "20", "--num_samples", "10"],
               "finetune_ipdpp": ["--batch_size", "20", "--num_samples", "10", "--sampling_freq", "2"]}
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what it takes back, which is what it should do
# The server imports everything once, and every run is a fork of it that has the modules but no threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["engine", EventAccumulator.__module__, "matplotlib.backends.backend_agg"])


class FewImages(ToyCIFAR):
    """Every fifth toy image: 248 for training, of every class at least one, and 200 for testing."""

    def __init__(self, *args):
        super().__init__(*args)
        self.data, self.targets = self.data[::5], self.targets[::5]
        self.class_counts = torch.tensor(self.targets).bincount().numpy()


def run_script(stage, flags, console, latest_every, largest_file, environment, prepare):
    """The body of a run's process: the command line main_cifar10_<stage>.py <flags>, its output appended to a file."""
    with open(console, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    os.environ.update(environment)
    engine.ToyCIFAR, engine.EVAL_BATCH, run_folder.LATEST_EVERY = FewImages, 30, latest_every
    prepare()
    sys.argv = [f"main_cifar10_{stage}.py", *flags]
    script = importlib.import_module(f"main_cifar10_{stage}")
    launch(script.main, script.get_args_parser())


class Run:
    """One process that runs the script of `stage` for the run in `folder`.

    Args:
        latest_every: stands in for LATEST_EVERY of util.run_folder.
        largest_file: bytes that the process may write to one file, -1 for any number.
        environment: dict of variables, as a launcher of several processes sets them.
        prepare: called in the process before the script.
    """

    def __init__(self, stage, folder, *flags, latest_every=0.0, largest_file=-1, environment={}, prepare=dict):
        self.folder, self.console = Path(folder), Path(f"{folder}.console{environment.get('RANK', '')}")
        self.started = time.time_ns()
        self.said_before = self.console.stat().st_size if self.console.exists() else 0
        flags = [*FLAGS, *STAGE_FLAGS[stage], "--output_dir", str(folder), *map(str, flags)]
        self.process = SERVER.Process(target=run_script, args=(
            stage, flags, self.console, latest_every, largest_file, environment, prepare), daemon=True)
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
            assert time.monotonic() < end, self.console.read_text()
            time.sleep(0.0005)
        return self.process.is_alive()

    def says(self, text):
        """Whether this run, not one before it in the same folder, has printed `text`."""
        return self.console.exists() and text in self.console.read_text()[self.said_before:]

    def send(self, signum):
        os.kill(self.process.pid, signum)

    def kill(self, signum):
        self.send(signum)
        return self.end()

    def end(self, timeout=120):
        """Wait for the run's end and return its exit code."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running\n{self.console.read_text()}"
        return self.process.exitcode


def tensorboard(folder):
    """(tag, step, value) of all that TensorBoard shows, but for what no two runs share; images by their size."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    points = [(tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
              if not tag.startswith("final/")]
    points = [(tag, step, None if tag in ("train/images_per_second", "train/peak_memory_gib") else value)
              for tag, step, value in points]
    return points + [(tag, image.step, len(image.encoded_image_string))
                     for tag in events.Tags()["images"] for image in events.Images(tag)]


def differences(folder, reference, stage):
    """What differs between two finished runs, as a list of words; empty where they are the same to the last bit."""
    one, two = (load_checkpoint(Path(run) / f"{stage}_cifar10_if100.pth") for run in (folder, reference))
    parts = ("model", "optimizer", "scaler", "epoch", "history", "subset")
    found = [f"{name} of the final checkpoint" for name in parts if not identical(one[name], two[name])]
    if (Path(folder) / "log.txt").read_bytes() != (Path(reference) / "log.txt").read_bytes():
        found.append("log.txt")
    if sorted(tensorboard(folder), key=str) != sorted(tensorboard(reference), key=str):
        found.append("TensorBoard")
    return found


def identical(one, two):
    """Whether two nested structures of tensors and plain values are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(identical(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(identical, one, two))
    return one == two


def kill_and_resume(stage, folder, extractor, kills, epochs, rng):
    """Compare a run killed `kills` times with one left alone, both in `folder`. Returns differences, kills landed."""
    reference, killed = Path(folder) / f"{stage}_reference", Path(folder) / f"{stage}_killed"
    flags, source = ["--epochs", epochs], [extractor] if extractor else []
    assert Run(stage, Path(folder) / f"{stage}_warm_up", "--epochs", 1).end() == 0
    run = Run(stage, reference, *flags, *["--resume"][:len(source)], *source)
    run.wait_until(lambda: run.says(TRAINING))
    startup = (time.time_ns() - run.started) / 1e9
    assert run.end() == 0, run.console.read_text()
    epoch = ((time.time_ns() - run.started) / 1e9 - startup) / epochs

    landed = writing = 0
    for number in range(kills):
        run = Run(stage, killed, *flags, "--resume", "auto", *source)
        phase = ("start-up", "writing", "training")[number % 3]
        if phase == "training":
            run.wait_until(run.has_written)
        elif phase == "writing":
            run.wait_until(lambda: run.says(TRAINING))
        moment = time.monotonic() + rng.uniform(0, startup if phase == "start-up" else epoch)
        alive = run.wait_until(lambda: time.monotonic() > moment)
        if alive and phase == "writing":
            alive = run.wait_until(run.writes)
        landed += alive and run.kill(signal.SIGKILL) == -signal.SIGKILL
        writing += run.writes()
    last = Run(stage, killed, *flags, "--resume", "auto", *source)
    assert last.end() == 0, last.console.read_text()
    found = differences(killed, reference, stage)
    resumed = last.console.read_text().count("; continuing ")
    print(f"{stage}: {epochs} epochs, killed {landed} times, {writing} of them amid a write, continued from a "
          f"checkpoint {resumed} times: " + (f"DIFFERENT: {', '.join(found)}" if found else "identical"), flush=True)
    return found, landed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per stage")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    rng, found = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        extractor = Path(folder) / "extractor" / "pretrain_bns_cifar10_if100.pth"
        if args.stage != "pretrain_bns":
            assert Run("pretrain_bns", extractor.parent, "--epochs", 1).end() == 0
        for stage in STAGES if args.stage == "all" else [args.stage]:
            source = None if stage == "pretrain_bns" else extractor
            different, landed = kill_and_resume(stage, folder, source, args.kills, args.epochs, rng)
            found += different + ["too few kills: try more --epochs"] * (landed < args.kills)
    print("verdict:", "; ".join(found) if found else "weights, optimiser, log.txt and TensorBoard are the same to the "
          "last bit as without kills")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
