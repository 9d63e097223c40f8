"""What a run reports: lines on the console, an object per epoch in log.txt, curves and pictures in TensorBoard."""
import functools
import json
import os

from torch.utils.tensorboard import SummaryWriter

from util.run.checkpoint import write_atomically

EPOCH_END = 0.999  # results of epoch e are plotted at e + 0.999: resuming at the next epoch would delete them at e + 1


def say(text, end="\n"):
    """Print. Once stdout cannot be written any more (its reader or terminal has gone), go on in silence."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def only_shows(show):
    """Decorates what writes to TensorBoard, of a RunLog. Where it fails, a line says so, and training goes on."""
    @functools.wraps(show)
    def try_to_show(log, *args, **kwargs):
        try:
            if log.writer:
                show(log, *args, **kwargs)
        except Exception as error:  # whatever goes wrong in a picture, it must not cost an epoch
            say(f"TensorBoard lacks something ({show.__name__}): {type(error).__name__}: {error}")
    return try_to_show


class RunLog:
    """Writes log.txt in `folder` and TensorBoard events in `log_dir`; no events with `quiet`, as in later processes.

    TensorBoard's x axis is in thousandths of an epoch, the same for every batch size (as in MAE).

    Args:
        start: first epoch. TensorBoard drops points from there on, which an interrupted part of the run has left.
    """

    def __init__(self, folder, log_dir, start=0, quiet=False):
        self.path = folder / "log.txt"
        self.writer = None if quiet else SummaryWriter(str(log_dir), purge_step=1000 * start)

    def write_history(self, history):
        """Make log.txt hold exactly the epochs of `history` (list of dicts). Raises OSError as `write_atomically`."""
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in history]
        write_atomically(self.path, "".join(lines).encode())

    @only_shows
    def scalars(self, values, epoch):
        """Plot `values` (dict from tag to float) at `epoch`, which may be fractional."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, round(1000 * epoch))
        self.writer.flush()

    @only_shows
    def steps(self, curves, epoch):
        """Plot `curves` (dict from tag to tensor (steps,)) over the epoch."""
        for tag, values in curves.items():
            for i, value in enumerate(values.tolist()):
                self.writer.add_scalar(tag, value, round(1000 * (epoch + (i + 0.5) / len(values))))

    def results(self, stats, epoch):
        """Plot the accuracies and losses of an epoch's evaluation, such as `test_acc1` under test/acc1."""
        figures = {"/".join(name.rsplit("_", 1)): value for name, value in stats.items()
                   if name.startswith(("test", "knn")) and isinstance(value, float)}
        self.scalars(figures, epoch + EPOCH_END)

    @only_shows
    def images(self, tag, images, epoch):
        """Show `images` at `epoch` as a sheet: (N, 3, H, W); uint8, or float in [0, 1]."""
        self.writer.add_images(tag, images, round(1000 * epoch))

    @only_shows
    def close(self):
        self.writer.close()
