
import pytest
import torch
import torchvision.transforms.functional as F
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from util.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, AugmentParameters, SimCLRAugment
from util.auto_augment import CropAugment

NEUTRAL_FACTORS = [1.0, 1.0, 1.0, 0.0]
TORCHVISION_PARTS = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(num_images, height=32, width=32):
    """Blobs of colour with noise, and in each a black, a grey and a white pixel and two of equal channels."""
    blobs = torch.rand(num_images, 3, 5, 5, generator=generator())
    images = torch.nn.functional.interpolate(blobs, (height, width), mode="bicubic") * 255
    images = (images + 20 * torch.randn(images.shape, generator=generator(1))).clamp(0, 255).to(torch.uint8)
    images[:, :, 0, :5] = torch.tensor([[0, 128, 255, 90, 30], [0, 128, 255, 90, 70], [0, 128, 255, 10, 70]])
    return images


def identity(num_images, height=32, width=32, **changed):
    """Parameters that leave images as they are but for the fields given."""
    parameters = AugmentParameters(
        box=torch.tensor([[0, 0, height, width]]).repeat(num_images, 1),
        flip=torch.zeros(num_images, dtype=torch.bool),
        jitter=torch.zeros(num_images, dtype=torch.bool),
        order=torch.arange(4).repeat(num_images, 1),
        factors=torch.tensor(NEUTRAL_FACTORS).repeat(num_images, 1),
        grayscale=torch.zeros(num_images, dtype=torch.bool),
        sigma=torch.full((num_images,), 0.03),  # its kernel has nothing beside the centre
    )
    return parameters._replace(**changed)


def by_torchvision(images, parameters, size=32, backend="tensor"):
    """Views by torchvision's functional operations, one image at a time, on float tensors or on PIL images."""
    views = []
    for image, *p in zip(images, *parameters, strict=True):
        p = AugmentParameters(*p)
        view = F.to_pil_image(image) if backend == "pil" else image / 255
        view = F.resized_crop(view, *p.box.tolist(), [size, size], antialias=True)
        view = F.hflip(view) if p.flip else view
        for part in p.order.tolist() if p.jitter else []:
            view = TORCHVISION_PARTS[part](view, p.factors[part].item())
        view = F.rgb_to_grayscale(view, num_output_channels=3) if p.grayscale else view
        view = F.gaussian_blur(view, [3, 3], [p.sigma.item()] * 2)
        views.append(F.to_tensor(view) if backend == "pil" else view)
    return torch.stack(views)


def sampled(num_images, strength=1.0, height=32, width=32, seed=0):
    return SimCLRAugment(32, strength).sample(num_images, height, width, generator(seed))


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (20, 44, 32), (96, 80, 32), (32, 32, 24), (7, 5, 16)])
def test_crop_and_flip_are_torchvisions(height, width, size):
    images, p = random_images(50, height, width), sampled(50, 1.0, height, width)
    p = identity(50, box=p.box, flip=p.flip)
    views = SimCLRAugment(size).apply(images, p)
    assert views.shape == (50, 3, size, size) and views.dtype == torch.float32
    torch.testing.assert_close(views, by_torchvision(images, p, size), atol=1e-5, rtol=0)
    torch.testing.assert_close(views, by_torchvision(images, p, size, "pil"), atol=2 / 255, rtol=0)


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0, 2.5])
def test_whole_chain_is_torchvisions(strength):
    images, p = random_images(200), sampled(200, strength)  # more than one chunk
    views = SimCLRAugment(32, strength).apply(images, p)
    torch.testing.assert_close(views, by_torchvision(images, p), atol=1e-3, rtol=0)
    assert (views - by_torchvision(images, p, backend="pil")).abs().mean() < 1.5 / 255
    assert views.min() >= 0 and views.max() <= 1 + 1e-6


