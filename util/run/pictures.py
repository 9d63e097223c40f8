"""Pictures for TensorBoard: which images are drawn, accuracy per class, the confusion matrix, the features."""
import numpy as np
import torch
import torch.nn.functional as F

from util.ip_dpp import inclusion_probabilities, true_label_log_probabilities
from util.metrics import confusion_matrix, shot_groups
from util.run.log import EPOCH_END, only_shows

SHOT_COLOURS = {"many": "#4c72b0", "medium": "#dd8452", "few": "#c44e52"}
MAX_NAMES = 20  # classes up to which each is named and each cell of the confusion matrix holds its figure
PROJECTOR_IMAGES = 1000  # test images in the embedding projector
SHOWN_CLASSES = 5  # largest classes whose draws are logged


def new_figure(width, height):
    """An empty matplotlib Figure (inches) and its only axes; imported here, as pretraining makes none."""
    from matplotlib.figure import Figure
    figure = Figure((width, height), dpi=100, layout="constrained")
    return figure, figure.add_subplot()


def name_classes(axis, names, **style):
    """Put one tick per class on a matplotlib axis, or, of many classes, say only what their positions mean."""
    if len(names) <= MAX_NAMES:
        axis.set_ticks(range(len(names)), names, fontsize=8, **style)
    else:
        axis.set_ticks(range(0, len(names), 10))


def accuracy_bars(confusion, class_counts, shot_thresholds, classes):
    """Test accuracy per class, classes in order of their training images, whose number is a line.

    Args:
        confusion: integers (C, C), test images by true (row) and predicted class.
        class_counts, shot_thresholds: as in `util.metrics.shot_groups`.
        classes: C names.

    Returns:
        A matplotlib Figure.
    """
    confusion, class_counts = np.asarray(confusion), np.asarray(class_counts)
    order = np.argsort(-class_counts, kind="stable")
    accuracy = (confusion.diagonal() / confusion.sum(axis=1).clip(1))[order]
    figure, axes = new_figure(6.4, 3.8)
    groups = shot_groups(class_counts[order], shot_thresholds)
    for (name, colour), group in zip(SHOT_COLOURS.items(), groups, strict=True):
        if group.any():
            label = f"{name}-shot {accuracy[group].mean():.2f}"
            axes.bar(np.flatnonzero(group), accuracy[group], color=colour, width=0.85, label=label)
    axes.set(ylim=(0, 1), xlim=(-0.6, len(order) - 0.4), ylabel="test accuracy")
    name_classes(axes.xaxis, [classes[c] for c in order], rotation=30, ha="right")
    counts = axes.twinx()
    counts.plot(class_counts[order], "k.-", linewidth=1, markersize=4)
    counts.set(yscale="log", ylabel="training images (line)")
    counts.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def confusion_heatmap(confusion, class_counts, classes):
    """Percentage of each true class's test images predicted as each class, in order of the classes' training images.

    Args and return value as of `accuracy_bars`.
    """
    from matplotlib.colors import PowerNorm
    confusion, order = np.asarray(confusion), np.argsort(-np.asarray(class_counts), kind="stable")
    percent = (100 * confusion / confusion.sum(axis=1, keepdims=True).clip(1))[np.ix_(order, order)]
    figure, axes = new_figure(6.4, 5)
    # Colours go by the square root, which keeps the few per cent of a confusion among many classes visible.
    figure.colorbar(axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100)), label="% of the true class")
    names = [classes[c] for c in order]
    name_classes(axes.xaxis, names, rotation=30, ha="right")
    name_classes(axes.yaxis, names)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(order) <= MAX_NAMES:
        for (row, column), value in np.ndenumerate(percent):
            colour = "white" if value > 30 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def describe_draw(log, epoch, logits, train_set, subset, previous, kernel):
    """Show in TensorBoard which images of the largest classes were drawn.

    Args:
        log: RunLog.
        logits: of all training images, float (N, C), by the model that the draw was made with.
        subset: int64 tensor, the indices drawn now.
        previous: those drawn before, or None.
        kernel: of the k-DPP, for its inclusion probabilities; None where the draw was uniform.

    Returns:
        dict for log.txt: `drawn`, a list with one dict per class. A margin is the logit of the true label minus the
        largest other logit. It is below 0 where the classifier is wrong.
    """
    labels = train_set.labels
    log_p = true_label_log_probabilities(logits, labels)
    largest_other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    margins = (logits.gather(1, labels[:, None])[:, 0] - largest_other).double().cpu().numpy()
    targets, subset = labels.cpu().numpy(), subset.numpy()
    record = []
    for c in np.argsort(-train_set.class_counts, kind="stable")[:SHOWN_CLASSES]:
        members = np.flatnonzero(targets == c)
        drawn, left = np.intersect1d(subset, members), np.setdiff1d(members, subset)
        if not len(left):
            continue
        figures = {"mean_p": float(np.exp(log_p[members]).mean())}
        for name, part in (("drawn", drawn), ("left", left)):
            figures[f"{name}_mean_p"] = float(np.exp(log_p[part]).mean())
            figures[f"{name}_margin"] = float(margins[part].mean())
        if previous is not None:
            figures["changed"] = len(np.setdiff1d(drawn, previous.numpy()))
        title = f"train_ipdpp/{train_set.classes[c]}"
        if kernel:
            inclusion = inclusion_probabilities(log_p[members], len(drawn), kernel)
            figures |= {"max_inclusion": float(inclusion.max()), "min_inclusion": float(inclusion.min())}
            ranked = torch.from_numpy(members[np.argsort(-inclusion, kind="stable")])
            extremes = torch.cat((ranked[:16], ranked[-16:])).to(train_set.images.device)
            log.images(f"{title}/most and least likely drawn", train_set.images[extremes].cpu(), epoch)
        log.scalars({f"{title}/{name}": value for name, value in figures.items()}, epoch)
        record.append({"class": int(c), **figures})
    return {"drawn": record}


@only_shows
def show_predictions(log, epoch, features, logits, test_set, train_set, last):
    """Show accuracy per class and the confusion matrix in TensorBoard, and after the `last` epoch the features too.

    log: RunLog. features, logits: of the test images, float (N, D) and (N, C).
    """
    counts, classes, predicted = train_set.class_counts, train_set.classes, logits.argmax(1).cpu()
    confusion = confusion_matrix(logits.cpu(), test_set.labels.cpu())
    bars = accuracy_bars(confusion, counts, train_set.shot_thresholds, classes)
    log.figure("test/accuracy per class", bars, epoch + EPOCH_END)
    log.figure("test/confusion", confusion_heatmap(confusion, counts, classes), epoch + EPOCH_END)
    if last:
        labels = test_set.labels.cpu()
        shown = class_balanced(labels, PROJECTOR_IMAGES)
        metadata = [[classes[labels[i]], classes[predicted[i]], counts[labels[i]]] for i in shown]
        # Square, as TensorBoard wants them. Features divided by their deviation; more digits only make a larger file.
        thumbnails = F.interpolate(test_set.images[shown.to(test_set.images.device)].float() / 255, (32, 32)).cpu()
        features = (features[shown.to(features.device)].double() / features.std()).round(decimals=3).cpu()
        header = ["class", "predicted class", "training images"]
        log.writer.add_embedding(features, metadata, thumbnails, 1 + epoch, "test_features", header)


def class_balanced(labels, total):
    """About `total` images, equally many of each class: ascending int64 indices into `labels`, a tensor (N,)."""
    per_class = max(1, total // len(labels.unique()))
    return torch.cat([torch.nonzero(labels == c)[:per_class, 0] for c in labels.unique()]).sort().values
