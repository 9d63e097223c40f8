"""Draw training and test features of an encoder in two dimensions, classes coloured. Needs scikit-learn.

    pip install scikit-learn
    python image/feature_space.py CHECKPOINT --data_root FOLDER_OF_CIFAR [--out feature-space.png]

CHECKPOINT is a file of any stage of this project. As in the paper's figure, the projection is t-SNE, here one for both
halves: at most 1000 training and 1000 test images, equally many of each class, as far as it has them.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import create_encoder  # noqa: E402
from util.batches import to_device  # noqa: E402
from util.imbalanced_cifar import DATASETS  # noqa: E402
from util.run.checkpoint import load_checkpoint, load_encoder  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
parser.add_argument("--data_root", required=True, help="folder that holds CIFAR")
parser.add_argument("--out", default="feature-space.png")
args = parser.parse_args()

checkpoint = load_checkpoint(args.checkpoint, "CHECKPOINT")
trained = checkpoint["args"]
encoder = create_encoder(trained["model"])
load_encoder(encoder, checkpoint, args.checkpoint)
encoder.eval()

figure = Figure((11, 5.4), layout="constrained")
panels = figure.subplots(1, 2, sharex=True, sharey=True)
features, labels, names = [], [], []
for train in (True, False):
    dataset = DATASETS[trained["dataset"]](args.data_root, trained["imbalanced_factor"], train)
    to_device(dataset, "cpu")
    each = 1000 // dataset.num_classes
    shown = torch.cat([(dataset.labels == c).nonzero()[:each, 0] for c in range(dataset.num_classes)])
    with torch.inference_mode():
        features.append(encoder(dataset.images[shown] / 255))
    labels.append(dataset.labels[shown])
    names.append([f"{name}, {n:,} images" for name, n in zip(dataset.classes, dataset.class_counts, strict=True)])
points = TSNE(random_state=0).fit_transform(F.normalize(torch.cat(features)))
halves = points[:len(labels[0])], points[len(labels[0]):]
for panel, title, xy, half in zip(panels, ("training", "test"), halves, labels, strict=True):
    for c, name in enumerate(names[0]):
        panel.scatter(*xy[half == c].T, s=8, linewidths=0, color=f"C{c % 10}", label=name)
    panel.set(title=f"{title} images", xticks=[], yticks=[])
if len(names[0]) == 10:
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right upper", markerscale=3, frameon=False)
figure.suptitle(f"t-SNE of features, {trained['dataset']}, imbalance factor {trained['imbalanced_factor']:g}")
figure.savefig(args.out, dpi=110)
