"""SimCLR's augmentation against torchvision's, and what all augmentations have in common."""
import pytest
import torch
import torchvision.transforms.functional as F
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from util.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, AugmentParameters, SimCLRAugment
from util.auto_augment import CropAugment

AUGMENTS = [SimCLRAugment(32, 2.0), CropAugment(32), CropAugment(32, auto=True)]
PARTS = {
    BRIGHTNESS: F.adjust_brightness, CONTRAST: F.adjust_contrast, SATURATION: F.adjust_saturation, HUE: F.adjust_hue}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(num_images, height=32, width=32):
    """Blobs of colour with noise, and in each a black, a grey and a white pixel and two of equal channels."""
    blobs = torch.rand(num_images, 3, 5, 5, generator=generator())
    images = torch.nn.functional.interpolate(blobs, (height, width), mode="bicubic") * 255
    images = (images + 20 * torch.randn(images.shape, generator=generator(1))).clamp(0, 255).to(torch.uint8)
    images[:, :, 0, :5] = torch.tensor([[0, 128, 255, 90, 30], [0, 128, 255, 90, 70], [0, 128, 255, 10, 70]])
    return images


def by_torchvision(images, parameters, size=32):
    """Views by torchvision's functional operations, one image at a time."""
    views = []
    for image, *p in zip(images, *parameters, strict=True):
        p = AugmentParameters(*p)
        view = F.resized_crop(image / 255, *p.box.tolist(), [size, size], antialias=True)
        view = F.hflip(view) if p.flip else view
        for part in p.order.tolist() if p.jitter else []:
            view = PARTS[part](view, p.factors[part].item())
        view = F.rgb_to_grayscale(view, num_output_channels=3) if p.grayscale else view
        views.append(F.gaussian_blur(view, [3, 3], [p.sigma.item()] * 2))
    return torch.stack(views)


def sampled(num_images, strength=1.0, height=32, width=32, min_crop=0.08):
    return SimCLRAugment(32, strength, min_crop).sample(num_images, height, width, generator())


@pytest.mark.parametrize("strength, height, width, size", [
    (1.0, 32, 32, 32), (2.5, 32, 32, 32), (1.0, 20, 44, 32), (1.0, 96, 80, 32), (1.0, 32, 32, 24), (1.0, 7, 5, 16)])
def test_views_are_torchvisions(strength, height, width, size):
    images, p = random_images(200, height, width), sampled(200, strength, height, width)  # more than one chunk
    views = SimCLRAugment(size).apply(images, p)
    assert views.shape == (200, 3, size, size) and views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1 + 1e-6
    torch.testing.assert_close(views, by_torchvision(images, p, size), atol=1e-3, rtol=0)


# In the last two no crop fits: their aspect ratio is out of range.
@pytest.mark.parametrize("height, width, min_crop", [(32, 32, 0.08), (24, 60, 0.4), (400, 4, 0.08), (3, 90, 0.08)])
def test_boxes_are_distributed_as_torchvisions(height, width, min_crop):
    torch.manual_seed(0)
    image, crop = torch.zeros(3, height, width), RandomResizedCrop(32, (min_crop, 1.0))
    theirs = torch.tensor([crop.get_params(image, crop.scale, crop.ratio) for _ in range(4000)]).T
    ours = sampled(4000, 1.0, height, width, min_crop).box.T
    top, left, h, w = ours
    assert (ours[:2] >= 0).all() and (ours[2:] > 0).all() and (top + h <= height).all() and (left + w <= width).all()
    for a, b in [*zip(ours, theirs, strict=True), (h * w, theirs[2] * theirs[3]), (w / h, theirs[3] / theirs[2])]:
        assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_boxes_reach_the_bounds_of_the_paper():
    h, w = SimCLRAugment().sample(100_000, 1000, 1000, generator()).box[:, 2:].T
    area, ratio = h * w / 1e6, w / h
    assert area.min() == pytest.approx(0.08, abs=0.002)
    assert ratio.min() == pytest.approx(3 / 4, abs=0.005) and ratio.max() == pytest.approx(4 / 3, abs=0.005)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_factors_are_distributed_as_torchvisions(strength):
    torch.manual_seed(0)
    jitter = ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = torch.tensor([jitter.get_params(*ranges)[1:] for _ in range(4000)])
    ours = sampled(4000, strength).factors
    for part, (low, high) in enumerate(ranges):
        assert ours[:, part].min() >= low - 1e-6 and ours[:, part].max() <= high + 1e-6
        assert stats.ks_2samp(ours[:, part], theirs[:, part]).pvalue > 1e-3


def test_other_parameters_are_distributed_as_the_paper_says_and_all_independent():
    p = sampled(24_000)
    for field, probability in ((p.flip, 0.5), (p.jitter, 0.8), (p.grayscale, 0.2)):
        assert stats.binomtest(int(field.sum()), 24_000, probability).pvalue > 1e-3
    assert stats.kstest(p.sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    orders, counts = p.order.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and (orders.sort(1).values == torch.arange(4)).all()
    assert stats.chisquare(counts).pvalue > 1e-3
    columns = torch.stack((*p.box.T, p.flip, p.jitter, *p.order.T, *p.factors.T, p.grayscale, p.sigma)).double()
    correlation = columns.corrcoef().fill_diagonal_(0)
    correlation[:4, :4] = correlation[6:10, 6:10] = 0  # of a box, and of an order, the parts depend on each other
    assert correlation.abs().max() < 5 / 24_000**0.5


@pytest.mark.parametrize("augment", AUGMENTS)
def test_views_follow_from_the_generator(augment):
    images = random_images(1).repeat(90, 1, 1, 1)
    views, random = augment(images, generator(3)), generator(3)
    assert views.shape == (90, 3, 32, 32) and views.dtype == torch.float32
    assert torch.equal(augment(images, random), views) and not torch.equal(augment(images, random), views)
    assert torch.equal(images, random_images(1).repeat(90, 1, 1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("augment, tolerance", [(AUGMENTS[0], 1e-4), (AUGMENTS[2], 1.01 / 255)])
def test_cuda_gives_the_views_of_the_cpu(augment, tolerance):
    images = random_images(300)
    views = augment(images.cuda(), generator(1))
    torch.testing.assert_close(views.cpu(), augment(images, generator(1)), atol=tolerance, rtol=0)
