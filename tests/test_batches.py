"""The batches of an epoch: sizes, order, shares of several processes, and the augmentation of many batches at once."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_of

from util import batches
from util.augment import SimCLRAugment
from util.batches import DeviceLoader, derive_seed, to_device
from util.toy_data import ToyCIFAR

AUGMENT = SimCLRAugment(16, 1.0)
NOISE = SimpleNamespace(  # each image with its own label, so that a label tells which image it came with
    images=torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    labels=torch.arange(300) + 1000)


def loader(batch_size=10, seed=0, world_size=1, rank=0, **options):
    return DeviceLoader(NOISE, AUGMENT, one_of(world_size, rank), batch_size, seed, **options)


@pytest.mark.parametrize("images, batch_size, drop_last, expected", [
    (100, 10, False, [10] * 10), (103, 10, False, [10] * 10 + [3]), (103, 10, True, [10] * 10),
    (101, 10, False, [10] * 9 + [11]),  # batch norm cannot train on the one image left
    (101, 10, True, [10] * 10), (9, 10, False, [9]), (1, 10, False, [1])])
def test_sizes_of_batches(images, batch_size, drop_last, expected):
    assert loader(batch_size, drop_last=drop_last).batch_sizes(images) == expected


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("images", [119, 120, 41])
@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_an_epoch(images, drop_last, world_size):
    subset = torch.arange(images) * 2
    loaders = [loader(10, 0, world_size, rank, drop_last=drop_last) for rank in range(world_size)]
    shares = [of_process.indices(0, subset) for of_process in loaders]
    expected = images // world_size if drop_last else -(-images // world_size)
    for of_process, share in zip(loaders, shares, strict=True):
        sizes = [len(indices) for indices in share]
        assert sizes == of_process.batch_sizes(images) == loader(10, drop_last=drop_last).batch_sizes(expected)
    seen = torch.cat(sum(shares, ()))
    assert seen.dtype == torch.int64 and seen.tolist() != seen.sort().values.tolist()
    if drop_last:
        assert len(seen.unique()) == len(seen) and set(seen.tolist()) <= set(subset.tolist())
    else:  # an odd number of images makes one come twice, so that both processes get as many
        assert len(seen) == expected * world_size and seen.unique().tolist() == subset.tolist()
    together = loader(10 * world_size, drop_last=drop_last).indices(0, subset)
    for step in range(images // 20 - 1):
        assert set(together[step].tolist()) == set(torch.cat([share[step] for share in shares]).tolist())


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        return torch.cat(loader(8, seed).indices(epoch, torch.arange(50))).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_derived_seeds_differ_in_every_part():
    keys = [*itertools.product(range(3), repeat=4), (0, 1), (1, 0), (1,)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    torch.Generator().manual_seed(derive_seed(2**63 - 1, 10**6))  # of the largest --seed


def test_a_data_set_on_the_device_is_that_data_set():
    data = to_device(ToyCIFAR(10, train=False), torch.device("cpu"))
    images, labels = data.images, data.labels
    assert images.dtype == torch.uint8 and images.shape == (1000, 3, 32, 32) and labels.dtype == torch.int64
    assert np.array_equal(images[700].permute(1, 2, 0), data.data[700]) and labels.tolist() == data.targets


@pytest.mark.parametrize("block", [1, 130, 1024])  # images: one batch at once, two or three, all
@pytest.mark.parametrize("num_views, rank, batch_size", [(1, 0, 57), (2, 1, 43)])
def test_one_generator_augments_block_after_block(block, num_views, rank, batch_size, monkeypatch):
    monkeypatch.setattr(batches, "BLOCK", block)
    of_process = loader(batch_size, 5, 2, rank, views_per_image=num_views)
    yielded = list(of_process.epoch(3, torch.arange(297)))
    steps_indices = of_process.indices(3, torch.arange(297))
    assert len(yielded) == len(steps_indices)
    generator, steps = torch.Generator().manual_seed(derive_seed(5, 3, rank)), max(1, block // batch_size)
    for first in range(0, len(yielded), steps):
        images = NOISE.images[torch.cat(steps_indices[first:first + steps])]
        for view in range(num_views):
            found = torch.cat([views[view] for views, _ in yielded[first:first + steps]])
            assert torch.equal(found, AUGMENT(images, generator))
    for (views, labels), indices in zip(yielded, steps_indices, strict=True):
        assert len(views) == num_views and torch.equal(labels, NOISE.labels[indices])
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)


def test_what_is_random_in_the_network_follows_from_seed_epoch_and_process():
    def noise(seed=5, epoch=3, rank=0):
        batches_of_epoch = loader(5, seed, 2, rank).epoch(epoch, torch.arange(30))
        return [torch.rand(()).item() for _ in batches_of_epoch]

    assert noise() == noise() and len(noise()) == 3
    assert len({*noise(), *noise(seed=6), *noise(epoch=4), *noise(rank=1)}) == 12
