"""The field's augmentation for supervised training on CIFAR-LT, for whole batches, on CPU and CUDA.

    augment = CropAugment(size=32, auto=True)
    views = augment(images, torch.Generator().manual_seed(0))  # uint8 (N, 3, H, W) -> float32 (N, 3, 32, 32)

Padding, a random crop and a flip, as Cao et al. train (LDAM-DRW, arXiv 1906.07413). With `auto`, AutoAugment's policy
for CIFAR-10 (Cubuk et al., arXiv 1805.09501) and Cutout (DeVries and Taylor, arXiv 1708.04552) follow, as in BCL, PaCo
and ProCo. Each image has its own random parameters, drawn on the CPU: every device gives the same views. Images that
get the same operation are changed together. With `auto`, some of torchvision's operations wait for the device.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from util.batches import move

# Cubuk et al. found 25 sub-policies on CIFAR-10 (their appendix): two operations each, with probability and level, from
# 0 to 9, or None for operations without strength.
AUTO_AUGMENT = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
POLICY = AUTO_AUGMENT._policies
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)  # colour of CIFAR-10's training images, which fills the hole of Cutout


def check_bytes(images):
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}, expected torch.uint8")


def transform(images, operation, level, sign):
    """Apply one operation of POLICY to uint8 (N, 3, H, W). `sign`: 1 or -1, for operations in two directions.

    torchvision's AutoAugment draws once for all images that it is given, so this calls the part of it that draws
    nothing. Its name is private: requirements.txt pins torchvision.
    """
    strengths, in_two_directions = AUTO_AUGMENT._AUGMENTATION_SPACE[operation]
    strength = 0.0 if level is None else strengths(10, *images.shape[2:])[level].item()
    if in_two_directions:
        strength *= sign
    return AUTO_AUGMENT._apply_image_or_video_transform(
        images, operation, strength, AUTO_AUGMENT.interpolation, AUTO_AUGMENT._fill)


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
                groups.setdefault((operation, level, sign), []).append(number)
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
