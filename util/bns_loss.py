"""Balanced negative sampling, the contrastive loss of stage 1 (Lin and Yuan, arXiv 2510.08836, section on BNS)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather


def _gather(rows: Tensor) -> Tensor:
    """Rows (V, N, ...) of every process joined along N, with gradients. Alone, the rows as they are.

    Every process then holds the same loss, and DDP's mean over processes gives the gradient of one process on all rows.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return torch.cat(all_gather(rows), dim=1)
    return rows


class BNSLoss(nn.Module):
    """Contrastive loss between two views of N images, where images of one label are positives of each other.

    Args:
        temperature: divides the cosine similarities, > 0. The published form takes their exponential, which float32
            holds down to a temperature of about 0.012.
        form: "published", the loss of the authors' code, or "eq12", equation 12 of the paper.
        num_extra_positives: m of equation 12, >= 0: further anchors of the same label for each image. They are the
            next m images of that label in the batch, cyclically; batches are random permutations, so this draws them
            at random without a random state. Unused by the published form.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, temperature: float = 0.5, form: str = "published", num_extra_positives: int = 4):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected a number above 0")
        if form not in ("published", "eq12"):
            raise ValueError(f"form is {form!r}, expected 'published' or 'eq12'")
        if num_extra_positives < 0:
            raise ValueError(f"num_extra_positives is {num_extra_positives}, expected 0 or more")
        self.temperature = temperature
        self.form = form
        self.num_extra_positives = num_extra_positives

    def forward(self, emb_i: Tensor, emb_j: Tensor, labels: Tensor) -> Tensor:
        """Loss of one batch; with several processes, of the batches of all, which must be equally large.

        An image always has a positive, its own other view. In a batch of one label only, the terms of the negatives
        are those of empty sums: log sigmoid(0) per row in the published form, 0 in equation 12.

        Args:
            emb_i: (N, D) floats, N >= 1, projections of view 1, of any length: they are normalised here.
            emb_j: (N, D) floats, those of view 2.
            labels: (N,) int64.

        Returns:
            Scalar in float32, also under autocast; in float64 where the embeddings are.

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
            views = views.to(torch.promote_types(views.dtype, torch.float32))
            views = _gather(F.normalize(views, dim=-1))
            labels = _gather(labels[None])[0]
            return self._published(views, labels) if self.form == "published" else self._eq12(views, labels)

    def _published(self, views: Tensor, labels: Tensor) -> Tensor:
        rows, labels = views.flatten(0, 1), labels.repeat(2)
        similarity = (rows / self.temperature @ rows.T).fill_diagonal_(-torch.inf).exp()
        same_label = (labels[:, None] == labels).to(similarity.dtype)
        positives = torch.linalg.vecdot(similarity, same_label)
        negatives = similarity.sum(1) - positives
        mean_positive = positives / (same_label.sum(1) - 1)
        scaled_negative = negatives / len(rows)  # as published: over all 2N rows, not over the negatives
        return -(F.logsigmoid(mean_positive) + F.logsigmoid(-scaled_negative)).mean()

    def _eq12(self, views: Tensor, labels: Tensor) -> Tensor:
        anchors, targets = views
        logits = anchors / self.temperature @ targets.T
        same_label = labels[:, None] == labels
        position = same_label.tril(-1).sum(1)  # of an image among those of its label
        num_same = same_label.sum(1)
        is_anchor = same_label & ((position[:, None] - position) % num_same <= self.num_extra_positives)
        anchor_weight = is_anchor.to(logits.dtype) / num_same.clamp(max=self.num_extra_positives + 1)
        # An image is an anchor of as many images as it has anchors, so its negatives weigh 1 in total.
        log_likelihood = F.logsigmoid(logits)
        terms = torch.where(same_label, anchor_weight * log_likelihood, log_likelihood - logits)
        return -terms.sum() / len(labels)
