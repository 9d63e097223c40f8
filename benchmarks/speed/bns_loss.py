"""The BNS loss, forward and backward, against the form that broadcasts the rows to (2N, 2N, D).

    python benchmarks/speed/bns_loss.py [--sizes 256 512] [--device cuda]

The baseline is the same formula, the published one. It takes the cosine similarity of every pair of rows elementwise,
over an expansion of the projections, and sums by masks. Both get the same projections; on the CPU, one core. Memory is
what a step adds.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.speed.timer import PeakMemory, median_seconds  # noqa: E402
from util.bns_loss import BNSLoss  # noqa: E402

DIM = 128


def broadcast_loss(emb_i, emb_j, labels, temperature=0.5):
    rows, labels = torch.cat((emb_i, emb_j)), labels.repeat(2)
    similarity = torch.exp(F.cosine_similarity(rows[:, None], rows[None], dim=2) / temperature)
    same_label = labels[:, None] == labels
    is_positive = same_label & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    positive = (similarity * is_positive).sum(1) / is_positive.sum(1)
    negative = (similarity * ~same_label).sum(1) / len(rows)
    return -(torch.log(torch.sigmoid(positive)) + torch.log(torch.sigmoid(-negative))).mean()


def step(loss, emb, labels):
    emb.grad = None
    loss(*emb, labels).backward()


def main(args):
    torch.set_num_threads(1)
    losses = {"broadcast": broadcast_loss, "published": BNSLoss(), "eq12": BNSLoss(form="eq12")}
    print(f"{'N':>6} {'loss':>10} {'ms':>10} {'times faster':>13} {'peak MB':>9} {'times less':>11}")
    for size in args.sizes:
        emb = torch.randn(2, size, DIM, device=args.device, requires_grad=True)
        labels = torch.randint(10, (size,), device=args.device)
        baseline = None
        for name, loss in losses.items():
            memory = PeakMemory(args.device)
            runs = 3 if name == "broadcast" else 25
            seconds = median_seconds(partial(step, loss, emb, labels), runs, args.device)
            peak = memory.bytes()
            baseline = baseline or (seconds, peak)
            print(f"{size:6} {name:>10} {seconds * 1e3:10.2f} {baseline[0] / seconds:13.1f} {peak / 1e6:9.1f}"
                  f" {baseline[1] / peak:11.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="images per batch (N)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    main(parser.parse_args())
