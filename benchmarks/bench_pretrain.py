"""Images per second of whole stage-1 training steps, data included, against the plain pipeline on the same images.

    python benchmarks/bench_pretrain.py [--data_root FOLDER_OF_CIFAR-10] [--profile]

Ours is made of the parts of main_cifar10_pretrain_bns.py and trained by the engine's train_one_epoch. The plain
pipeline is what the method is usually written as: torchvision's transforms on PIL images in loader workers, contiguous
float32 (float16 on CUDA), the loss broadcast to (2N, 2N, D), AdamW, the loss read in every step. Both train a ResNet-18
with the same projector. Figures are medians of several blocks of steps after a warm-up, four minutes in all on two CPU
cores. Peak memory is what a pipeline, its data included, adds to this process's resident set (the loader's workers not
counted), or the peak of CUDA's allocator.

Then how cost grows: a step of ours by batch size, and an epoch by imbalance factor, which is that time times the steps
of an epoch of CIFAR-10-LT.
"""

import argparse
import itertools
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_augment import pil_pipeline  # noqa: E402
from bench_bns_loss import broadcast_loss  # noqa: E402
from training_steps import Meter, prepare, wait  # noqa: E402

from models import BNSNetwork, create_encoder  # noqa: E402
from util.imbalanced_cifar import ImbalanceCIFAR10, long_tailed_counts  # noqa: E402
from util.options import launch  # noqa: E402
from util.toy_data import ToyCIFAR  # noqa: E402


def training(options, batch_size, folder):
    """Our stage 1, ready to train: a function that does the given number of steps."""
    flags = ["--batch_size", str(batch_size), "--output_dir", folder, "--device", options.device, "--amp", options.amp]
    flags += ["--data_root", options.data_root] if options.data_root else ["--toy_data"]
    flags += ["--compile"] if options.compile else []
    return prepare(1, flags, options.steps)


def ours(options, batch_size):
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        meter = Meter(options.device, options.steps, options.blocks)
        return meter.measure(training(options, batch_size, folder))


class TwoViews(Dataset):
    def __init__(self, data_root):
        self.images = ImbalanceCIFAR10(data_root, 1) if data_root else ToyCIFAR(10, 1)
        self.augment = pil_pipeline(jitter_strength=2.0)

    def __len__(self):
        return len(self.images.data)

    def __getitem__(self, index):
        image = Image.fromarray(self.images.data[index])
        return self.augment(image), self.augment(image), self.images.targets[index]


def plain(options):
    """(seconds of a step, peak bytes) of the plain pipeline."""
    meter, cuda = Meter(options.device, options.steps, options.blocks), options.device == "cuda"
    torch.backends.cudnn.benchmark = True
    model = BNSNetwork(create_encoder("resnet18")).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    scaler = torch.amp.GradScaler(options.device, enabled=cuda)
    loader = DataLoader(TwoViews(options.data_root), options.batch_size, shuffle=True, drop_last=True, pin_memory=cuda,
                        num_workers=options.workers, persistent_workers=True)
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())

    def train(steps):
        for batch in itertools.islice(batches, steps):
            first, second, labels = (part.to(options.device, non_blocking=True) for part in batch)
            optimizer.zero_grad()
            with torch.autocast(options.device, torch.float16, enabled=cuda):
                loss = broadcast_loss(*model(first, second), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            loss.item()

    return meter.measure(train)


def line(name, batch_size, seconds, peak, more=""):
    print(f"{name:>6} {batch_size:6} {seconds * 1e3:11,.1f} {batch_size / seconds:10,.1f} "
          f"{2 * batch_size / seconds:10,.1f} {peak / 2**20:10,.0f} {more}", flush=True)


def profile(options):
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        train = training(options, options.batch_size, folder)
        train(options.steps)
        with torch.profiler.profile(acc_events=True) as profiler:
            train(options.steps)
            wait(options.device)
    averages = profiler.key_averages()
    print(averages.table(sort_by=f"self_{options.device}_time_total", row_limit=25, max_name_column_width=60))


def get_args_parser():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", help="folder of CIFAR-10, else toy images are drawn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--batch_size", type=int, default=1024 if cuda else 512)
    parser.add_argument("--steps", type=int, default=10 if cuda else 1, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=7 if cuda else 3, help="blocks whose median is taken")
    parser.add_argument("--workers", type=int, default=16 if cuda else 2, help="loader workers of the plain pipeline")
    parser.add_argument("--growth", type=int, nargs="*", help="batch sizes of the second part; none to leave it out",
                        default=[128, 256, 512, 1024, 2048, 4096] if cuda else [128, 256, 512])
    parser.add_argument("--amp", default="auto", help="of ours")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    parser.add_argument("--profile", action="store_true", help="print torch.profiler's table of our steps and stop")
    return parser


def main(options):
    if options.profile:
        return profile(options)

    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, {'real' if options.data_root else 'toy'} images, ResNet-18, "
          f"median of {options.blocks} blocks of {options.steps}")
    print(f"{'':6} {'batch':>6} {'ms a step':>11} {'images/s':>10} {'views/s':>10} {'peak MiB':>10}")
    plain_seconds, peak = plain(options)
    line("plain", options.batch_size, plain_seconds, peak)
    seconds, peak = ours(options, options.batch_size)
    line("ours", options.batch_size, seconds, peak)

    if options.growth:
        print(f"\nours as the batch grows{'':33} s an epoch at imbalance factor 1, 10, 100")
    for batch_size in options.growth:
        grown, peak = ours(options, batch_size)
        epochs = [grown * (long_tailed_counts(10, 5000, factor).sum() // batch_size) for factor in (1, 10, 100)]
        line("ours", batch_size, grown, peak, " ".join(f"{epoch:9,.1f}" for epoch in epochs))
    print(f"\nours is {plain_seconds / seconds:.1f} times as fast as the plain pipeline, batch {options.batch_size}")


if __name__ == "__main__":
    launch(main, get_args_parser())
