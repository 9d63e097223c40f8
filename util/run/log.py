"""What a run reports: progress on the console, an object per epoch in log.txt, curves and pictures in TensorBoard."""
import functools
import json
import shutil
import sys
import time
from datetime import timedelta

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from util.ip_dpp import inclusion_probabilities, true_label_log_probabilities
from util.metrics import confusion_matrix
from util.run.checkpoint import write_atomically
from util.run.pictures import accuracy_bars, confusion_heatmap

EPOCH_END = 0.999  # results of epoch e are plotted at e + 0.999: resuming at the next epoch would delete them at e + 1
PROJECTOR_IMAGES = 1000  # test images in the embedding projector
SHOWN_CLASSES = 5  # largest classes whose draws are logged
TAGS = {"test_acc1": "test/acc1", "test_acc5": "test/acc5", "test_loss": "test/loss",
        "test_many": "test_shots/many", "test_medium": "test_shots/medium", "test_few": "test_shots/few",
        "test_adjusted_acc1": "test_adjusted/acc1", "test_adjusted_many": "test_adjusted/many",
        "test_adjusted_medium": "test_adjusted/medium", "test_adjusted_few": "test_adjusted/few",
        "knn_acc1": "knn/acc1", "knn_many": "knn/many", "knn_medium": "knn/medium", "knn_few": "knn/few",
        "images_per_second": "train/images_per_second", "peak_memory_gib": "train/peak_memory_gib"}


class Progress:
    """The progress line, with the time left: rewritten in place in a terminal, printed every 15 s into a file.

    Args:
        total: steps of the whole run.
        done: steps that were done before this process began.
        quiet: print nothing (every process but the first).
    """

    def __init__(self, total, done=0, quiet=False):
        self.total, self.done, self.before, self.quiet = total, done, done, quiet
        self.terminal = sys.stdout.isatty()
        self.interval = 0.5 if self.terminal else 15.0  # seconds
        self.start = self.shown = time.monotonic()

    def due(self):
        """Count one step. Returns whether it is time to `show` something."""
        self.done += 1
        return not self.quiet and time.monotonic() - self.shown >= self.interval

    def show(self, text):
        self.shown = time.monotonic()
        seconds = (self.shown - self.start) / (self.done - self.before) * (self.total - self.done)
        left = timedelta(seconds=round(seconds))
        self._print(f"{text}  {self.done / self.total:4.0%}  time left {left}", overwritable=True)

    def say(self, text):
        """Print a line that stays."""
        if not self.quiet:
            self._print(text, overwritable=False)

    def _print(self, line, overwritable):
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap
            line = f"{line[:width] if overwritable else line:<{width}}"
        print(line, end="\r" if self.terminal and overwritable else "\n", flush=True)


def tensorboard(write):
    """Decorates a method of RunLog that uses its writer. If that fails, training goes on without TensorBoard."""
    @functools.wraps(write)
    def write_or_give_up(self, *args, **kwargs):
        try:
            if self.writer:
                write(self, *args, **kwargs)
        except OSError as error:
            print(f"could not write TensorBoard: {error}; training goes on without it", file=sys.stderr, flush=True)
            self.writer = None
    return write_or_give_up


