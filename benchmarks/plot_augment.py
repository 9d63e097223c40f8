"""Draws 64 images, their views by torchvision's PIL pipeline and by util/augment.py side by side, to compare by eye.

    python benchmarks/plot_augment.py --output sheet.png [--data_root FOLDER_OF_CIFAR-10]

Each pipeline draws its own random parameters, so the views differ, while the three sheets should look alike in kind.
Images are CIFAR-10's, or toy images without --data_root.
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from bench_augment import SimCLRAugment, load_images, pil_pipeline  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.utils import make_grid  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="PNG to write")
    parser.add_argument("--data_root", help="folder of CIFAR-10, else toy images are drawn")
    parser.add_argument("--jitter_strength", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pixels = load_images(args.data_root, 64)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    of_one_image = pil_pipeline(args.jitter_strength)
    sheets = {
        "images": images / 255,
        "torchvision, one PIL image at a time": torch.stack([of_one_image(Image.fromarray(p)) for p in pixels]),
        "util/augment.py, the whole batch": SimCLRAugment(32, args.jitter_strength)(images, torch.default_generator),
    }
    figure, axes = plt.subplots(1, 3, figsize=(18, 6.4), layout="constrained")
    for axis, (title, views) in zip(axes, sheets.items(), strict=True):
        axis.imshow(make_grid(views, nrow=8, pad_value=1).permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
