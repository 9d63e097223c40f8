"""A stage's training for measurements: made of the parts of its script, done a few steps at a time, and timed."""

import ctypes
import gc
import itertools
import sys
import time
from pathlib import Path
from statistics import median

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_augment import bytes_in  # noqa: E402

import main_cifar10_finetune_ipdpp  # noqa: E402
import main_cifar10_pretrain_bns  # noqa: E402
from engine import load_data, train_one_epoch  # noqa: E402
from models import BNSNetwork, Classifier, create_encoder  # noqa: E402
from util.augment import SimCLRAugment  # noqa: E402
from util.batches import DeviceLoader, to_device  # noqa: E402
from util.bns_loss import BNSLoss  # noqa: E402
from util.run import Run  # noqa: E402

SCRIPTS = {1: main_cifar10_pretrain_bns, 2: main_cifar10_finetune_ipdpp}
VIEWS = {1: 2, 2: 1}  # of each image in a step


class MarkedAugment(SimCLRAugment):
    """Names its operations in a profile, where they would look like any others."""

    def apply(self, images, parameters):
        with torch.profiler.record_function("augmentation"):
            return super().apply(images, parameters)


def prepare(stage, flags, steps):
    """Training of stage 1 or 2 by the flags of its CIFAR-10 script: a function that does the given number of steps.

    Every call is an epoch of its own, in train_one_epoch. `steps` is for the first line that it prints.
    """
    args = SCRIPTS[stage].get_args_parser().parse_args(["--imbalanced_factor", "1", *flags])
    run = Run(args)
    images, labels = to_device(load_data(run)[0], run.device)
    encoder = create_encoder(args.model, args.input_size)
    if stage == 1:
        model, criterion = BNSNetwork(encoder, args.embed_dim), BNSLoss(args.temperature, args.bns_form)
    else:
        model, criterion = Classifier(encoder, args.num_classes), torch.nn.CrossEntropyLoss()
    model.to(run.device, memory_format=torch.channels_last)
    augment = MarkedAugment(args.input_size, args.jitter_strength)
    loader = DeviceLoader(images, labels, augment, run.processes, args.batch_size, args.seed,
                          views_per_image=VIEWS[stage], drop_last=True)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), betas=(0.9, 0.95), fused=True)
    scheduler = CosineLRScheduler(optimizer, t_initial=1000, t_in_epochs=False)
    network = run.begin(model, optimizer, steps)
    run.stop.restore()  # Ctrl-C ends a benchmark at once
    epochs = itertools.count()

    def train(steps):
        epoch = next(epochs)
        batches = loader.epoch(epoch, torch.arange(steps * args.batch_size) % len(images))
        train_one_epoch(network, criterion, batches, optimizer, scheduler, epoch, run)
    return train


def wait(device):
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


class Meter:
    """Seconds of a step and peak memory of a training, from several blocks of steps after one to warm up.

    Peak memory is what this process's resident set grows by from here on, or the peak of CUDA's allocator.
    """

    def __init__(self, device, steps, blocks):
        self.device, self.steps, self.blocks = device, steps, blocks
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what earlier trainings freed goes back to the system
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
            self.before = bytes_in("VmRSS")

    def measure(self, train):
        """`train(number)` does that many steps. Returns (median seconds of a step, bytes)."""
        seconds = []
        for _ in range(self.blocks + 1):
            start = time.perf_counter()
            train(self.steps)
            wait(self.device)
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else bytes_in("VmHWM") - self.before
        return median(seconds[1:]) / self.steps, peak
