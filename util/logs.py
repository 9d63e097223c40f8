"""What a run tells: progress on the console, one JSON object per epoch in log.txt, curves in TensorBoard."""
import json
import sys
import time
from datetime import timedelta
from operator import attrgetter

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from util.checkpoint import write_atomically


class Progress:
    """A line about work under way, with the time left: redrawn in a terminal, printed now and then into a file.

    Args:
        total: steps of the whole work.
        done: steps done before, by an earlier part of a resumed run.
        quiet: say nothing (every process but the first).
    """

    def __init__(self, total, done=0, quiet=False):
        self.total, self.done, self.before, self.quiet = total, done, done, quiet
        self.terminal = sys.stdout.isatty()
        self.interval = 0.5 if self.terminal else 15.0  # seconds
        self.start = self.shown = time.monotonic()

    def due(self):
        """Count one step; whether it is time to `show` something."""
        self.done += 1
        return not self.quiet and time.monotonic() - self.shown >= self.interval

    def show(self, text):
        self.shown = time.monotonic()
        seconds = (self.shown - self.start) / (self.done - self.before) * (self.total - self.done)
        line = f"{text}  {self.done / self.total:4.0%}  time left {timedelta(seconds=round(seconds))}"
        print(f"\r{line:<100}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def say(self, text):
        """Print a line that stays."""
        if not self.quiet:
            print(f"\r{text:<100}" if self.terminal else text, flush=True)


class RunLog:
    """log.txt in `output_dir` and TensorBoard events in `log_dir`; with `quiet`, neither.

    Args:
        start: epochs (may be fractional) after which this run begins; what TensorBoard holds beyond it from an
            earlier, interrupted part is taken back.
    """

    def __init__(self, output_dir, log_dir, start=0.0, quiet=False):
        self.path = output_dir / "log.txt"
        self.quiet = quiet
        self.writer = None
        if not quiet:
            self._try("TensorBoard", lambda: self._open(str(log_dir), self.x(start)))

    def _open(self, log_dir, purge_step):
        self.writer = SummaryWriter(log_dir, purge_step=purge_step)

    @staticmethod
    def x(epoch):
        """TensorBoard's x axis: thousandths of an epoch, so that runs of any batch size compare (as in MAE)."""
        return round(epoch * 1000)

    def write_history(self, history):
        """Make log.txt hold exactly the epochs of `history` (list of dicts)."""
        if not self.quiet:
            text = "".join(json.dumps(record) + "\n" for record in history)
            self._try("log.txt", lambda: write_atomically(self.path, text.encode()))

    def scalars(self, values, epoch):
        """Draw `values` (dict from tag to float) at `epoch`."""
        for tag, value in values.items():
            self.draw("add_scalar", tag, value, self.x(epoch))

    def image(self, tag, image, epoch):
        """Draw `image` at `epoch`: (3, H, W), or (N, 3, H, W) as a sheet; uint8, or float in [0, 1]."""
        self.draw("add_image" if image.ndim == 3 else "add_images", tag, image, self.x(epoch))

    def embedding(self, features, metadata, header, thumbnails, epoch):
        """Fill the projector with `features` (float (N, D)), in units of their deviation; `thumbnails` uint8 (N, 3, H, W).

        metadata: N lists of as many values as `header` has names.
        """
        features = (features.double() / features.std()).round(decimals=3)  # more digits would only make a larger file
        self.draw("add_embedding", features, metadata, thumbnails.cpu() / 255, epoch, "test_features", header)

    def hyperparameters(self, values):
        """Make the dict `values` this run's row in the HPARAMS table; as metrics that shows the run's own curves."""
        values = {name: value if isinstance(value, (int, float)) else str(value) for name, value in values.items()}
        # The first of the three summaries is left out: TensorBoard would take one stage's columns for all stages'.
        for summary in hparams(values, {})[1:]:
            self.draw("file_writer.add_summary", summary)

    def draw(self, method, *args, **kwargs):
        """Call a method of TensorBoard's SummaryWriter. A log that cannot be written never ends a training."""
        if self.writer is not None and not self._try("TensorBoard", lambda: attrgetter(method)(self.writer)(*args, **kwargs)):
            self.writer = None

    def _try(self, what, write):
        try:
            write()
        except OSError as error:
            print(f"could not write {what}: {error}; training goes on without it", file=sys.stderr, flush=True)
            return False
        return True
