"""A stand-in for long-tailed CIFAR that NumPy renders in memory, without a file: flowers on a background.

Only the number of petals and the pattern on them tell the classes apart. Position, scale, turn, colours, background and
noise are chosen afresh for every image, so the augmentation of stage 1 keeps the classes.
"""
from itertools import combinations_with_replacement

import numpy as np

from util.imbalanced_cifar import long_tailed_counts

PATTERNS = list(combinations_with_replacement(range(4), 2))  # ten pairs: waves along and across the flower


def render_flowers(petals, pattern, count, rng):
    """Render `count` flowers with so many petals (0: a disc) and one of PATTERNS: uint8 (count, 32, 32, 3)."""
    def uniform(low, high, channels=1):
        return rng.uniform(low, high, (count, 1, 1, channels)).astype(np.float32)

    y, x = np.mgrid[-1:1:32j, -1:1:32j].astype(np.float32)[..., None]
    background = uniform(0, 256, channels=3) + 60 * np.sin(uniform(-6, 6) * x + uniform(-6, 6) * y)
    x, y, turn = x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2), uniform(0, 2 * np.pi)
    along, across = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    outline = uniform(0.8, 1.1) * (0.75 + 0.25 * np.cos(petals * np.arctan2(across, along)))
    inside = np.clip(16 * (outline - np.hypot(x, y)) + 0.5, 0, 1)  # 16 pixels to the unit: an edge one pixel soft
    frequency = uniform(6, 7)
    waves = np.sin(pattern[0] * frequency * along + 1) * np.sin(pattern[1] * frequency * across + 1)
    surface = uniform(60, 196, channels=3) + uniform(50, 80) * waves
    noise = rng.normal(0, 12, (count, 32, 32, 3))
    return np.clip(inside * surface + (1 - inside) * background + noise, 0, 255).astype(np.uint8)


class ToyCIFAR:
    """Toy counterpart of ImbalanceCIFAR10 (num_classes=10) and ImbalanceCIFAR100 (100), with far fewer images.

    `data` uint8 (N, 32, 32, 3), `targets` list of N ints, `class_counts` int64 (num_classes,), `classes` their names.
    The largest training class has 500 or 100 images, so that factor 100 leaves the smallest 5 or 1; `shot_thresholds`
    shrink with it, which keeps CIFAR's groups. The test set has 100 or 20 images per class. Nothing varies by run.
    Raises UserError for a bad factor.
    """

    def __init__(self, num_classes, imbalanced_factor=100.0, train=True):
        n_max, n_test, self.shot_thresholds = (500, 100, (50, 20)) if num_classes == 10 else (100, 20, (20, 4))
        counts = long_tailed_counts(num_classes, n_max, imbalanced_factor)
        self.class_counts = counts if train else np.full(num_classes, n_test)
        self.targets = np.repeat(np.arange(num_classes), self.class_counts).tolist()
        kinds = [(c % 10, PATTERNS[(3 * c + c // 10) % 10]) for c in range(num_classes)]
        self.classes = [f"{petals} petals, pattern {pattern}" for petals, pattern in kinds]
        rng = np.random.default_rng([num_classes, train])
        self.data = np.concatenate([render_flowers(petals, pattern, count, rng)
                                    for (petals, pattern), count in zip(kinds, self.class_counts, strict=True)])

    def __len__(self):
        return len(self.data)
