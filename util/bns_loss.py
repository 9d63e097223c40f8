"""Balanced negative sampling, the contrastive loss of stage 1 (Lin and Yuan, arXiv 2510.08836)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (V, N, ...) of all processes joined along N, with gradients.

    Each process then holds the same loss, and DDP's mean over processes gives one process's gradient on all rows.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return torch.cat(all_gather(rows), dim=1)
    return rows


class BNSLoss(nn.Module):
    """Contrastive loss between two views of N images, where images of one label are positives of each other.

    Args:
        temperature: > 0, divides the cosine similarities. The published form sums their exponentials, which
            overflow float32 below about 0.0122 for 1024 rows.
        form: "published", the loss of the authors' code, or "eq12", equation 12 of the paper.
        num_extra_positives: >= 0, the m of equation 12: how many other images of its label are anchors of an image.
            They are the next ones in the batch, cyclically: random in a random batch, without a random state.
    """

    def __init__(self, temperature: float = 0.5, form: str = "published", num_extra_positives: int = 4):
        super().__init__()
        self.temperature, self.num_extra_positives = temperature, num_extra_positives
        self.loss = {"published": self._published, "eq12": self._eq12}[form]

    def forward(self, emb_i: Tensor, emb_j: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch, or of the equally large batches of all processes together.

        Every image has a positive, its own other view. Without negatives their sum is empty, so 0.

        Args:
            emb_i, emb_j: (N, D) floats, N >= 1: projections of the two views, normalised here.
            labels: (N,) int64.

        Returns:
            Scalar, float32 (computed in float32 under autocast too), or float64 for float64 embeddings.

        Raises:
            ValueError: a shape is wrong.
        """
        if emb_i.ndim != 2 or len(emb_i) == 0:
            raise ValueError(f"emb_i has shape {tuple(emb_i.shape)}, expected (N, D) with N >= 1")
        if emb_j.shape != emb_i.shape:
            raise ValueError(f"emb_j has shape {tuple(emb_j.shape)}, expected that of emb_i, {tuple(emb_i.shape)}")
        if labels.shape != emb_i.shape[:1]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, expected ({len(emb_i)},)")
        with torch.autocast(emb_i.device.type, enabled=False):
            views = torch.stack((emb_i, emb_j))
            views = gather_rows(F.normalize(views.to(torch.promote_types(views.dtype, torch.float32)), dim=-1))
            labels = gather_rows(labels[None])[0]
            return self.loss(*views, labels)

    def _published(self, z_i: Tensor, z_j: Tensor, labels: Tensor) -> Tensor:
        z, labels = torch.cat((z_i, z_j)), labels.repeat(2)
        same_label = labels[:, None] == labels
        num_positives = same_label.sum(1) - 1
        similarity = (z / self.temperature @ z.T).fill_diagonal_(-torch.inf).exp_()
        # Each sum adds up its own terms: at low temperatures the negatives are less than the rounding of the positives.
        mean_positive = torch.where(same_label, similarity, 0).sum(1) / num_positives
        negatives = torch.where(same_label, 0, similarity).sum(1)
        return -(F.logsigmoid(mean_positive) + F.logsigmoid(-negatives / len(z))).mean()

    def _eq12(self, q: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        logits = q / self.temperature @ v.T
        same_label = labels[:, None] == labels
        num_same = same_label.sum(1)
        rank = same_label.tril(-1).sum(1)  # among the images of the label
        is_anchor = same_label & ((rank[:, None] - rank) % num_same <= self.num_extra_positives)
        anchor_weight = is_anchor.to(logits.dtype) / num_same.clamp(max=self.num_extra_positives + 1)
        # An image is an anchor of as many images as it has anchors, so the terms of its negatives weigh 1 in total.
        log_sigmoid = F.logsigmoid(logits)
        return -torch.where(same_label, anchor_weight * log_sigmoid, log_sigmoid - logits).sum() / len(labels)
