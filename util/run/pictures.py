"""Pictures for TensorBoard: which images are drawn, and the confusion matrix."""
import numpy as np
import torch

from util.ip_dpp import inclusion_probabilities, true_label_log_probabilities
from util.metrics import confusion_matrix
from util.run.log import EPOCH_END, only_shows

MAX_NAMES = 20  # classes up to which each is named, and each cell of the confusion matrix holds its figure
SHOWN_CLASSES = 5  # largest classes whose draws are logged


def confusion_heatmap(confusion, class_counts, classes):
    """Percentage of each true class's test images predicted as each class, in order of the classes' training images.

    Args:
        confusion: integers (C, C), test images by true (row) and predicted class.
        class_counts: (C,) training images per class.
        classes: C names.

    Returns:
        A matplotlib Figure.
    """
    from matplotlib.colors import PowerNorm  # here, as pretraining draws none
    from matplotlib.figure import Figure
    confusion, order = np.asarray(confusion), np.argsort(-np.asarray(class_counts), kind="stable")
    percent = (100 * confusion / confusion.sum(axis=1, keepdims=True).clip(1))[np.ix_(order, order)]
    figure = Figure((6.4, 5), layout="constrained")
    axes = figure.subplots()
    # Colours go by the square root, which keeps the few per cent of a confusion among many classes visible.
    figure.colorbar(axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100)), label="% of the true class")
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(order) <= MAX_NAMES:
        names = [classes[c] for c in order]
        axes.set_xticks(range(len(order)), names, fontsize=8, rotation=30, ha="right")
        axes.set_yticks(range(len(order)), names, fontsize=8)
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
def show_confusion(log, epoch, logits, test_set, train_set):
    """Show the confusion matrix in TensorBoard. log: RunLog. logits: of the test images, float (N, C)."""
    confusion = confusion_matrix(logits.cpu(), test_set.labels.cpu())
    figure = confusion_heatmap(confusion, train_set.class_counts, train_set.classes)
    log.writer.add_figure("test/confusion", figure, round(1000 * (epoch + EPOCH_END)))
