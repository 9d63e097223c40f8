"""The k-nearest-neighbour classifier that judges the features of stage 1."""

import torch
import torch.nn.functional as F
from torch import nn


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
            # Less the nearest one's, so that no temperature is too low for exp; it scales all votes of a query alike.
            weights = ((nearest - nearest[:, :1]) / self.temperature).exp() / self.class_counts[voters]
            votes = weights.new_zeros(len(queries), len(self.class_counts))
            return votes.scatter_add_(1, voters, weights)
