"""Test accuracy, overall, per class and by shots."""

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import accuracy

SHOTS = ("many", "medium", "few")


def classification_metrics(logits, targets, class_counts, shot_thresholds):
    """All figures of one evaluation, as Python floats.

    logits: float (N, C), N > 0, on the CPU. targets: int64 (N,), in [0, C).
    class_counts: (C,) training images per class. shot_thresholds: (many above, few below), both exclusive.
    Returns a dict: `acc1`, `acc5` in percent; `loss`, the mean cross-entropy in nats; `many`, `medium`, `few`, the
    fraction of the group's test images that are right, None where there are none; `per_class`, a list of the same.
    Raises ValueError where the shapes disagree.
    """
    if not (logits.ndim == 2 and 0 < len(logits) == len(targets) and logits.shape[1] == len(class_counts)):
        raise ValueError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)} and class_counts "
                         f"({len(class_counts)},): expected (N, C), (N,) and (C,) with N > 0")
    is_right = logits.argmax(dim=1) == targets
    correct = torch.bincount(targets[is_right], minlength=len(class_counts)).numpy()
    total = torch.bincount(targets, minlength=len(class_counts)).numpy()

    def fraction(classes):
        return float(correct[classes].sum() / total[classes].sum()) if total[classes].sum() else None

    many_above, few_below = shot_thresholds
    many, few = np.asarray(class_counts) > many_above, np.asarray(class_counts) < few_below
    return {
        # counted here and not by timm, so that ties between logits cannot make it disagree with the groups
        "acc1": 100 * fraction(slice(None)),
        "acc5": accuracy(logits, targets, topk=(5,))[0].item(),
        "loss": F.cross_entropy(logits.double(), targets).item(),
        "many": fraction(many), "medium": fraction(~(many | few)), "few": fraction(few),
        "per_class": [fraction(c) for c in range(len(class_counts))],
    }
