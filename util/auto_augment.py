"""The field's augmentation for supervised training on CIFAR-LT, for whole batches, on CPU and CUDA.

    augment = CropAugment(size=32, auto=True)
    views = augment(images, torch.Generator().manual_seed(0))  # uint8 (N, 3, H, W) -> float32 (N, 3, 32, 32)

Padding, a random crop and a flip, as Cao et al. train (LDAM-DRW, arXiv 1906.07413). With `auto`, AutoAugment's policy
for CIFAR-10 (Cubuk et al., arXiv 1805.09501) and Cutout (DeVries and Taylor, arXiv 1708.04552) follow, as in BCL, PaCo
and ProCo. Each image has its own random parameters, drawn on the CPU: every device gives the same views, and nothing
waits for the device. Images that get the same operation are changed together.
"""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

# The sub-policies of Cubuk et al., found on reduced CIFAR-10 (their appendix): two operations each, with probability
# and magnitude, a level from 0 to 9.
POLICY = [
    (("invert", 0.1, None), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, None), ("equalize", 0.9, None)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, None), ("equalize", 0.5, None)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, None), ("autocontrast", 0.4, None)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, None)),
    (("equalize", 0.2, None), ("autocontrast", 0.6, None)),
    (("equalize", 0.2, None), ("equalize", 0.6, None)),
    (("color", 0.9, 9), ("equalize", 0.6, None)),
    (("autocontrast", 0.8, None), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, None)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, None), ("solarize", 0.8, 3)),
    (("equalize", 0.8, None), ("invert", 0.1, None)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, None)),
]
LEVELS = 9  # the strongest level
FULL_MAGNITUDE = {  # at level 9; where the policy has a level, half of the images get the opposite sign
    "shear_y": 0.3, "translate_x": 150 / 331, "translate_y": 150 / 331, "rotate": 30.0,  # the side; degrees
    "brightness": 0.9, "color": 0.9, "contrast": 0.9, "sharpness": 0.9,  # added to the factor 1
}
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)  # colour of CIFAR-10's training images, which fills the hole of Cutout


def check_bytes(images):
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}, expected torch.uint8")


def move(tensor, device):
    """`tensor`, of the CPU, on `device`. Nothing waits for the transfer."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def source_of(operation, magnitude, height, width):
    """Where a shear, shift or rotation takes the centre (x, y) of each output pixel from: float64 (H, W) each."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x, y = x.double(), y.double()
    if operation == "shear_y":
        return x, y + magnitude * x
    if operation == "translate_x":
        return x - int(magnitude * width), y
    if operation == "translate_y":
        return x, y - int(magnitude * height)
    angle = math.radians(magnitude)  # counter-clockwise, around the centre
    x, y = x - width / 2, y - height / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x - sin * y + width / 2, sin * x + cos * y + height / 2


@functools.cache  # a few dozen in all
def source_pixels(operation, magnitude, height, width, device):
    """Number of the input pixel nearest to each output pixel's source, and whether there is one: (H * W,) each."""
    x, y = (place.floor().long() for place in source_of(operation, magnitude, height, width))
    inside = (0 <= x) & (x < width) & (0 <= y) & (y < height)
    pixel = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    return move(pixel.flatten(), device), move(inside.flatten(), device)


def warp(images, operation, magnitude):
    """Shear, shift or rotate uint8 (N, 3, H, W); what comes from outside is black."""
    pixel, inside = source_pixels(operation, magnitude, *images.shape[2:], images.device)
    return (images.flatten(2)[:, :, pixel] * inside).view(images.shape)


def adjust_sharpness(images, factor):
    """Blend uint8 (N, 3, H, W) with its blurred self, as PIL does; the border stays. torchvision's waits for CUDA."""
    images = images.float()
    inner = images[..., 1:-1, 1:-1]
    blurred = (F.avg_pool2d(images, 3, stride=1, divisor_override=1) + 4 * inner).div_(13).round_()
    inner.copy_(torch.lerp(blurred, inner, factor).clamp_(0, 255))
    return images.byte()


def transform(images, operation, level, sign):
    """Apply one operation of the policy to uint8 (N, 3, H, W), as torchvision's AutoAugment defines it.

    level: 0 to 9, or None for operations without strength. sign: 1 or -1.
    """
    if operation == "invert":
        return tv.invert(images)
    if operation == "autocontrast":
        return tv.autocontrast(images)
    if operation == "equalize":
        return tv.equalize(images)
    if operation == "posterize":
        return tv.posterize(images, 8 - round(4 * level / LEVELS))  # bits kept
    if operation == "solarize":
        return tv.solarize(images, 255 * (1 - level / LEVELS))  # inverts what is brighter
    magnitude = sign * FULL_MAGNITUDE[operation] * level / LEVELS
    if operation == "brightness":
        return tv.adjust_brightness(images, 1 + magnitude)
    if operation == "color":
        return tv.adjust_saturation(images, 1 + magnitude)
    if operation == "contrast":
        return tv.adjust_contrast(images, 1 + magnitude)
    if operation == "sharpness":
        return adjust_sharpness(images, 1 + magnitude)
    return warp(images, operation, magnitude)


