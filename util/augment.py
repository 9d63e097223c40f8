"""The random augmentation of SimCLR (Chen et al., arXiv 2002.05709, appendix A) for whole batches, on CPU and CUDA.

    augment = SimCLRAugment(size=32, jitter_strength=2.0)
    views = augment(images, torch.Generator().manual_seed(0))  # uint8 (N, 3, H, W) -> float32 (N, 3, 32, 32)

Each image has its own random parameters, distributed as those of torchvision's RandomResizedCrop, RandomHorizontalFlip,
ColorJitter (parts in random order), RandomGrayscale and GaussianBlur. They are drawn on the CPU: every device then
gives the same views, and the images that a step concerns are known without waiting for the device.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CPU_CHUNK = 64  # images of 32 x 32 whose intermediate results stay in a core's cache


class AugmentParameters(NamedTuple):
    """What is done to each of N images; CPU tensors."""

    box: Tensor  # (N, 4) int64: top, left, height and width of the crop in pixels
    flip: Tensor  # (N,) bool
    jitter: Tensor  # (N,) bool: whether the colours are jittered
    order: Tensor  # (N, 4) int64: the parts of the jitter, BRIGHTNESS .. HUE, in the order in which they happen
    factors: Tensor  # (N, 4) float32 of brightness, contrast, saturation (1 keeps the image) and hue (0 keeps it)
    grayscale: Tensor  # (N,) bool
    sigma: Tensor  # (N,) float32: standard deviation of the blur in pixels


def sample_boxes(num_images: int, height: int, width: int, generator: Generator) -> Tensor:
    """Crops of 8 % to 100 % of the area with an aspect ratio of 3/4 to 4/3: (N, 4) int64 of top, left, height, width.

    The first of ten tries that fits; where none does, the largest central crop whose aspect ratio is in range.
    """
    min_ratio, max_ratio = 3 / 4, 4 / 3
    area, log_ratio = torch.rand(2, num_images, 10, generator=generator)
    area = height * width * (0.08 + (1 - 0.08) * area)
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


def resize_weights(start: Tensor, length: Tensor, in_size: int, out_size: int, flip: Tensor | None = None) -> Tensor:
    """(N, out_size, in_size) matrices that cut [start, start + length) from a line of pixels and resize it.

    Bilinear with antialiasing, as PIL: a triangle, as wide as an output pixel where that is wider than an input pixel,
    over the pixels of the crop alone.
    """
    scale = length / out_size
    out_center = torch.arange(out_size, device=start.device)[:, None] + 0.5
    if flip is not None:
        out_center = torch.where(flip > 0, out_size - out_center, out_center)
    pixel = torch.arange(in_size, device=start.device)
    distance = (pixel + 0.5 - start - out_center * scale).abs()
    weights = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((start <= pixel) & (pixel < start + length))
    return weights / weights.sum(-1, keepdim=True)


def luma(images: Tensor) -> Tensor:
    """Grey (N, 1, H, W) of RGB (N, 3, H, W), by the weights of ITU-R BT.601."""
    red, green, blue = images.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` (N, 1, 1, 1) in [-0.5, 0.5] of the colour circle; images (N, 3, H, W) in [0, 1]."""
    red, green, blue = images.split(1, dim=1)
    low = images.amin(1, keepdim=True)
    chroma = images.amax(1, keepdim=True) - low
    # The hue in sextants from red at 0, positive on green's side of the circle, negative on blue's.
    hue = torch.copysign(1 + (green + blue - red - low) / chroma.clamp(min=1e-12), green - blue)
    hue = (hue + 6 * shift).remainder(6)
    share = torch.cat(((hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()), dim=1)
    return torch.addcmul(low, chroma, share.clamp_(0, 1))


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

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, size: int = 32, jitter_strength: float = 1.0):
        if size < 2:
            raise ValueError(f"size is {size}, expected at least 2 pixels")
        if not 0 <= jitter_strength <= 2.5:
            raise ValueError(f"jitter_strength is {jitter_strength}, expected 0 to 2.5 (a hue shift of up to 0.5)")
        self.size = size
        low, high, hue = max(0, 1 - 0.8 * jitter_strength), 1 + 0.8 * jitter_strength, 0.2 * jitter_strength
        self.factor_low, self.factor_high = torch.tensor([[low] * 3 + [-hue], [high] * 3 + [hue]])

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Views, float32 (N, 3, size, size) in [0, 1], of images, uint8 (N, 3, H, W), by a CPU generator."""
        return self.apply(images, self.sample(len(images), *images.shape[2:], generator))

    def sample(self, num_images: int, height: int, width: int, generator: Generator) -> AugmentParameters:
        """Random parameters for images of height x width pixels, by a CPU generator."""
        box = sample_boxes(num_images, height, width, generator)
        flip, jitter, grayscale, blur = torch.rand(4, num_images, generator=generator)
        order, factors = torch.rand(2, num_images, 4, generator=generator)
        factors = torch.lerp(self.factor_low, self.factor_high, factors)
        return AugmentParameters(
            box, flip < 0.5, jitter < 0.8, order.argsort(1), factors, grayscale < 0.2, 0.1 + 1.9 * blur
        )

    def apply(self, images: Tensor, parameters: AugmentParameters) -> Tensor:
        """Views, float32 (N, 3, size, size) in [0, 1] on the device of images, uint8 (N, 3, H, W)."""
        if images.is_cuda:
            return self._apply(images, parameters)
        chunks = zip(images.split(CPU_CHUNK), *(p.split(CPU_CHUNK) for p in parameters))
        return torch.cat([self._apply(chunk, AugmentParameters(*p)) for chunk, *p in chunks])

    def _apply(self, images: Tensor, p: AugmentParameters) -> Tensor:
        hue_images = [(p.jitter & (p.order[:, i] == HUE)).nonzero()[:, 0] for i in range(4)]
        index_lists = hue_images + [p.grayscale.nonzero()[:, 0]]
        scale = p.factors.gather(1, p.order).masked_fill((p.order == HUE) | ~p.jitter[:, None], 1)
        gray_weight = (1 - scale) * (p.order == SATURATION)
        mean_weight = (1 - scale) * (p.order == CONTRAST)
        columns = (p.box, p.flip, scale, gray_weight, mean_weight, p.factors[:, HUE], p.sigma)
        packed = torch.cat([c.view(len(c), -1) for c in columns], dim=1).T.reshape(-1, len(images), 1, 1, 1)
        indices = torch.cat(index_lists)
        if images.is_cuda:  # two transfers in all, for which nothing waits
            packed, indices = (t.pin_memory().to(images.device, non_blocking=True) for t in (packed, indices))
        top, left, height, width, flip, *blends, hue, sigma = packed
        *hue_images, gray_images = indices.split([len(i) for i in index_lists])

        columns = resize_weights(left, width, images.shape[3], self.size, flip)
        rows = resize_weights(top, height, images.shape[2], self.size)
        images = (rows @ (images.float() @ columns.mT)).div_(255)
        for i, hue_here in enumerate(hue_images):
            images[hue_here] = adjust_hue(images[hue_here], hue[hue_here])
            scale, gray_weight, mean_weight = blends[i::4]
            gray = luma(images)
            blend = gray_weight * gray + mean_weight * gray.mean((2, 3), keepdim=True)
            images = images.mul_(scale).add_(blend).clamp_(0, 1)
        images[gray_images] = luma(images[gray_images])
        return gaussian_blur(images, sigma)
