"""Views per second of util/augment.py against torchvision's transforms on one PIL image at a time, on the same images.

    python benchmarks/bench_augment.py [--data_root FOLDER_OF_CIFAR-10]

On one core, by CPU time, so that other work on the machine counts less; medians of several runs over one batch. Where
there is a GPU, ours also there, by wall time, with the images on the device. Peak memory is what one batch adds to the
resident set of a process of its own, or to CUDA's allocator, its finished views included.
"""

import argparse
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.augment import SimCLRAugment  # noqa: E402
from util.imbalanced_cifar import ImbalanceCIFAR10  # noqa: E402
from util.options import launch  # noqa: E402
from util.toy_data import ToyCIFAR  # noqa: E402


def load_images(data_root, num_images):
    """Images of CIFAR-10's test set at random, of the toy one without a folder: uint8 (N, 32, 32, 3)."""
    test_set = ImbalanceCIFAR10(data_root, train=False) if data_root else ToyCIFAR(10, train=False)
    order = np.random.default_rng(0).permutation(len(test_set.data))[:num_images]
    return test_set.data[order]


def pil_pipeline(jitter_strength):
    """The authors' augmentation, of one PIL image."""
    s = jitter_strength
    return transforms.Compose([
        transforms.RandomResizedCrop(32),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], p=0.8),
        transforms.RandomGrayscale(0.2),
        transforms.GaussianBlur(3),
        transforms.ToTensor(),
    ])


def by_torchvision(pixels, jitter_strength):
    of_one_image = pil_pipeline(jitter_strength)
    return torch.stack([of_one_image(Image.fromarray(p)) for p in pixels])


def by_ours(pixels, jitter_strength):
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return SimCLRAugment(32, jitter_strength)(images, torch.default_generator)


def median_seconds(function, runs, clock):
    seconds = []
    for _ in range(runs):
        begin = clock()
        function()
        seconds.append(clock() - begin)
    return median(seconds)


def bytes_in(field, file="/proc/self/status"):
    return next(int(line.split()[1]) for line in open(file) if line.startswith(field)) * 1024


def peak_bytes(pipeline, pixels, jitter_strength):
    torch.set_num_threads(1)
    pipeline(pixels[:8], jitter_strength)  # loads what every later call finds loaded
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before = bytes_in("VmRSS")
    pipeline(pixels, jitter_strength)
    return bytes_in("VmHWM") - before


def report(name, num_views, seconds, baseline, peak):
    print(f"{name:28} {num_views / seconds:12,.0f} views/s {baseline / seconds:9.1f} {peak / 1e6:9.1f} MB")


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", help="folder of CIFAR-10, else toy images are drawn")
    parser.add_argument("--batch_size", type=int, default=1000)
    parser.add_argument("--jitter_strength", type=float, default=2.0)
    return parser


def main(args):
    torch.set_num_threads(1)
    pixels, strength = load_images(args.data_root, args.batch_size), args.jitter_strength
    print(f"{f'{len(pixels)} images, strength {strength}':49} {'times':>9} {'peak':>12}")
    baseline = None
    for name, pipeline, runs in (("torchvision on PIL, one core", by_torchvision, 5), ("ours, one core", by_ours, 25)):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            peak = process.apply(peak_bytes, (pipeline, pixels, strength))
        pipeline(pixels, strength)
        seconds = median_seconds(partial(pipeline, pixels, strength), runs, time.process_time)
        baseline = baseline or seconds
        report(name, len(pixels), seconds, baseline, peak)
    if torch.cuda.is_available():
        images = torch.from_numpy(pixels).cuda().permute(0, 3, 1, 2).contiguous()
        augment = SimCLRAugment(32, strength)

        def on_device():
            augment(images, torch.default_generator)
            torch.cuda.synchronize()

        on_device()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = median_seconds(on_device, 51, time.perf_counter)
        peak = torch.cuda.max_memory_allocated() - before
        report(torch.cuda.get_device_name(), len(pixels), seconds, baseline, peak)


if __name__ == "__main__":
    launch(main, get_args_parser())
