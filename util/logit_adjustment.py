"""Logit adjustment (Menon et al., arXiv 2007.07314): the prior of the images trained on, taken out of the logits."""

import torch
import torch.nn.functional as F
from torch import nn


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

    Raises:
        ValueError: class_counts has another length.
    """
    if len(class_counts) != logits.shape[1]:
        raise ValueError(f"{len(class_counts)} class_counts for {logits.shape[1]} columns of logits")
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
