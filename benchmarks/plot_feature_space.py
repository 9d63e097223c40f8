"""Draw image/feature-space.png: training and test features of an encoder in two dimensions, classes coloured.

    python benchmarks/plot_feature_space.py CHECKPOINT [--data_root FOLDER | --toy_data]

CHECKPOINT is a file of any stage, of this project or of the paper's authors. As in the paper's figure, the projection
is t-SNE, here one for both halves, of at most 100 training and as many test images of each class. Needs scikit-learn.
"""
import argparse
import sys
from pathlib import Path

import torch

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
    parser.add_argument("--data_root", help="folder that holds CIFAR")
    parser.add_argument("--toy_data", action="store_true")
    parser.add_argument("--dataset", choices=["cifar10", "cifar100"], help="unset, the checkpoint's, or cifar10")
    parser.add_argument("--model", help="timm model; unset, the checkpoint's, or resnet18")
    parser.add_argument("--input_size", type=int, help="unset, the checkpoint's, or 32")
    parser.add_argument("--imbalanced_factor", type=float, help="unset, the checkpoint's, or 100")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default=ROOT / "image" / "feature-space.png")
    return parser


def main(args):
    from sklearn.manifold import TSNE
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
    for train in (True, False):
        dataset = load_data(args, processes, train)
        images, targets = on_device(dataset, processes.device)
        shown = class_balanced(targets.cpu(), PER_CLASS * args.num_classes)
        features.append(predict(encoder, images[shown], processes, torch.inference_mode, args.input_size).cpu())
        labels.append(targets[shown].cpu())
    points = TSNE(metric="cosine", random_state=0).fit_transform(torch.cat(features).numpy())

    figure, axes = new_figure(11, 5.4)
    axes.remove()
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, title, xy, half in zip(panels, ("training", "test"), (points[:len(labels[0])], points[len(labels[0]):]), labels):
        for c, name in enumerate(dataset.classes):
            colour = f"C{c}" if args.num_classes <= 10 else None
            panel.scatter(*xy[half == c].T, s=8, linewidths=0, color=colour, label=name)
        panel.set(title=f"{title} images", xticks=[], yticks=[])
    if args.num_classes <= 10:
        handles, names = panels[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", markerscale=3, frameon=False)
    data = f"toy data like {args.dataset}" if args.toy_data else f"{args.dataset}"
    figure.suptitle(f"t-SNE of {trained.get('stage', 'published')} features, {data}, imbalance factor {args.imbalanced_factor:g}")
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
