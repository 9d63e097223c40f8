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


def move(tensor, device):
    """`tensor`, of the CPU, on `device`. Nothing waits for the transfer."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def derive_seed(*key):
    """A seed for PyTorch's generators, one per tuple of non-negative integers."""
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)  # (1,) is not (1, 0)


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

    def batch_sizes(self, num_images):
        """Images of each step of an epoch over `num_images`, the same in every process: a list of ints.

        A last batch of one image joins the one before it, since batch norm cannot train on one value per channel.
        """
        share = num_images / self.processes.world_size
        whole, rest = divmod(math.floor(share) if self.drop_last else math.ceil(share), self.batch_size)
        sizes = [self.batch_size] * whole
        if rest == 1 and whole and not self.drop_last:
            sizes[-1] += 1
        elif rest and not self.drop_last:
            sizes.append(rest)
        return sizes

    def indices(self, epoch, subset):
        """The images of each step of this process, int64 tensors on the device: a random order of `subset`, (n,)."""
        world_size = self.processes.world_size
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = subset[torch.randperm(len(subset), generator=generator)]
        share = math.ceil(len(order) / world_size)  # images are repeated until every process has as many
        order = move(order.repeat(math.ceil(share * world_size / len(order))), self.images.device)
        mine = order[self.processes.rank:share * world_size:world_size]
        sizes = self.batch_sizes(len(subset))
        return mine[:sum(sizes)].split(sizes)

    def epoch(self, epoch, subset):
        """Yield each step's views, a tuple of float (n, 3, size, size) in [0, 1], and labels, int64 (n,)."""
        indices = self.indices(epoch, subset)
        seed = derive_seed(self.seed, epoch, self.processes.rank)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # for what is random in the network
        steps_per_block = max(1, BLOCK // self.batch_size)
        for first in range(0, len(indices), steps_per_block):
            block = indices[first:first + steps_per_block]
            pixels, sizes = self.images[torch.cat(block)], [len(of_step) for of_step in block]
            views = []
            for _ in range(self.views_per_image):
                augmented = self.augment(pixels, generator).contiguous(memory_format=torch.channels_last)
                views.append(augmented.split(sizes))
            for of_step, *views_of_step in zip(block, *views, strict=True):
                yield tuple(views_of_step), self.labels[of_step]
