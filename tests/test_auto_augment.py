"""Crop, AutoAugment and Cutout against torchvision's transforms on PIL images."""
import pytest
import torch
import torchvision.transforms.functional as F
from scipy import stats
from test_augment import generator, random_images
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from util.auto_augment import CropAugment

POLICIES = AutoAugment(AutoAugmentPolicy.CIFAR10).policies


def sampled(num_images, size=32):
    return CropAugment(size, auto=True).sample(num_images, size, size, generator())


def nothing_happens(num_images, size=32):
    no = torch.zeros(num_images, 2, dtype=torch.bool)
    return sampled(num_images, size)._replace(
        offset=torch.full((num_images, 2), size // 8), flip=no[:, 0], happens=no,
        hole=torch.full((num_images, 2), -1000))


def by_torchvision(image, policy, happens, sign):
    """torchvision's AutoAugment of a PIL image, with these in place of what it draws."""
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10)
    theirs.get_params = lambda number: (policy, torch.where(happens, -1.0, 2.0), sign > 0)
    return F.pil_to_tensor(theirs(F.to_pil_image(image)))


# One step of 255 at most: PIL rounds the grey that it blends with, torchvision's tensors cut it off. Where a rotation
# lands exactly between two pixels, which happens at 48 pixels, PIL's fixed-point numbers may take the other one.
@pytest.mark.parametrize("size", [32, 48])
def test_each_sub_policy_is_torchvisions(size):
    images = random_images(12, size, size)
    images[0], images[1] = 128, images[1] // 4 + 90  # one colour; little contrast
    policy, *signs, number = torch.cartesian_prod(torch.arange(25), *[torch.tensor([-1, 1])] * 2, torch.arange(12)).T
    images, sign = images[number], torch.stack(signs, dim=1)

    def augment(images, *happens):
        happens = torch.tensor(happens).expand(len(images), 2)
        p = nothing_happens(len(images), size)._replace(policy=policy, sign=sign, happens=happens)
        return CropAugment(size, auto=True).apply(images, p).mul(255).round().byte()

    for step, happens in enumerate([(True, False), (False, True)]):
        ours, happens = augment(images, *happens), torch.tensor(happens)
        theirs = torch.stack([by_torchvision(image, row.item(), happens, signs)
                              for image, row, signs in zip(images, policy, sign, strict=True)])
        difference = (ours.int() - theirs.int()).abs().amax(1)
        rotates = torch.tensor([policy[step][0] == "Rotate" for policy in POLICIES])[policy]
        assert difference[~rotates].max() <= 1
        assert not rotates.any() or (difference[rotates] > 0).float().mean() < 5e-4
    assert torch.equal(augment(images, True, True), augment(augment(images, True, False), False, True))
    assert torch.equal(augment(images, False, False), images)


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
    expected = torch.stack([F.to_tensor(F.resize(F.to_pil_image(image), [size, size])) for image in images])
    views = CropAugment(size).apply(images, nothing_happens(3, size))
    torch.testing.assert_close(views, expected, atol=1.01 / 255, rtol=0)


def test_cutout_fills_a_square_clipped_at_the_border():
    images, holes = random_images(4), torch.tensor([[10, 20], [0, 0], [31, 31], [16, 3]])
    views = CropAugment(32, auto=True).apply(images, nothing_happens(4)._replace(hole=holes))
    expected, mean = images / 255, torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    expected[0, :, 2:18, 12:28] = expected[1, :, :8, :8] = expected[2, :, 23:, 23:] = expected[3, :, 8:24, :11] = mean
    assert torch.equal(views, expected)


def test_parameters_are_distributed_as_the_policy_says():
    p = sampled(50_000)
    assert p.hole.min() == 0 and p.hole.max() == 31
    for counts in (p.policy.bincount(), *(column.bincount() for column in (*p.hole.T, *p.offset.T))):
        assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.binomtest(int(p.flip.sum()), 50_000, 0.5).pvalue > 1e-4
    for number, row in enumerate(POLICIES):
        for step, (_, probability, _) in enumerate(row):
            happens = p.happens[p.policy == number, step]
            assert stats.binomtest(int(happens.sum()), len(happens), probability).pvalue > 1e-5
    columns = torch.column_stack((*p.offset.T, p.flip, p.policy, *p.sign.T, *p.hole.T)).T.double()
    assert columns.corrcoef().fill_diagonal_(0).abs().max() < 5 / 50_000 ** 0.5
    assert p.sign.unique().tolist() == [-1, 1]
