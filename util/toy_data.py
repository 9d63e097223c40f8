"""A stand-in for long-tailed CIFAR that NumPy renders in memory, without a file: textured shapes on a background.

Only outline and texture tell the classes apart. Position, scale, tilt, colours, background and noise are chosen afresh
for every image, and no class depends on colour or on left and right, so the augmentation of stage 1 keeps the classes.
"""

import numpy as np

from util.imbalanced_cifar import long_tailed_counts

# radius over the angle, around 0.7
OUTLINES = {
    "disc": lambda angle: np.full_like(angle, 0.8),
    "ellipse": lambda angle: 0.45 / np.sqrt(1 - 0.8 * np.cos(angle) ** 2),
    "triangle": lambda angle: 0.5 / np.cos(angle % (2 * np.pi / 3) - np.pi / 3),
    "square": lambda angle: 0.7 / np.cos(angle % (np.pi / 2) - np.pi / 4),
    "clover": lambda angle: 0.75 + 0.3 * np.cos(3 * angle),
    "cross": lambda angle: 0.75 + 0.3 * np.cos(4 * angle),
    "star": lambda angle: 0.75 + 0.3 * np.cos(5 * angle),
    "flower": lambda angle: 0.8 + 0.2 * np.cos(7 * angle),
    "peanut": lambda angle: 0.7 + 0.35 * np.cos(2 * angle),
    "heart": lambda angle: 0.7 + 0.35 * np.cos(angle) - 0.2 * np.cos(2 * angle),
}
# brightness, about -1 to 1, over coordinates that turn with the object, in radians of the texture's wavelength
TEXTURES = {
    "striped": lambda u, v: np.sin(u),
    "chequered": lambda u, v: np.sign(np.sin(u) * np.sin(v)),
    "dotted": lambda u, v: np.where(np.cos(u) + np.cos(v) > 0.8, 1, -1),
    "ringed": lambda u, v: np.sin(np.hypot(u, v)),
    "wavy": lambda u, v: np.sin(u + 1.5 * np.sin(v)),
    "gridded": lambda u, v: np.where(np.maximum(np.cos(u), np.cos(v)) > 0.7, 1, -1),
    "zigzag": lambda u, v: np.sin(u + np.pi * np.abs(v / np.pi % 2 - 1)),
    "plain": lambda u, v: np.zeros_like(u),
    "spoked": lambda u, v: np.sin(6 * np.arctan2(v, u)),
    "honeycombed": lambda u, v: 0.7 * (np.cos(u) + np.cos(u / 2 + 0.866 * v) + np.cos(u / 2 - 0.866 * v)) - 0.4,
}


def render_images(outline, texture, count, rng):
    """Renders `count` objects of one kind: uint8 (count, 32, 32, 3). outline, texture: a value of the tables above."""
    def uniform(low, high, channels=1):
        return rng.uniform(low, high, (count, 1, 1, channels)).astype(np.float32)

    y, x = np.mgrid[-1:1:32j, -1:1:32j].astype(np.float32)[..., None]
    x, y = x - uniform(-0.35, 0.35), y - uniform(-0.35, 0.35)
    tilt, scale, frequency = uniform(0, 2 * np.pi), uniform(0.6, 1), uniform(12, 18)
    u, v = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    edge = scale * outline(np.arctan2(v, u)) - np.hypot(u, v)
    inside = np.clip(16 * edge + 0.5, 0, 1)  # 16 pixels to the unit: an edge one pixel soft
    brightness = texture(frequency * u + uniform(-3, 3), frequency * v + uniform(-3, 3))
    waves = np.sin(uniform(-6, 6) * x + uniform(-6, 6) * y)
    surface = uniform(60, 196, channels=3) + uniform(30, 60) * brightness
    background = uniform(0, 256, channels=3) + 60 * waves
    noise = rng.normal(0, 20, (count, 32, 32, 3))
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
        self.num_classes = num_classes
        counts = long_tailed_counts(num_classes, n_max, imbalanced_factor)
        self.class_counts = counts if train else np.full(num_classes, n_test)
        self.targets = np.repeat(np.arange(num_classes), self.class_counts).tolist()

        outlines, textures = list(OUTLINES), list(TEXTURES)
        kinds = [(outlines[c % 10], textures[(c + c // 10) % 10]) for c in range(num_classes)]
        self.classes = [f"{texture} {outline}" for outline, texture in kinds]
        rng = np.random.default_rng([num_classes, train])
        self.data = np.concatenate([render_images(OUTLINES[outline], TEXTURES[texture], count, rng)
                                    for (outline, texture), count in zip(kinds, self.class_counts, strict=True)])

    def __len__(self):
        return len(self.data)
