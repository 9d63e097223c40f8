"""Figures of an evaluation, for TensorBoard."""
import numpy as np

from util.metrics import shot_groups

SHOT_COLOURS = {"many": "#4c72b0", "medium": "#dd8452", "few": "#c44e52"}
MAX_NAMES = 20  # classes up to which each is named and each cell of the confusion matrix holds its figure


def new_figure(width, height):
    """An empty matplotlib Figure (inches) and its only axes; imported here, as pretraining makes none."""
    from matplotlib.figure import Figure
    figure = Figure((width, height), dpi=100, layout="constrained")
    return figure, figure.add_subplot()


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
            axes.bar(np.flatnonzero(group), accuracy[group], color=colour, width=0.85,
                     label=f"{name}-shot {accuracy[group].mean():.2f}")
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
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if value > 30 else "black")
    return figure


def name_classes(axis, names, **style):
    """Put one tick per class on a matplotlib axis, or, of many classes, say only what their positions mean."""
    if len(names) <= MAX_NAMES:
        axis.set_ticks(range(len(names)), names, fontsize=8, **style)
    else:
        axis.set_ticks(range(0, len(names), 10))
