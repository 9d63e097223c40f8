"""Test accuracy, overall, per class and by shots; logit adjustment; the kNN classifier that judges features."""

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import accuracy
from torch import nn

SHOTS = ("many", "medium", "few")


def shot_groups(class_counts, shot_thresholds):
    """Splits the classes by training images: boolean arrays (C,) of the many-, medium- and few-shot classes.

    class_counts: (C,) training images per class. shot_thresholds: (many above, few below), both exclusive.
    """
    class_counts = np.asarray(class_counts)
    many_above, few_below = shot_thresholds
    many, few = class_counts > many_above, class_counts < few_below
    return many, ~(many | few), few


def confusion_matrix(logits, targets):
    """Test images by true class (row) and predicted class (column): int64 (C, C) on the CPU.

    logits: float (N, C). targets: int64 (N,), in [0, C).
    """
    num_classes = logits.shape[1]
    cells = targets * num_classes + logits.argmax(dim=1)
    return torch.bincount(cells.cpu(), minlength=num_classes ** 2).reshape(num_classes, num_classes)


def classification_metrics(logits, targets, class_counts, shot_thresholds):
    """All figures of one evaluation, as Python floats.

    logits: float (N, C), N > 0. targets: int64 (N,), in [0, C). class_counts, shot_thresholds: as in `shot_groups`.
    Returns a dict: `acc1`, `acc5` in percent; `loss`, the mean cross-entropy in nats; `many`, `medium`, `few`, the
    fraction of the group's test images that are right, None where there are none; `per_class`, a list of the same.
    Raises ValueError where the shapes disagree.
    """
    if not (logits.ndim == 2 and 0 < len(logits) == len(targets) and logits.shape[1] == len(class_counts)):
        raise ValueError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)} and class_counts "
                         f"({len(class_counts)},): expected (N, C), (N,) and (C,) with N > 0")
    confusion = confusion_matrix(logits, targets).numpy()
    correct, total = confusion.diagonal(), confusion.sum(axis=1)

    def fraction(classes):
        return float(correct[classes].sum() / total[classes].sum()) if total[classes].sum() else None

    many, medium, few = shot_groups(class_counts, shot_thresholds)
    return {
        # counted here and not by timm, so that ties between logits cannot make it disagree with the groups
        "acc1": 100 * fraction(slice(None)),
        "acc5": accuracy(logits, targets, topk=(5,))[0].item(),
        "loss": F.cross_entropy(logits.double(), targets).item(),
        "many": fraction(many), "medium": fraction(medium), "few": fraction(few),
        "per_class": [fraction(c) for c in range(len(class_counts))],
    }


def log_class_shares(class_counts):
    """Log of each class's share of the images trained on: float64 (C,), -inf for a class without images.

    class_counts: (C,) images trained on per class, not all 0.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    return (counts / counts.sum()).log()


def adjust_logits(logits, class_counts, tau=1.0):
    """Logits with the prior of the training set taken out (Menon et al., arXiv 2007.07314): logits - tau log(share).

    At tau = 1 their argmax is consistent for the balanced accuracy, which long-tailed benchmarks report.

    Args:
        logits: float (N, C), of a classifier trained by plain cross-entropy.
        class_counts: (C,) images that it was trained on, per class. A class without any is never predicted.
        tau: 0 leaves the logits of the classes that have images as they are.

    Returns:
        float (N, C); -inf for a class without images.
    """
    log_shares = log_class_shares(class_counts).to(logits)
    return (logits - tau * log_shares).masked_fill(log_shares == -torch.inf, -torch.inf)


class LogitAdjustedLoss(nn.Module):
    """Cross-entropy of logits plus the log of each class's share (Menon et al., equation 10), a scalar.

    Args:
        class_counts: (C,) images trained on per class.

    Called with logits, float (N, C), and labels, int64 (N,). The logits need no adjustment at prediction then.
    """

    def __init__(self, class_counts):
        super().__init__()
        self.register_buffer("log_shares", log_class_shares(class_counts).float())

    def forward(self, logits, labels):
        return F.cross_entropy(logits + self.log_shares, labels)


class KNNClassifier(nn.Module):
    """Weighted k-nearest-neighbour classifier (Wu et al., arXiv 1805.01978, section 3.4) for long-tailed neighbours.

    A query's k nearest training images by cosine similarity s vote for their class with weight exp(s / temperature).
    Each vote is divided by the number of training images of its class: among long-tailed neighbours the largest classes
    would otherwise win nearly every vote.

    Args:
        features: float (N, D) of the training images.
        labels: int64 (N,), in [0, C).
        num_classes: C.
        k: neighbours that vote, at most N of them.
        temperature: > 0.
    """

    def __init__(self, features, labels, num_classes, k=200, temperature=0.1):
        super().__init__()
        self.k, self.temperature = min(k, len(features)), temperature
        self.register_buffer("features", F.normalize(features.float(), dim=1))
        self.register_buffer("labels", labels)
        # torch.bincount would wait for the GPU.
        counts = labels.new_zeros(num_classes).scatter_add(0, labels, torch.ones_like(labels))
        self.register_buffer("class_counts", counts)

    def forward(self, queries):
        """Votes for each class, float32 (Q, C), of features (Q, D). Computed in float32 under autocast too."""
        with torch.autocast(queries.device.type, enabled=False):
            similarity = F.normalize(queries.float(), dim=1) @ self.features.T
            nearest, index = similarity.topk(self.k, dim=1)
            voters = self.labels[index]
            weights = (nearest / self.temperature).exp() / self.class_counts[voters]
            votes = weights.new_zeros(len(queries), len(self.class_counts))
            return votes.scatter_add_(1, voters, weights)
