"""The random augmentation of SimCLR (Chen et al., arXiv 2002.05709, appendix A) for whole batches, on CPU and CUDA.

    augment = SimCLRAugment(size=32, jitter_strength=2.0)
    views = augment(images, torch.Generator().manual_seed(0))  # uint8 (N, 3, H, W) -> float32 (N, 3, 32, 32)

Each image has its own random parameters, distributed as those of torchvision's RandomResizedCrop, RandomHorizontalFlip,
ColorJitter (parts in random order), RandomGrayscale and GaussianBlur. They are drawn on the CPU. So every device gives
the same views, and nothing waits for the device to learn which images a step changes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from util.auto_augment import CropAugment, check_bytes
from util.batches import move

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CPU_CHUNK = 128  # images of 32 x 32 whose intermediate results stay in a core's cache


class AugmentParameters(NamedTuple):
    """What is done to each of N images; CPU tensors."""

    box: Tensor  # (N, 4) int64: top, left, height and width of the crop in pixels
    flip: Tensor  # (N,) bool
    jitter: Tensor  # (N,) bool: whether the colours are jittered
    order: Tensor  # (N, 4) int64: the parts of the jitter, BRIGHTNESS .. HUE, in the order in which they happen
    factors: Tensor  # (N, 4) float32 of brightness, contrast, saturation (1 keeps the image) and hue (0 keeps it)
    grayscale: Tensor  # (N,) bool
    sigma: Tensor  # (N,) float32: standard deviation of the blur in pixels


def sample_boxes(num_images: int, height: int, width: int, min_crop: float, generator: Generator) -> Tensor:
    """Crops of min_crop to 1 of the area with an aspect ratio of 3/4 to 4/3: (N, 4) int64 of top, left, height, width.

    The first of ten tries that fits; where none does, the largest central crop whose aspect ratio is in range.
    """
    min_ratio, max_ratio = 3 / 4, 4 / 3
    area, log_ratio = torch.rand(2, num_images, 10, generator=generator)
    area = height * width * (min_crop + (1 - min_crop) * area)
    ratio = torch.exp(math.log(min_ratio) + math.log(max_ratio / min_ratio) * log_ratio)
    widths, heights = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (0 < widths) & (widths <= width) & (0 < heights) & (heights <= height)
    first, any_fits = fits.byte().argmax(1, keepdim=True), fits.any(1)
    central_width, central_height = min(width, round(height * max_ratio)), min(height, round(width / min_ratio))
    w = torch.where(any_fits, widths.gather(1, first)[:, 0], central_width)
    h = torch.where(any_fits, heights.gather(1, first)[:, 0], central_height)
    u, v = torch.rand(2, num_images, generator=generator)
    top = torch.where(any_fits, (u * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(any_fits, (v * (width - w + 1)).long(), (width - w) // 2)
    return torch.stack((top, left, h, w), dim=1)


def resize_weights(start: Tensor, length: Tensor, flip: Tensor, in_size: int, out_size: int) -> Tensor:
    """(..., out_size, in_size) matrices that cut pixels [start, start + length) out of a line and resize them.

    Bilinear with antialiasing, as PIL: a triangle, as wide as an output pixel where that is wider than an input pixel,
    over the pixels of the crop alone. Start, length and flip (1 mirrors the line, 0 does not) are floats (..., 1, 1).
    """
    pixel = torch.arange(in_size, device=start.device)
    out_center = torch.arange(out_size, device=start.device)[:, None] + 0.5
    out_center = torch.where(flip > 0, out_size - out_center, out_center)
    scale = length / out_size
    distance = (pixel + 0.5 - start - out_center * scale).abs_()
    weights = (1 - distance / scale.clamp(min=1)).clamp_(min=0)
    weights *= (start <= pixel) & (pixel < start + length)
    return weights / weights.sum(-1, keepdim=True)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` (N, 1, 1, 1) in [-0.5, 0.5] of the colour circle; images (N, 3, H, W) in [0, 1]."""
    red, green, blue = images.split(1, dim=1)
    low = images.amin(1, keepdim=True)
    chroma = images.amax(1, keepdim=True) - low
    # In sixths of the circle from red: 0 to 3 on green's side, 0 to -3 on blue's.
    hue = torch.copysign((green + blue - red - low) / chroma.clamp(min=1e-12) + 1, green - blue)
    opposite = torch.arange(3, device=images.device).view(3, 1, 1) / 3 - 0.5  # of red, green and blue on the circle
    distance_from_opposite = torch.add(shift - opposite + 1.5, hue, alpha=1 / 6).frac_().sub_(0.5).abs_()
    return torch.addcmul(low, chroma, distance_from_opposite.mul_(6).sub_(1).clamp_(0, 1))


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blurs (N, 3, H, W) with 3 x 3 kernels of standard deviation `sigma` (N, 1, 1, 1), reflecting at the border."""
    side = torch.exp(-0.5 / sigma**2)
    center = 1 / (1 + 2 * side)
    side = side * center
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    rows = torch.addcmul(center * padded[:, :, 1:-1], side, padded[:, :, :-2] + padded[:, :, 2:])
    return torch.addcmul(center * rows[..., 1:-1], side, rows[..., :-2] + rows[..., 2:])


class SimCLRAugment:
    """SimCLR's augmentation of a batch: crop and resize, flip, colour jitter, grayscale, blur.

    Args:
        size: height and width of the views in pixels.
        jitter_strength: s in [0, 2.5]; brightness, contrast and saturation factors are uniform in
            [max(0, 1 - 0.8 s), 1 + 0.8 s], the hue shift in [-0.2 s, 0.2 s].
        min_crop: area of the smallest crop as a share of the image, in (0, 1].
    """

    def __init__(self, size: int = 32, jitter_strength: float = 1.0, min_crop: float = 0.08):
        self.size, self.min_crop = size, min_crop
        low, high, hue = max(0, 1 - 0.8 * jitter_strength), 1 + 0.8 * jitter_strength, 0.2 * jitter_strength
        self.factor_low, self.factor_high = torch.tensor([[low] * 3 + [-hue], [high] * 3 + [hue]])

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Views, float32 (N, 3, size, size) in [0, 1], of images, uint8 (N, 3, H, W), by a CPU generator."""
        return self.apply(images, self.sample(len(images), *images.shape[2:], generator))

    def sample(self, num_images: int, height: int, width: int, generator: Generator) -> AugmentParameters:
        """Random parameters for images of height x width pixels, by a CPU generator."""
        box = sample_boxes(num_images, height, width, self.min_crop, generator)
        flip, jitter, grayscale, blur = torch.rand(4, num_images, generator=generator)
        order, factors = torch.rand(2, num_images, 4, generator=generator)
        factors = torch.lerp(self.factor_low, self.factor_high, factors)
        return AugmentParameters(
            box, flip < 0.5, jitter < 0.8, order.argsort(1), factors, grayscale < 0.2, 0.1 + 1.9 * blur
        )

    def apply(self, images: Tensor, parameters: AugmentParameters) -> Tensor:
        """Views, float32 (N, 3, size, size) in [0, 1] on the device of images, uint8 (N, 3, H, W), or a TypeError."""
        check_bytes(images)
        if images.is_cuda:
            return self._apply(images, parameters)
        chunks = zip(images.split(CPU_CHUNK), *(p.split(CPU_CHUNK) for p in parameters), strict=True)
        return torch.cat([self._apply(chunk, AugmentParameters(*p)) for chunk, *p in chunks])

    def _apply(self, images: Tensor, p: AugmentParameters) -> Tensor:
        height, width = images.shape[2:]
        is_hue = p.order == HUE
        parts = p.order[~is_hue].view(-1, 3)  # each blends the image with black, its mean grey or its grey
        scale = p.factors.gather(1, parts).masked_fill(~p.jitter[:, None], 1)
        gray_weight, mean_weight = (1 - scale) * (parts == SATURATION), (1 - scale) * (parts == CONTRAST)
        flips = torch.stack((torch.zeros_like(p.flip), p.flip), dim=1)
        fields = (p.box, flips, p.factors[:, HUE:], p.sigma[:, None], scale, gray_weight, mean_weight)
        packed = torch.cat(fields, dim=1)[..., None, None]
        index_lists = [i.nonzero()[:, 0] for i in (*(is_hue & p.jitter[:, None]).T, p.grayscale)]
        indices = torch.cat(index_lists)
        packed, indices = move(packed, images.device), move(indices, images.device)  # the only transfers
        *hue_images, gray_images = indices.split([len(i) for i in index_lists])
        # `blends` are the columns of scale, then of gray_weight and mean_weight; [i::3] are those of the i-th part.
        starts, lengths, flips, hue_shift, sigma, *blends = packed.split([2] * 3 + [1] * 11, dim=1)

        rows, columns = resize_weights(starts, lengths, flips, max(height, width), self.size).split(1, dim=1)
        images = (rows[..., :height] @ (images.float() @ columns[..., :width].mT)).div_(255)
        for i, hue_here in enumerate(hue_images):  # hue comes before the i-th other part, or after all three
            images[hue_here] = adjust_hue(images[hue_here], hue_shift[hue_here])
            if i < 3:
                scale, gray_weight, mean_weight = blends[i::3]
                gray = rgb_to_grayscale(images)
                blend = torch.addcmul(gray_weight * gray, mean_weight, gray.mean((2, 3), keepdim=True))
                images.mul_(scale).add_(blend).clamp_(0, 1)
        images[gray_images] = rgb_to_grayscale(images[gray_images])
        return gaussian_blur(images, sigma)


def create_augment(name: str, size: int, jitter_strength: float, min_crop: float):
    """The augmentation that --augment names: "simclr"; "crop"; or "auto", which is crop, AutoAugment and Cutout."""
    if name == "simclr":
        return SimCLRAugment(size, jitter_strength, min_crop)
    return CropAugment(size, auto=name == "auto")
