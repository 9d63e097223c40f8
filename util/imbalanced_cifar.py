"""CIFAR-10-LT and CIFAR-100-LT: torchvision's CIFAR with a training set cut to an exponential class distribution."""

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from util.errors import UserError


def long_tailed_counts(num_classes, n_max, imbalanced_factor):
    """Training images per class, falling exponentially from `n_max` to n_max / imbalanced_factor.

    The profile is that of Cui et al. (arXiv 1901.05555), which Lin and Yuan (arXiv 2510.08836) train on.
    Returns an int64 array (num_classes,), all >= 1; num_classes is 2 or more. Raises UserError for a factor that is
    below 1, not finite, or leaves a class without images.
    """
    if not 1 <= imbalanced_factor <= n_max:
        raise UserError(f"--imbalanced_factor {imbalanced_factor:g}: expected a number from 1 (balanced) to {n_max}, "
                        f"the images of the largest class")
    shares = [(1 / imbalanced_factor) ** (c / (num_classes - 1)) for c in range(num_classes)]
    return np.array([max(1, int(n_max * share)) for share in shares])  # 49 * (1 / 49) is less than 1


def long_tailed_indices(targets, counts):
    """Indices of the images kept: class by class, each in the shuffled order of one RandomState(0), cut to its count.

    targets: (N,) integer labels. counts: (C,) images to keep per class. Returns an int64 array (counts.sum(),).
    """
    targets = np.asarray(targets)
    rng = np.random.RandomState(0)  # legacy generator and seed are part of the benchmark: they decide which images
    kept = []
    for label, count in enumerate(counts):
        candidates = np.flatnonzero(targets == label)
        rng.shuffle(candidates)
        kept.append(candidates[:count])
    return np.concatenate(kept)


class LongTailedMixin:
    """Cuts a torchvision CIFAR class to its long-tailed training set; the test set stays whole and balanced.

    Attributes: `data` uint8 (N, 32, 32, 3), `targets` list of N ints, `class_counts` int64 (num_classes,),
    `shot_thresholds` (many above, few below) in training images per class.
    Raises UserError for a bad factor, and what torchvision raises for files that are absent or not the originals.
    """

    def __init__(self, root, imbalanced_factor=100.0, train=True, download=False):
        counts = long_tailed_counts(self.num_classes, self.n_max, imbalanced_factor)
        super().__init__(root, train, download=download)
        kept = long_tailed_indices(self.targets, counts) if train else np.arange(len(self.data))
        self.data = np.ascontiguousarray(self.data[kept])  # torchvision's is a transposed view
        self.targets = [self.targets[i] for i in kept]
        self.class_counts = np.bincount(self.targets, minlength=self.num_classes)

    @classmethod
    def fetch(cls, root):
        """Download the data set to `root` unless it is there."""
        cls(root, imbalanced_factor=1.0, train=False, download=True)


class ImbalanceCIFAR10(LongTailedMixin, CIFAR10):
    num_classes, n_max, shot_thresholds = 10, 5000, (500, 200)


class ImbalanceCIFAR100(LongTailedMixin, CIFAR100):
    num_classes, n_max, shot_thresholds = 100, 500, (100, 20)


DATASETS = {"cifar10": ImbalanceCIFAR10, "cifar100": ImbalanceCIFAR100}