@pytest.mark.parametrize("height, width", [(32, 32), (24, 60)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    image, crop = torch.zeros(3, height, width), RandomResizedCrop(32)
    theirs = torch.tensor([crop.get_params(image, crop.scale, crop.ratio) for _ in range(4000)]).T
    ours = sampled(4000, 1.0, height, width).box.T
    top, left, h, w = ours
    assert (ours[:2] >= 0).all() and (ours[2:] > 0).all() and (top + h <= height).all() and (left + w <= width).all()
    for a, b in [*zip(ours, theirs, strict=True), (h * w, theirs[2] * theirs[3]), (w / h, theirs[3] / theirs[2])]:
        assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_boxes_reach_the_bounds_of_area_and_ratio():
    h, w = sampled(100_000, 1.0, 1000, 1000).box[:, 2:].T
    area, ratio = h * w / 1e6, w / h
    area = area[area < 1]  # without the whole images of the fallback
    assert area.min() == pytest.approx(0.08, abs=0.002) and area.max() == pytest.approx(1, abs=0.01)
    assert ratio.min() == pytest.approx(3 / 4, abs=0.005) and ratio.max() == pytest.approx(4 / 3, abs=0.005)


def test_box_that_never_fits_is_the_central_one():
    for height, width in ((400, 4), (3, 90)):
        ours = sampled(50, 1.0, height, width).box
        # No crop of 8 % of such an area has an aspect ratio in range, so torchvision too falls back every time.
        crop = RandomResizedCrop(32)
        theirs = crop.get_params(torch.zeros(3, height, width), crop.scale, crop.ratio)
        assert (ours == torch.tensor(theirs)).all()


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


def test_order_is_a_uniform_permutation():
    order = sampled(24_000).order
    _, counts = order.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and (order.sort(1).values == torch.arange(4)).all()
    assert stats.chisquare(counts).pvalue > 1e-3


def test_probabilities_and_blur():
    p = sampled(20_000)
    for field, probability in ((p.flip, 0.5), (p.jitter, 0.8), (p.grayscale, 0.2)):
        assert stats.binomtest(int(field.sum()), 20_000, probability).pvalue > 1e-3
    assert stats.kstest(p.sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3


def test_draws_are_independent_of_each_other():
    p = sampled(5000)
    columns = torch.stack((*p.box.T, p.flip, p.jitter, *p.factors.T, p.grayscale, p.sigma)).double()
    correlation = columns.corrcoef().fill_diagonal_(0)
    correlation[:4, :4] = 0  # top and left depend on height and width, and these on each other
    assert correlation.abs().max() < 5 / 5000**0.5


def test_same_generator_same_views():
    images, aug = random_images(20), SimCLRAugment(32, 2.0)
    views = aug(images, generator(3))
    assert torch.equal(views, aug(images, generator(3)))
    assert not torch.equal(views, aug(images, generator(4)))
    first, second = (aug(images, g) for g in [generator(3)] * 2)
    assert not torch.equal(first, second)


def test_a_view_depends_on_its_image_and_parameters_alone():
    images, p, aug = random_images(150), sampled(150, 2.0), SimCLRAugment(32, 2.0)
    views = aug.apply(images, p)
    chosen = torch.tensor([149, 3, 60])
    again = aug.apply(images[chosen], AugmentParameters(*(field[chosen] for field in p)))
    torch.testing.assert_close(again, views[chosen], atol=1e-5, rtol=0)


def test_images_stay_unchanged_and_no_image_is_no_error():
    images = random_images(3)
    kept = images.clone()
    SimCLRAugment()(images, generator())
    assert torch.equal(images, kept)
    assert SimCLRAugment()(images[:0], generator()).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("augment", [SimCLRAugment(), CropAugment(), CropAugment(auto=True)])
def test_images_that_are_not_bytes_are_refused(augment):
    with pytest.raises(TypeError, match="expected torch.uint8"):
        augment(random_images(3) / 255, generator())


@pytest.mark.gpu
def test_cuda_gives_the_views_of_the_cpu_without_synchronising():
    images, aug = random_images(300), SimCLRAugment(32, 2.0)
    on_device = images.cuda()
    aug(on_device, generator())  # libraries that load on the first call may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = aug(on_device, generator(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(views.cpu(), aug(images, generator(1)), atol=1e-4, rtol=0)
