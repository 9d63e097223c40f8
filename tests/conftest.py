"""What several test files share: few toy images, runs of the scripts in this process, a pickle that must never run."""
import functools
import importlib
import os
import signal
import sys
from types import SimpleNamespace

# Two threads make tiny models several times slower where other processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from util.run.options import launch  # noqa: E402
from util.toy_data import ToyCIFAR  # noqa: E402

STAGES = ("pretrain_bns", "lineprob_bns", "finetune_ipdpp")
PRETRAIN, LINEPROB, FINETUNE = (f"main_cifar10_{stage}" for stage in STAGES)
TINY = ["--toy_data", "--model", "test_resnet", "--input_size", "16", "--device", "cpu", "--amp", "none"]
DRAW_ALL = ToyCIFAR.__init__


def pytest_configure():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # runs inherit it, and heed it unless nohup had it ignored


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not `item.keywords`, which hold the names of folders too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def cifar_root():
    """Folder with the original CIFAR-10 and CIFAR-100, named by the environment variable CIFAR_ROOT."""
    if not os.environ.get("CIFAR_ROOT"):
        pytest.skip("CIFAR_ROOT names no folder with real CIFAR")
    return os.environ["CIFAR_ROOT"]


@functools.cache
def few_of(*args, **kwargs):
    """The attributes of a ToyCIFAR of every tenth image of a class: of 10 classes 127 for training, 100 for testing."""
    toy = object.__new__(ToyCIFAR)
    DRAW_ALL(toy, *args, **kwargs)
    targets = np.array(toy.targets)
    kept = np.concatenate([np.flatnonzero(targets == c)[::10] for c in range(len(toy.classes))])
    toy.data, toy.targets = toy.data[kept], targets[kept].tolist()
    toy.class_counts = np.bincount(toy.targets)
    if len(toy.classes) == 10:
        toy.shot_thresholds = (5, 2)
    return vars(toy)


def draw_few(self, *args, **kwargs):
    """Stands in for ToyCIFAR.__init__."""
    vars(self).update(few_of(*args, **kwargs))


@pytest.fixture
def few_images(monkeypatch):
    """The toy data of the runs of a test are few."""
    monkeypatch.setattr(ToyCIFAR, "__init__", draw_few)


def load(script):
    """The module of a script; `script` may be it already."""
    return importlib.import_module(script) if isinstance(script, str) else script


def run(script, output_dir, *flags):
    """What `main` of a script (module or its name) returns for the flags of TINY and `flags`."""
    flags = [*TINY, "--output_dir", output_dir, *flags]
    return load(script).main(load(script).get_args_parser().parse_args([str(flag) for flag in flags]))


def final_file(script, output_dir):
    return output_dir / f"{load(script).get_args_parser().get_default('stage')}_cifar10_if100.pth"


def scalars(folder):
    """TensorBoard's curves: dict from tag to (step, value) of each point."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def one_of(world_size, rank=0):
    """Stands in for Processes: one of several that exchange nothing."""
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"), sum=lambda tensor: tensor)


def command_line(name, *flags):
    """Run `python name.py flags` in this process; the code it exits with."""
    script, before = load(name), sys.argv
    sys.argv = [f"{name}.py", *map(str, flags)]
    try:
        launch(script.main, script.get_args_parser())
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def contents(folder):
    """The bytes of all files below `folder` but locks, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


class Payload:
    """Unpickled by anything but weights_only=True, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)
