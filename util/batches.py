"""Batches of augmented images. The whole data set lies on the device and is augmented there."""
import math

import numpy as np
import torch

BLOCK = 1024  # images augmented at once: a batch of stage 1 on CIFAR-10, 16 batches of the later stages


def to_device(dataset, device):
    """Give a data set its `images`, uint8 (N, 3, H, W), and `labels`, int64 (N,), on `device`. Returns the data set.

    They are made of its `data`, uint8 (N, H, W, 3), and `targets`, N integers of any type.

    Raises:
        TypeError: `data` are not bytes, or `targets` no integers.
    """
    data, targets = np.asarray(dataset.data), np.asarray(dataset.targets)
    if data.dtype != np.uint8 or not np.issubdtype(targets.dtype, np.integer):
        raise TypeError(f"data of {data.dtype} and targets of {targets.dtype}, expected uint8 and integers")
    dataset.images = torch.from_numpy(data).to(device).permute(0, 3, 1, 2)
    dataset.labels = torch.from_numpy(targets.astype(np.int64)).to(device)
    return dataset


def derive_seed(*key):
    """A seed for PyTorch's generators, one per tuple of non-negative integers."""
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)  # (1,) is not (1, 0)


def split_epoch(num_images, batch_size, drop_last=False):
    """Sizes of an epoch's batches: a list of ints. With `drop_last`, an incomplete last batch is left out.

    A last batch of one image joins the batch before it, since batch norm cannot train on a single value per channel.
    """
    whole, rest = divmod(num_images, batch_size)
    sizes = [batch_size] * whole
    if rest == 1 and whole and not drop_last:
        sizes[-1] += 1
    elif rest and not drop_last:
        sizes.append(rest)
    return sizes


class DeviceLoader:
    """Like a DataLoader, for images that lie on the device and are augmented there.

    Args:
        dataset: has `images` and `labels`, as of `to_device`.
        augment: called as augment(images, generator); see util.augment.
        processes: Processes. Each gets its share of every batch.
        batch_size: images per process and step.
        seed: determines every random choice, together with epoch and process.
        views_per_image: 2 in stage 1.
        drop_last: leave out an incomplete last batch.
    """

    def __init__(self, dataset, augment, processes, batch_size, seed, views_per_image=1, drop_last=False):
        self.images, self.labels = dataset.images, dataset.labels
        self.augment, self.processes = augment, processes
        self.batch_size, self.seed, self.views_per_image, self.drop_last = batch_size, seed, views_per_image, drop_last

    def steps(self, num_images):
        """Batches of an epoch of `num_images`."""
        return len(self._sizes(num_images))

    def _sizes(self, num_images):
        """Images of each batch, the same in every process."""
        share = num_images / self.processes.world_size
        return split_epoch(math.floor(share) if self.drop_last else math.ceil(share), self.batch_size, self.drop_last)

    def epoch(self, epoch, subset):
        """The batches of an epoch over the images `subset` (int64 indices (n,) on the CPU), in random order."""
        world_size = self.processes.world_size
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = subset[torch.randperm(len(subset), generator=generator)]
        share = math.ceil(len(order) / world_size)  # images are repeated until every process has as many
        order = order.repeat(math.ceil(share * world_size / len(order))).to(self.images.device)
        mine = order[self.processes.rank:share * world_size:world_size]
        sizes = self._sizes(len(subset))
        return EpochBatches(self, epoch, mine[:sum(sizes)].split(sizes))


class EpochBatches:
    """Yields (views, labels) of each step: a tuple of float (n, 3, size, size) views in [0, 1], and int64 (n,).

    Attribute `indices`: the images of each step, a list of int64 tensors.
    """

    def __init__(self, loader, epoch, indices):
        self.loader, self.epoch, self.indices = loader, epoch, indices

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        loader = self.loader
        seed = derive_seed(loader.seed, self.epoch, loader.processes.rank)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # for what is random in the network
        steps_per_block = max(1, BLOCK // loader.batch_size)
        for first in range(0, len(self), steps_per_block):
            block = self.indices[first:first + steps_per_block]
            pixels, sizes = loader.images[torch.cat(block)], [len(indices) for indices in block]
            views = []
            for _ in range(loader.views_per_image):
                augmented = loader.augment(pixels, generator).contiguous(memory_format=torch.channels_last)
                views.append(augmented.split(sizes))
            for indices, *views_of_step in zip(block, *views, strict=True):
                yield tuple(views_of_step), loader.labels[indices]
