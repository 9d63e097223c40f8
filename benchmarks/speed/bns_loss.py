"""The BNS loss, forward and backward, against the form that broadcasts the rows to (2N, 2N, D).

    python benchmarks/speed/bns_loss.py

The baseline is the same formula. It takes the cosine similarity of every pair of rows elementwise, over an expansion of
the projections, and sums by masks. Both get the same projections, on CUDA or on one core. Memory is what a step adds.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.speed.timer import PeakMemory, median_seconds  # noqa: E402
from util.bns_loss import BNSLoss  # noqa: E402


def broadcast_loss(emb_i, emb_j, labels, temperature=0.5):
    rows, labels = torch.cat((emb_i, emb_j)), labels.repeat(2)
    similarity = torch.exp(F.cosine_similarity(rows[:, None], rows[None], dim=2) / temperature)
    same_label = labels[:, None] == labels
    is_positive = same_label & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    positive = (similarity * is_positive).sum(1) / is_positive.sum(1)
    negative = (similarity * ~same_label).sum(1) / len(rows)
    return -(torch.log(torch.sigmoid(positive)) + torch.log(torch.sigmoid(-negative))).mean()


def measure(loss, runs, emb, labels):
    def step():
        emb.grad = None
        loss(*emb, labels).backward()

    memory = PeakMemory(emb.device.type)
    return median_seconds(step, runs, emb.device.type), memory.bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'N':>6} {'broadcast':>23} {'ours':>23} {'times faster':>13} {'times less':>11}")
    for size in (256, 512):
        emb = torch.randn(2, size, 128, device=device, requires_grad=True)
        labels = torch.randint(10, (size,), device=device)
        theirs, peak = measure(broadcast_loss, 3, emb, labels)
        ours, our_peak = measure(BNSLoss(), 25, emb, labels)
        print(f"{size:6} {theirs * 1e3:8.1f} ms {peak / 1e6:8.1f} MB {ours * 1e3:8.1f} ms {our_peak / 1e6:8.1f} MB"
              f" {theirs / ours:13.1f} {peak / our_peak:11.1f}")
