"""Crop, AutoAugment and Cutout against torchvision's transforms on PIL images."""
import pytest
import torch
import torchvision.transforms.functional as F
from scipy import stats
from test_augment import generator, random_images
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from util.auto_augment import CIFAR_MEAN, POLICY, SIGNED, CropAugment, CropParameters, transform

THEIRS = AutoAugment(AutoAugmentPolicy.CIFAR10)
USED = sorted({(name, level) for row in POLICY for name, _, level in row}, key=str)
CASES = [(name, level, sign) for name, level in USED for sign in ((1, -1) if name in SIGNED else (1,))]


def by_pil(images, operation, level, sign, monkeypatch):
    """torchvision's AutoAugment on PIL images, made to apply one operation with one sign."""
    ours = ((operation, 1.0, level), (operation, -1.0, level))
    monkeypatch.setattr(THEIRS, "policies", [ours])
    monkeypatch.setattr(THEIRS, "get_params", lambda number: (0, torch.tensor([0.5, 0.5]), torch.tensor([sign > 0, 0])))
    return torch.stack([F.pil_to_tensor(THEIRS(F.to_pil_image(image))) for image in images])


# One step of 255 at most: PIL rounds the grey that it blends with, torchvision's tensors cut it off. Where a rotation
# lands exactly between two pixels, which happens at 48 pixels, PIL's fixed-point numbers may take the other one.
@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("operation, level, sign", CASES)
def test_each_operation_is_torchvisions(operation, level, sign, size, monkeypatch):
    images = random_images(24, size, size)
    images[0], images[1] = 128, images[1] // 4 + 90  # one colour; little contrast
    expected = by_pil(images, operation, level, sign, monkeypatch)
    ours = transform(images.clone(), operation, level, sign)
    difference = (ours.int() - expected.int()).abs()
    assert ours.dtype == torch.uint8
    assert difference.max() <= 1 or (operation == "Rotate" and (difference > 0).any(1).float().mean() < 5e-4)
    assert (operation, level) == ("Color", 0) or not torch.equal(expected, images)


def sampled(num_images, size=32, auto=True, seed=0):
    return CropAugment(size, auto).sample(num_images, size, size, generator(seed))


@pytest.mark.parametrize("size, padding", [(32, 4), (16, 2), (48, 6)])
def test_crop_and_flip_are_torchvisions(size, padding):
    images, p = random_images(60, size, size), sampled(60, size)
    views = CropAugment(size).apply(images, p)
    padded = F.pad(images, [padding])
    for view, image, (top, left), flip in zip(views, padded, p.offset.tolist(), p.flip, strict=True):
        expected = F.crop(image, top, left, size, size)
        assert torch.equal(view, (F.hflip(expected) if flip else expected) / 255)
    assert p.offset.min() == 0 and p.offset.max() == 2 * padding


@pytest.mark.parametrize("height, width, size", [(48, 48, 32), (32, 32, 16), (40, 24, 32)])
def test_images_of_another_size_are_resized_first(height, width, size):
    images = random_images(3, height, width)
    p = sampled(3, size)._replace(offset=torch.full((3, 2), round(size / 8)), flip=torch.zeros(3).bool())
    expected = torch.stack([F.to_tensor(F.resize(F.to_pil_image(image), [size, size])) for image in images])
    torch.testing.assert_close(CropAugment(size).apply(images, p), expected, atol=1.01 / 255, rtol=0)


def test_the_sub_policy_decides_what_happens_in_which_order():
    """Each row of the policy, both, one or none of its operations, equals these operations one after the other."""
    images = random_images(1).repeat(200, 1, 1, 1)
    row, first, second, negative = torch.cartesian_prod(torch.arange(25), *[torch.arange(2)] * 3).T
    p = CropParameters(
        offset=torch.full((200, 2), 4), flip=torch.zeros(200).bool(), policy=row,
        happens=torch.stack((first, second), 1).bool(), sign=torch.stack((1 - 2 * negative, 2 * negative - 1), 1),
        hole=torch.full((200, 2), -1000))
    views = CropAugment(32, auto=True).apply(images, p)
    for number, view in enumerate(views):
        expected = images[:1]
        for (name, _, level), happens, sign in zip(POLICY[row[number]], p.happens[number], p.sign[number], strict=True):
            if happens:
                expected = transform(expected, name, level, sign.item() if name in SIGNED else 1)
        assert torch.equal(view, expected[0] / 255), number


def test_cutout_fills_a_square_clipped_at_the_border():
    images, p = random_images(4), sampled(4)._replace(
        offset=torch.full((4, 2), 4), flip=torch.zeros(4).bool(), happens=torch.zeros(4, 2).bool(),
        hole=torch.tensor([[10, 20], [0, 0], [31, 31], [16, 3]]))
    expected, mean = images / 255, torch.tensor(CIFAR_MEAN)[:, None, None]
    expected[0, :, 2:18, 12:28] = expected[1, :, :8, :8] = expected[2, :, 23:, 23:] = expected[3, :, 8:24, :11] = mean
    assert torch.equal(CropAugment(32, auto=True).apply(images, p), expected)


def test_parameters_are_distributed_as_the_policy_says():
    p = sampled(50_000)
    assert p.hole.min() == 0 and p.hole.max() == 31
    for counts in (p.policy.bincount(), *(column.bincount() for column in (*p.hole.T, *p.offset.T))):
        assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.binomtest(int(p.flip.sum()), 50_000, 0.5).pvalue > 1e-4
    for number, row in enumerate(POLICY):
        for step, (_, probability, _) in enumerate(row):
            happens = p.happens[p.policy == number, step]
            assert stats.binomtest(int(happens.sum()), len(happens), probability).pvalue > 1e-5
    columns = torch.column_stack((*p.offset.T, p.flip, p.policy, *p.sign.T, *p.hole.T)).T.double()
    assert columns.corrcoef().fill_diagonal_(0).abs().max() < 5 / 50_000 ** 0.5
    assert p.sign.unique().tolist() == [-1, 1]


def test_views_follow_from_the_generator_and_not_from_the_chunk():
    images, augment = random_images(1).repeat(90, 1, 1, 1), CropAugment(32, auto=True)
    views = augment(images, generator(3))
    assert views.shape == (90, 3, 32, 32) and views.dtype == torch.float32 and 0 <= views.min() <= views.max() <= 1
    assert torch.equal(views, augment(images, generator(3))) and not torch.equal(views, augment(images, generator(4)))
    assert len(views.unique(dim=0)) > 85  # equal images get views of their own
    p = augment.sample(90, 32, 32, generator(3))
    parts = [augment.apply(images[part], CropParameters(*(field[part] for field in p))) for part in
             (slice(0, 1), slice(1, 50), slice(50, 90))]
    assert torch.equal(torch.cat(parts), views)
    assert torch.equal(images, random_images(1).repeat(90, 1, 1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("auto", [False, True])
def test_cuda_gives_the_views_of_the_cpu(auto):
    images, augment = random_images(1024), CropAugment(32, auto)
    views = augment(images.cuda(), generator(1))
    torch.testing.assert_close(views.cpu(), augment(images, generator(1)), atol=1.01 / 255, rtol=0)
