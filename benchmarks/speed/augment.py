"""Views per second of this project's augmentations against torchvision's on one PIL image at a time, on one core.

    python benchmarks/speed/augment.py [--data_root FOLDER_OF_CIFAR-10]

Both get the same images, by CPU time. Where there is a GPU, ours also there, with the images on the device.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms as tv

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.speed.timer import median_seconds  # noqa: E402
from util.augment import create_augment  # noqa: E402
from util.auto_augment import CIFAR_MEAN  # noqa: E402
from util.imbalanced_cifar import ImbalanceCIFAR10  # noqa: E402
from util.toy_data import ToyCIFAR  # noqa: E402

STRENGTH = 2.0  # of the colour jitter, as in stage 1
CROP = [tv.RandomCrop(32, padding=4), tv.RandomHorizontalFlip()]
PIL_PIPELINES = {
    "simclr": tv.Compose([
        tv.RandomResizedCrop(32), tv.RandomHorizontalFlip(),
        tv.RandomApply([tv.ColorJitter(0.8 * STRENGTH, 0.8 * STRENGTH, 0.8 * STRENGTH, 0.2 * STRENGTH)], p=0.8),
        tv.RandomGrayscale(0.2), tv.GaussianBlur(3), tv.ToTensor()]),
    "crop": tv.Compose([*CROP, tv.ToTensor()]),
    "auto": tv.Compose([*CROP, tv.AutoAugment(tv.AutoAugmentPolicy.CIFAR10), tv.ToTensor(),
                        tv.RandomErasing(p=1, scale=(0.25, 0.25), ratio=(1, 1), value=CIFAR_MEAN)]),
}


def load_pixels(data_root):
    """The balanced training set of CIFAR-10, or toy images without a folder: uint8 (N, 32, 32, 3), a list of labels."""
    images = ImbalanceCIFAR10(data_root, 1) if data_root else ToyCIFAR(10, 1)
    return images.data, images.targets


def one_by_one(pipeline, pixels):
    return torch.stack([pipeline(Image.fromarray(image)) for image in pixels])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", help="folder of CIFAR-10, else toy images are drawn")
    torch.set_num_threads(1)
    pixels = load_pixels(parser.parse_args().data_root)[0][:1000]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    print(f"{'':28} {'views/s':>10} {'times':>7}")
    for name, pipeline in PIL_PIPELINES.items():
        theirs = median_seconds(partial(one_by_one, pipeline, pixels), runs=5)
        print(f"{f'{name}, torchvision on PIL':28} {len(pixels) / theirs:10,.0f} {1:7.1f}")
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            augment = create_augment(name, 32, STRENGTH, min_crop=0.08)
            ours = median_seconds(partial(augment, images.to(device), torch.default_generator), 25, device)
            print(f"{f'{name}, ours on {device}':28} {len(pixels) / ours:10,.0f} {theirs / ours:7.1f}", flush=True)