class CropParameters(NamedTuple):
    """What is done to each of N images; CPU tensors."""

    offset: Tensor  # (N, 2) int64: top and left of the crop in the padded image
    flip: Tensor  # (N,) bool
    policy: Tensor  # (N,) int64: row of POLICY
    happens: Tensor  # (N, 2) bool: whether each of its two operations happens
    sign: Tensor  # (N, 2) int64, 1 or -1: of their magnitudes
    hole: Tensor  # (N, 2) int64: row and column of the centre of Cutout's square


class CropAugment:
    """Padding with black, random crop and flip; with `auto`, then AutoAugment for CIFAR-10 and Cutout.

    Images of another size are resized to `size` first. At 32 pixels the padding is 4 on each side and the square of
    Cutout 16 x 16, clipped at the border; other sizes have them in proportion.

    Args:
        size: height and width of the views in pixels.
        auto: whether AutoAugment and Cutout follow.
    """

    def __init__(self, size: int = 32, auto: bool = False):
        self.size, self.auto, self.padding, self.half_hole = size, auto, round(size / 8), round(size / 4)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Views, float32 (N, 3, size, size) in [0, 1], of images, uint8 (N, 3, H, W), by a CPU generator."""
        return self.apply(images, self.sample(len(images), *images.shape[2:], generator))

    def sample(self, num_images: int, height: int, width: int, generator: torch.Generator) -> CropParameters:
        """Random parameters by a CPU generator. They do not depend on height and width."""
        offset = torch.randint(2 * self.padding + 1, (num_images, 2), generator=generator)
        flip = torch.rand(num_images, generator=generator) < 0.5
        policy = torch.randint(len(POLICY), (num_images,), generator=generator)
        probability = torch.tensor([[first[1], second[1]] for first, second in POLICY])
        happens = torch.rand(num_images, 2, generator=generator) < probability[policy]
        sign = 1 - 2 * torch.randint(2, (num_images, 2), generator=generator)
        hole = torch.randint(self.size, (num_images, 2), generator=generator)
        return CropParameters(offset, flip, policy, happens, sign, hole)

    def apply(self, images: Tensor, parameters: CropParameters) -> Tensor:
        """Views, float32 (N, 3, size, size) in [0, 1] on the device of images, uint8 (N, 3, H, W), or a TypeError."""
        check_bytes(images)
        if images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images.float(), (self.size, self.size), mode="bilinear", antialias=True)
            images = images.round().clamp(0, 255).byte()
        views = self._crop(images, parameters)
        if not self.auto:
            return views.float().div_(255)
        for step in range(2):
            self._auto_augment(views, step, parameters)
        return self._cut_out(views.float().div_(255), parameters)

    def _crop(self, images, p):
        place = torch.arange(self.size)
        rows = p.offset[:, :1] - self.padding + place  # (N, size), in the image without padding
        columns = p.offset[:, 1:] - self.padding + torch.where(p.flip[:, None], place.flip(0), place)
        inside_rows, inside_columns = ((0 <= line) & (line < self.size) for line in (rows, columns))
        lines = torch.stack((rows.clamp(0, self.size - 1), columns.clamp(0, self.size - 1),
                             inside_rows, inside_columns))
        rows, columns, inside_rows, inside_columns = move(lines, images.device)
        pixel = (rows[:, :, None] * self.size + columns[:, None]).view(len(images), 1, -1)
        inside = (inside_rows[:, :, None] * inside_columns[:, None]).view(len(images), 1, -1)
        cropped = images.flatten(2).gather(2, pixel.expand(-1, 3, -1)) * inside.byte()
        return cropped.view(images.shape)

    def _auto_augment(self, views, step, p):
        """Change `views` by the first or second operation of each image's sub-policy, in place."""
        groups = {}
        for number, (policy, happens, sign) in enumerate(
                zip(p.policy.tolist(), p.happens[:, step].tolist(), p.sign[:, step].tolist(), strict=True)):
            operation, _, level = POLICY[policy][step]
            if happens:
                key = operation, level, sign if operation in FULL_MAGNITUDE else 1
                groups.setdefault(key, []).append(number)
        everything = move(torch.tensor(sum(groups.values(), []), dtype=torch.int64), views.device)
        for key, group in zip(groups, everything.split([len(group) for group in groups.values()]), strict=True):
            views[group] = transform(views[group], *key)

    def _cut_out(self, views, p):
        hole = move(p.hole, views.device)
        place = torch.arange(self.size, device=views.device)
        in_row, in_column = ((start <= place) & (place < start + 2 * self.half_hole)
                             for start in (hole - self.half_hole).split(1, dim=1))
        in_hole = in_row[:, None, :, None] & in_column[:, None, None, :]
        for channel, mean in enumerate(CIFAR_MEAN):
            views[:, channel:channel + 1].masked_fill_(in_hole, mean)
        return views