class RunLog:
    """Writes log.txt in `output_dir` and TensorBoard events in `log_dir`; with `quiet`, neither.

    TensorBoard's x axis is in thousandths of an epoch, the same for every batch size (as in MAE).

    Args:
        suffix: ends the names of this run's event files.
        start: first epoch. TensorBoard drops points from there on, which an interrupted part of the run has left.
        quiet: for every process but the first.
    """

    def __init__(self, output_dir, log_dir, suffix="", start=0, quiet=False):
        self.path, self.quiet, self.writer = output_dir / "log.txt", quiet, None
        if not quiet:
            self.writer = SummaryWriter(str(log_dir), purge_step=1000 * start, filename_suffix=suffix)

    def write_history(self, history):
        """Make log.txt hold exactly the epochs of `history` (list of dicts). If that fails, the next call may do it."""
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in history)
        try:
            if not self.quiet:
                write_atomically(self.path, text.encode())
        except OSError as error:
            print(f"could not write {self.path}: {error}; training goes on", file=sys.stderr, flush=True)

    @tensorboard
    def scalars(self, values, epoch, flush=False):
        """Plot `values` (dict from tag to float; None is left out) at `epoch`, which may be fractional."""
        for tag, value in values.items():
            if value is not None:
                self.writer.add_scalar(tag, value, round(1000 * epoch))
        if flush:
            self.writer.flush()

    def steps(self, curves, epoch):
        """Plot `curves` (dict from tag to tensor (steps,)) over the epoch."""
        for tag, values in curves.items():
            for i, value in enumerate(values.tolist()):
                self.scalars({tag: value}, epoch + (i + 0.5) / len(values))

    def results(self, stats, epoch):
        """Plot those figures of an epoch that have a tag in TAGS, and flush all that was written."""
        values = {TAGS[name]: value for name, value in stats.items() if name in TAGS}
        self.scalars(values, epoch + EPOCH_END, flush=True)

    @tensorboard
    def images(self, tag, images, epoch):
        """Show `images` at `epoch` as a sheet: (N, 3, H, W); uint8, or float in [0, 1]."""
        self.writer.add_images(tag, images, round(1000 * epoch))

    @tensorboard
    def figure(self, tag, figure, epoch):
        """Show a matplotlib `figure` at `epoch`."""
        self.writer.add_figure(tag, figure, round(1000 * epoch))

    @tensorboard
    def embedding(self, features, metadata, header, thumbnails, epoch):
        """Show `features` (float (N, D)) in TensorBoard's projector, divided by their standard deviation.

        thumbnails: uint8 (N, 3, H, W). metadata: N lists of as many values as `header` has names.
        """
        features = (features.double() / features.std()).round(decimals=3)  # more digits would only make a larger file
        self.writer.add_embedding(features, metadata, thumbnails / 255, epoch, "test_features", header)

    @tensorboard
    def close(self, flags=None):
        """Close TensorBoard's file. `flags` (dict), if given, become the run's row of the HPARAMS table."""
        if flags:
            values = {name: value if isinstance(value, int | float) else str(value) for name, value in flags.items()}
            # Skip the first of the three summaries: it would impose the columns of this stage on all runs.
            for summary in hparams(values, {})[1:]:
                self.writer.file_writer.add_summary(summary)
        self.writer.close()


def describe_draw(log, epoch, logits, train_set, subset, previous, kernel):
    """Show in TensorBoard which images of the largest classes were drawn.

    Args:
        logits: of all training images, float (N, C), by the model that the draw was made with.
        subset: int64 tensor, the indices drawn now.
        previous: those drawn before, or None.
        kernel: of the k-DPP, for its inclusion probabilities; None where the draw was uniform.

    Returns:
        dict for log.txt: `drawn`, a list with one dict per class. A margin is the logit of the true label minus the
        largest other logit. It is below 0 where the classifier is wrong.
    """
    targets, subset = np.asarray(train_set.targets), subset.numpy()
    labels = torch.tensor(train_set.targets, device=logits.device)
    log_p = true_label_log_probabilities(logits, labels)
    largest_other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    margins = (logits.gather(1, labels[:, None])[:, 0] - largest_other).double().cpu().numpy()
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
            ranked = members[np.argsort(-inclusion, kind="stable")]
            sheet = torch.from_numpy(train_set.data[np.concatenate([ranked[:16], ranked[-16:]])]).permute(0, 3, 1, 2)
            log.images(f"{title}/most and least likely drawn", sheet, epoch)
        log.scalars({f"{title}/{name}": value for name, value in figures.items()}, epoch)
        record.append({"class": int(c), **figures})
    return {"drawn": record}


def show_predictions(log, epoch, features, logits, test_set, train_set, last):
    """Show accuracy per class and the confusion matrix in TensorBoard, and after the `last` epoch the features too.

    features, logits: of the test images, float (N, D) and (N, C).
    """
    labels, counts = torch.tensor(test_set.targets), train_set.class_counts
    confusion = confusion_matrix(logits.cpu(), labels)
    bars = accuracy_bars(confusion, counts, train_set.shot_thresholds, train_set.classes)
    log.figure("test/accuracy per class", bars, epoch + EPOCH_END)
    log.figure("test/confusion", confusion_heatmap(confusion, counts, train_set.classes), epoch + EPOCH_END)
    if last:
        shown = class_balanced(labels, PROJECTOR_IMAGES)
        predicted = logits.cpu()[shown].argmax(dim=1)
        metadata = [[train_set.classes[c], train_set.classes[p], counts[c]]
                    for c, p in zip(labels[shown], predicted, strict=True)]
        thumbnails = torch.from_numpy(test_set.data)[shown].permute(0, 3, 1, 2)
        header = ["class", "predicted class", "training images"]
        log.embedding(features.cpu()[shown], metadata, header, thumbnails, epoch + 1)


def class_balanced(targets, total):
    """About `total` images, equally many of each class: ascending int64 indices into `targets` (N,)."""
    targets = torch.as_tensor(targets)
    per_class = max(1, total // len(targets.unique()))
    return torch.cat([torch.nonzero(targets == c)[:per_class, 0] for c in targets.unique()]).sort().values
