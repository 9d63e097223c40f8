"""Draw image/feature-space.png: training and test features of an encoder in two dimensions, classes coloured.

    python benchmarks/plot_feature_space.py CHECKPOINT --data_root FOLDER | --toy_data

CHECKPOINT is a file of any stage, of this project or of the paper's authors. As in the paper's figure, the projection
is t-SNE, here one for both halves, of at most 100 training and as many test images of each class. Takes a minute.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine import load_data, on_device, predict  # noqa: E402
from models import create_encoder  # noqa: E402
from util.checkpoint import load_checkpoint, load_weights  # noqa: E402
from util.figures import class_balanced, new_figure  # noqa: E402
from util.processes import Processes  # noqa: E402

PER_CLASS = 100


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data_root", help="folder that holds CIFAR")
    data.add_argument("--toy_data", action="store_true")
    parser.add_argument("--dataset", choices=["cifar10", "cifar100"], help="unset, the checkpoint's, or cifar10")
    parser.add_argument("--model", help="timm model; unset, the checkpoint's, or resnet18")
    parser.add_argument("--input_size", type=int, help="unset, the checkpoint's, or 32")
    parser.add_argument("--imbalanced_factor", type=float, help="unset, the checkpoint's, or 100")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default=ROOT / "image" / "feature-space.png")
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
    checkpoint = load_checkpoint(args.checkpoint, "CHECKPOINT")
    trained = checkpoint["args"] if "stage" in checkpoint["args"] else {}
    for name, otherwise in (("dataset", "cifar10"), ("model", "resnet18"), ("input_size", 32), ("imbalanced_factor", 100)):
        if getattr(args, name) is None:
            setattr(args, name, trained.get(name, otherwise))
    args.num_classes = {"cifar10": 10, "cifar100": 100}[args.dataset]
    processes = Processes(args.device)
    encoder = create_encoder(args.model, args.input_size)
    load_weights(encoder, {name[4:]: value for name, value in checkpoint["model"].items() if name.startswith("enc.")},
                 args.checkpoint)
    encoder.to(processes.device)

    features, labels = [], []
    sets = [load_data(args, processes, train) for train in (True, False)]
    for dataset in sets:
        images, targets = on_device(dataset, processes.device)
        shown = class_balanced(targets.cpu(), PER_CLASS * args.num_classes)
        features.append(predict(encoder, images[shown], processes, torch.inference_mode, args.input_size).cpu())
        labels.append(targets[shown].cpu())
    points = tsne(F.normalize(torch.cat(features)).to(processes.device)).cpu()

    figure, axes = new_figure(11, 5.4)
    axes.remove()
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, title, xy, half in zip(panels, ("training", "test"), (points[:len(labels[0])], points[len(labels[0]):]), labels):
        for c, (name, count) in enumerate(zip(sets[0].classes, sets[0].class_counts)):
            panel.scatter(*xy[half == c].T, s=8, linewidths=0, color=f"C{c % 10}", label=f"{name}, {count:,} images")
        panel.set(title=f"{title} images", xticks=[], yticks=[])
    if args.num_classes <= 10:
        handles, names = panels[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", markerscale=3, frameon=False)
    data = "toy data like " * args.toy_data + args.dataset
    figure.suptitle(f"t-SNE of {trained.get('stage', 'published')} features, {data}, imbalance factor {args.imbalanced_factor:g}")
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
