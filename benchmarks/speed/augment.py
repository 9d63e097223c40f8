"""Views per second of util/augment.py against torchvision's transforms on one PIL image at a time, on the same images.

    python benchmarks/speed/augment.py [--data_root FOLDER_OF_CIFAR-10]

On one core, by CPU time. Where there is a GPU, ours also there, with the images on the device. Memory is what a batch
adds, its finished views included.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.speed.timer import PeakMemory, median_seconds  # noqa: E402
from util.augment import SimCLRAugment  # noqa: E402
from util.imbalanced_cifar import ImbalanceCIFAR10  # noqa: E402
from util.toy_data import ToyCIFAR  # noqa: E402


def load_pixels(data_root):
    """The balanced training set of CIFAR-10, or toy images without a folder: uint8 (N, 32, 32, 3), a list of labels."""
    images = ImbalanceCIFAR10(data_root, 1) if data_root else ToyCIFAR(10, 1)
    return images.data, images.targets


def pil_pipeline(strength):
    """SimCLR's augmentation of one PIL image as the authors have it, at that strength of the colour jitter."""
    return transforms.Compose([
        transforms.RandomResizedCrop(32),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(*[0.8 * strength] * 3, 0.2 * strength)], p=0.8),
        transforms.RandomGrayscale(0.2),
        transforms.GaussianBlur(3),
        transforms.ToTensor(),
    ])


def one_by_one(pipeline, pixels):
    return torch.stack([pipeline(Image.fromarray(image)) for image in pixels])


def main(args):
    torch.set_num_threads(1)
    pixels, _ = load_pixels(args.data_root)
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))[:args.batch_size]]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    generator = torch.default_generator
    print(f"{'':28} {'views/s':>10} {'times':>7} {'peak MB':>9}")
    measured = [("torchvision on PIL", "cpu", 5, partial(one_by_one, pil_pipeline(args.jitter_strength), pixels))]
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        augment = SimCLRAugment(32, args.jitter_strength)
        measured.append((f"ours, {device}", device, 25, partial(augment, images.to(device), generator)))
    baseline = None
    for name, device, runs, function in measured:
        memory = PeakMemory(device)
        seconds = median_seconds(function, runs, device)
        baseline = baseline or seconds
        print(f"{name:28} {len(pixels) / seconds:10,.0f} {baseline / seconds:7.1f} {memory.bytes() / 1e6:9.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", help="folder of CIFAR-10, else toy images are drawn")
    parser.add_argument("--batch_size", type=int, default=1000)
    parser.add_argument("--jitter_strength", type=float, default=2.0)
    main(parser.parse_args())
