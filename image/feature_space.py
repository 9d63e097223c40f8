"""Draw training and test features of an encoder in two dimensions, classes coloured. Needs scikit-learn.

    pip install scikit-learn
    python image/feature_space.py CHECKPOINT --data_root FOLDER_OF_CIFAR [--dataset cifar100] [--out feature-space.png]

CHECKPOINT is a file of any stage, of this project or of the paper's authors; what it was trained on and with is read
from it. As in the paper's figure, the projection is t-SNE, here one for both halves, of at most 1000 training and 1000
test images: equally many of each class, as far as it has them. Takes a minute.
"""
import argparse
import importlib
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine import predict  # noqa: E402

SHOWN = 1000  # images of each half


def load(args):
    """(encoder, training set, test set, run), as stage 1's script makes them to evaluate the checkpoint."""
    script = importlib.import_module(f"main_{args.dataset}_pretrain_bns")
    flags = script.get_args_parser().parse_args(["--eval", args.checkpoint, "--data_root", args.data_root])
    with mock.patch("main_cifar10_pretrain_bns.evaluate_knn", lambda *found: found):
        return script.main(flags)


def main(args):
    encoder, *sets, run = load(args)
    features, labels = [], []
    for dataset in sets:
        images, targets = dataset.images, dataset.labels
        classes = range(len(dataset.classes))
        shown = torch.cat([(targets == c).nonzero()[:SHOWN // len(classes), 0] for c in classes])
        features.append(predict(encoder, images[shown], run))
        labels.append(targets[shown].cpu())
    points = TSNE(random_state=0).fit_transform(F.normalize(torch.cat(features)).cpu())

    figure = Figure((11, 5.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    halves = points[:len(labels[0])], points[len(labels[0]):]
    for panel, title, xy, half in zip(panels, ("training", "test"), halves, labels, strict=True):
        for c, (name, count) in enumerate(zip(sets[0].classes, sets[0].class_counts, strict=True)):
            panel.scatter(*xy[half == c].T, s=8, linewidths=0, color=f"C{c % 10}", label=f"{name}, {count:,} images")
        panel.set(title=f"{title} images", xticks=[], yticks=[])
    if args.dataset == "cifar10":
        handles, names = panels[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", markerscale=3, frameon=False)
    figure.suptitle(f"t-SNE of features, {args.dataset}, imbalance factor {run.args.imbalanced_factor:g}")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data_root", required=True, help="folder that holds CIFAR")
    parser.add_argument("--dataset", choices=["cifar10", "cifar100"], default="cifar10")
    parser.add_argument("--out", default="feature-space.png")
    main(parser.parse_args())
