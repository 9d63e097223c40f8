"""Time and memory of the BNS loss, forward and backward, against the form that broadcasts the rows to (2N, 2N, D).

    python benchmarks/bench_bns_loss.py [--sizes 256 512 1024] [--device cuda]

The baseline evaluates the same formula, the published one, with the cosine similarity of every pair of rows taken
elementwise over a (2N, 2N, D) expansion of the projections, masked sums over positives and negatives after it. Medians
on the same projections, on the CPU on one core by CPU time, so that other work on the machine counts less. Peak memory
is what a step adds, in a process of its own, to the resident set or to CUDA's allocator. Takes some three minutes.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_augment import bytes_in

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.bns_loss import BNSLoss  # noqa: E402

DIM = 128
MEMORY_OF_BROADCAST = 7  # tensors of 2N x 2N x D float32 at the peak, roughly


def broadcast_loss(emb_i, emb_j, labels, temperature=0.5):
    rows, labels = torch.cat((emb_i, emb_j)), labels.repeat(2)
    similarity = torch.exp(F.cosine_similarity(rows[:, None], rows[None], dim=2) / temperature)
    same_label = labels[:, None] == labels
    is_positive = same_label & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    positive = (similarity * is_positive).sum(1) / is_positive.sum(1)
    negative = (similarity * ~same_label).sum(1) / len(rows)
    return -(torch.log(torch.sigmoid(positive)) + torch.log(torch.sigmoid(-negative))).mean()


LOSSES = {"broadcast": broadcast_loss, "published": BNSLoss(), "eq12": BNSLoss(form="eq12")}


def make_batch(num_images, device):
    generator = torch.Generator().manual_seed(num_images)
    emb = torch.randn(2, num_images, DIM, generator=generator).to(device).requires_grad_()
    return emb, torch.randint(10, (num_images,), generator=generator).to(device)


def step(name, emb, labels):
    emb.grad = None
    LOSSES[name](*emb, labels).backward()
    if emb.is_cuda:
        torch.cuda.synchronize()


def median_seconds(name, num_images, device):
    batch = make_batch(num_images, device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    step(name, *batch)
    seconds = []
    for _ in range(3 if name == "broadcast" else 25):
        start = clock()
        step(name, *batch)
        seconds.append(clock() - start)
    return statistics.median(seconds)


def peak_bytes(name, num_images, device):
    torch.set_num_threads(1)
    step(name, *make_batch(8, device))  # loads what every later step finds loaded
    batch = make_batch(num_images, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, *batch)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before = bytes_in("VmRSS")
    step(name, *batch)
    return bytes_in("VmHWM") - before


def free_bytes(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return bytes_in("MemAvailable", "/proc/meminfo")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="images per batch (N)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.device}, D = {DIM}, forward and backward")
    print(f"{'N':>6} {'loss':>10} {'ms':>10} {'times faster':>13} {'peak MB':>9} {'times less':>11}")
    for num_images in args.sizes:
        baseline = None
        for name in LOSSES:
            if name == "broadcast" and free_bytes(args.device) < MEMORY_OF_BROADCAST * (2 * num_images) ** 2 * DIM * 4:
                print(f"{num_images:6} {name:>10}    skipped: does not fit the free memory")
                continue
            with multiprocessing.get_context("spawn").Pool(1) as process:
                peak = process.apply(peak_bytes, (name, num_images, args.device))
            seconds = median_seconds(name, num_images, args.device)
            if name == "broadcast":
                baseline = seconds, peak
            ratios = [f"{baseline[0] / seconds:.1f}", f"{baseline[1] / peak:.1f}"] if baseline else ["-", "-"]
            print(f"{num_images:6} {name:>10} {seconds * 1e3:10.2f} {ratios[0]:>13} {peak / 1e6:9.1f} {ratios[1]:>11}")


if __name__ == "__main__":
    main()
