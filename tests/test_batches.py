"""The batches of an epoch: sizes, order, shares of several processes, and the augmentation of many batches at once."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_of

from util import batches
from util.augment import SimCLRAugment
from util.batches import DeviceLoader, derive_seed, split_epoch, to_device
from util.toy_data import ToyCIFAR

AUGMENT = SimCLRAugment(16, 1.0)


@pytest.fixture(scope="module")
def toy():
    """300 images of noise, each with its own label, so that a label tells which image it came with."""
    images = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(images=images, labels=torch.arange(300) + 1000)


def loader(num_images=100, batch_size=10, seed=0, world_size=1, rank=0, **options):
    """Of images that nobody looks at."""
    images, labels = torch.zeros(num_images, 3, 2, 2, dtype=torch.uint8), torch.arange(num_images)
    dataset = SimpleNamespace(images=images, labels=labels)
    return DeviceLoader(dataset, AUGMENT, one_of(world_size, rank), batch_size, seed, **options)


# --------------------------------------------------------------------------------------- which images


@pytest.mark.parametrize("images, batch_size, drop_last, expected", [
    (100, 10, False, [10] * 10), (103, 10, False, [10] * 10 + [3]), (103, 10, True, [10] * 10),
    (101, 10, False, [10] * 9 + [11]),  # batch norm cannot train on the one image left
    (101, 10, True, [10] * 10), (9, 10, False, [9]), (9, 10, True, []), (1, 10, False, [1]), (3, 2, False, [3])])
def test_sizes_of_batches(images, batch_size, drop_last, expected):
    assert split_epoch(images, batch_size, drop_last) == expected
    mine = loader(images, batch_size, drop_last=drop_last)
    assert mine.steps(images) == len(expected)
    assert [len(indices) for indices in mine.epoch(0, torch.arange(images)).indices] == expected


def test_an_epoch_is_a_permutation_of_its_subset():
    subset = torch.arange(103) * 2
    epoch = loader(206).epoch(0, subset)
    order = torch.cat(epoch.indices)
    assert len(epoch) == 11 and order.dtype == torch.int64
    assert order.sort().values.tolist() == subset.tolist() != order.tolist()
    dropped = torch.cat(loader(206, drop_last=True).epoch(0, subset).indices)
    assert dropped.tolist() == order[:100].tolist()


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        return torch.cat(loader(50, 8, seed).epoch(epoch, torch.arange(50)).indices).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("images", [103, 120, 41])
@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_an_epoch(images, drop_last):
    everything = torch.arange(images)
    shares = [loader(images, 10, 0, 2, rank, drop_last=drop_last).epoch(0, everything).indices for rank in range(2)]
    sizes = [[len(indices) for indices in share] for share in shares]
    assert sizes[0] == sizes[1] == split_epoch(images // 2 if drop_last else -(-images // 2), 10, drop_last)
    assert loader(images, 10, 0, 2, drop_last=drop_last).steps(images) == len(sizes[0])
    seen = torch.cat(shares[0] + shares[1])
    if drop_last:
        assert len(seen.unique()) == len(seen) == 20 * len(sizes[0])
    else:  # an odd number of images makes one come twice, so that all processes get as many
        assert len(seen) == images + images % 2 and seen.unique().tolist() == everything.tolist()
    together = loader(images, 20, drop_last=drop_last).epoch(0, everything).indices
    for step in range(images // 20 - 1):
        assert set(together[step].tolist()) == set(torch.cat([share[step] for share in shares]).tolist())


def test_derive_seeds_differ_in_every_part():
    keys = itertools.product(range(3), repeat=4)
    seeds = {derive_seed(*key) for key in keys} | {derive_seed(0, 1), derive_seed(1, 0), derive_seed(1)}
    assert len(seeds) == 84 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(5, 6, 7) == derive_seed(5, 6, 7)
    torch.Generator().manual_seed(derive_seed(2**63 - 1, 10**6))  # of the largest --seed


def test_a_data_set_on_the_device_is_that_data_set():
    data = ToyCIFAR(10, train=False)
    assert to_device(data, torch.device("cpu")) is data
    images, labels = data.images, data.labels
    assert images.dtype == torch.uint8 and images.shape == (1000, 3, 32, 32) and labels.dtype == torch.int64
    assert np.array_equal(images[700].permute(1, 2, 0), data.data[700]) and labels.tolist() == data.targets


# --------------------------------------------------------------------------------------- how they look


@pytest.mark.parametrize("block", [1, 130, 1024])  # images: one batch at once, two or three, all
@pytest.mark.parametrize("num_views, rank, batch_size", [(1, 0, 57), (2, 1, 43)])
def test_one_generator_augments_block_after_block(block, num_views, rank, batch_size, toy, monkeypatch):
    monkeypatch.setattr(batches, "BLOCK", block)
    images, labels = toy.images, toy.labels
    epoch = DeviceLoader(toy, AUGMENT, one_of(2, rank), batch_size, 5, num_views).epoch(3, torch.arange(297))
    yielded = list(epoch)
    assert len(yielded) == len(epoch) == len(epoch.indices) == -(-149 // batch_size)
    generator, steps = torch.Generator().manual_seed(derive_seed(5, 3, rank)), max(1, block // batch_size)
    for first in range(0, len(epoch), steps):
        mine = images[torch.cat(epoch.indices[first:first + steps])]
        for view in range(num_views):
            expected = AUGMENT(mine, generator)
            found = torch.cat([views[view] for views, _ in yielded[first:first + steps]])
            assert torch.equal(found, expected)
    for (views, of_views), indices in zip(yielded, epoch.indices, strict=True):
        assert len(views) == num_views and torch.equal(of_views, labels[indices])
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    for first, second in itertools.combinations([view for views, _ in yielded for view in views], 2):
        assert first.shape != second.shape or not torch.equal(first, second)


def test_what_is_random_in_the_network_follows_from_seed_epoch_and_process(toy):
    def noise(seed=5, epoch=3, rank=0):
        of_epoch = DeviceLoader(toy, AUGMENT, one_of(2, rank), 5, seed).epoch(epoch, torch.arange(30))
        return [torch.rand(()).item() for _ in of_epoch]

    assert noise() == noise() and len(noise()) == 3
    assert len({*noise(), *noise(seed=6), *noise(epoch=4), *noise(rank=1)}) == 12
