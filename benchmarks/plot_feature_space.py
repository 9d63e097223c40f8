"""Draw training and test features of an encoder in two dimensions, classes coloured.

    python benchmarks/plot_feature_space.py CHECKPOINT (--data_root FOLDER | --toy_data) [--out image/feature-space.png]

CHECKPOINT is a file of any stage, of this project or of the paper's authors; what it was trained on and with is read
from it. As in the paper's figure, the projection is t-SNE, here one for both halves, of at most 1000 training and 1000
test images: equally many of each class, as far as it has them. Takes a minute.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main_cifar10_pretrain_bns  # noqa: E402
import main_cifar100_pretrain_bns  # noqa: E402
from engine import load_data, predict  # noqa: E402
from models import create_encoder  # noqa: E402
from util.batches import to_device  # noqa: E402
from util.checkpoint import load_checkpoint, load_encoder, stage_of  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.options import launch  # noqa: E402
from util.reports import class_balanced  # noqa: E402
from util.run import Run  # noqa: E402

SHOWN = 1000  # images of each half


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--data_root", help="folder that holds CIFAR")
    images.add_argument("--toy_data", action="store_true", help="draw toy images instead")
    parser.add_argument("--dataset", choices=["cifar10", "cifar100"], help="unset, the checkpoint's, or cifar10")
    parser.add_argument("--out", type=Path, default="feature-space.png")
    return parser


def tsne(features, perplexity=30, steps=750):
    """Exact t-SNE (van der Maaten and Hinton, 2008) of float features (N, D), started from their PCA: float (N, 2)."""
    n = len(features)
    squared = torch.cdist(features, features).square()
    low, high = squared.new_full((n, 1), -10), squared.new_full((n, 1), 20)
    for _ in range(40):  # bisect for each point's log precision
        middle = (low + high) / 2
        p = (-squared * middle.exp()).fill_diagonal_(-torch.inf).softmax(dim=1)
        too_wide = torch.special.entr(p).sum(dim=1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(too_wide, middle, low), torch.where(too_wide, high, middle)
    p = (p + p.T) / (2 * n)
    torch.manual_seed(0)
    centred = features - features.mean(dim=0)
    start = centred @ torch.pca_lowrank(centred, q=2, center=False)[2]
    points = (1e-4 * start / start.std()).requires_grad_()
    optimizer = torch.optim.SGD([points], lr=max(n / 48, 50), momentum=0.5)
    for step in range(steps):
        if step == steps // 3:
            optimizer.param_groups[0]["momentum"] = 0.8
        exaggeration = 12 if step < steps // 3 else 1
        kernel = 1 / (1 + (points[:, None] - points).square().sum(dim=2))
        divergence = kernel.fill_diagonal_(0).sum().log() - exaggeration * (p * kernel.fill_diagonal_(1).log()).sum()
        optimizer.zero_grad()
        divergence.backward()
        optimizer.step()
    return points.detach()


def main(args):
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg") or not args.out.parent.is_dir():
        raise UserError(f"--out: found {args.out}, expected a .png, .pdf or .svg in a folder that exists")
    checkpoint = load_checkpoint(args.checkpoint, "CHECKPOINT")
    stage, trained = stage_of(checkpoint), checkpoint["args"]
    dataset = args.dataset or trained.get("dataset", "cifar10")
    script = {"cifar10": main_cifar10_pretrain_bns, "cifar100": main_cifar100_pretrain_bns}[dataset]
    data = ["--toy_data"] if args.toy_data else ["--data_root", args.data_root]
    run = Run(script.get_args_parser().parse_args(["--eval", args.checkpoint, *data]))
    encoder = create_encoder(run.args.model, run.args.input_size)
    load_encoder(encoder, run.evaluated, args.checkpoint)
    encoder.to(run.device)

    features, labels = [], []
    sets = load_data(run)
    for dataset_half in sets:
        images, targets = to_device(dataset_half, run.device)
        shown = class_balanced(targets.cpu(), SHOWN)
        features.append(predict(encoder, images[shown], run))
        labels.append(targets[shown].cpu())
    points = tsne(F.normalize(torch.cat(features))).cpu()

    figure = Figure((11, 5.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    halves = points.split([len(half) for half in labels])
    for panel, title, xy, half in zip(panels, ("training", "test"), halves, labels, strict=True):
        for c, (name, count) in enumerate(zip(sets[0].classes, sets[0].class_counts, strict=True)):
            panel.scatter(*xy[half == c].T, s=8, linewidths=0, color=f"C{c % 10}", label=f"{name}, {count:,} images")
        panel.set(title=f"{title} images", xticks=[], yticks=[])
    if len(sets[0].classes) <= 10:
        handles, names = panels[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", markerscale=3, frameon=False)
    data = f"toy data like {dataset}" if run.args.toy_data else dataset
    figure.suptitle(f"t-SNE of {stage} features, {data}, imbalance factor {run.args.imbalanced_factor:g}")
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    launch(main, get_args_parser())
