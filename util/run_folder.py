"""The output folder of a run: claimed before training, then filled with checkpoints of which the newest are kept."""
import shutil
import sys
import time
from pathlib import Path

from util.checkpoint import LATEST, numbered_checkpoints, save_checkpoint
from util.errors import UserError

LATEST_EVERY = 60.0  # seconds; epochs of a GPU can be shorter than the writing of their checkpoint


class RunFolder:
    """Checkpoints of one run in `folder`: `checkpoint-<epoch>.pth`, `checkpoint-latest.pth` and, last, `final_name`.

    Args:
        save_freq: epochs between numbered checkpoints.
        keep: numbered checkpoints to keep, 0 for all.
    """

    def __init__(self, folder, log_dir, final_name, save_freq, keep):
        self.folder, self.log_dir, self.final = Path(folder), Path(log_dir), Path(folder) / final_name
        self.save_freq, self.keep = save_freq, keep
        self.saved_at = time.monotonic()

    def claim(self, continues, overwrite):
        """Make the folder ready. `continues`: the checkpoint file that the run continues, or None for a fresh run.

        Raises:
            UserError: it cannot be written, or holds another run and neither `continues` nor `overwrite` covers that.
        """
        for flag, folder in (("--output_dir", self.folder), ("--log_dir", self.log_dir)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ".writable").touch()
                (folder / ".writable").unlink()
            except OSError as error:
                raise UserError(f"{flag}: {folder} is not a folder that can be written: {error.strerror}") from error
        earlier = [path for path in (self.folder / "log.txt", self.folder / LATEST, self.final) if path.exists()]
        earlier += numbered_checkpoints(self.folder)
        if not earlier or (continues and continues.resolve().parent == self.folder.resolve()):
            return
        if not overwrite:
            raise UserError(f"--output_dir: {self.folder} holds another run ({earlier[0].name}); expected an empty "
                            "folder, or --resume auto to continue that run, or --overwrite to delete it")
        for path in [*earlier, *self.log_dir.glob("events.out.tfevents.*"), *self.log_dir.glob("projector_config.pbtxt")]:
            path.unlink()
        for embedding in self.log_dir.glob("[0-9]*/test_features"):
            shutil.rmtree(embedding)

    def save(self, state, epoch, last=False, now=False):
        """Save `state` after `epoch`: numbered where its turn has come or it is the `last`, else as the latest.

        The latest is skipped while the one before is younger than LATEST_EVERY, except `now`. Where writing fails,
        the failure is told, older checkpoints stay, and training may go on.

        Raises:
            UserError: the final file or the one asked for `now` could not be written.
        """
        numbered = not now and (last or (epoch + 1) % self.save_freq == 0)
        path = self.folder / (f"checkpoint-{epoch}.pth" if numbered else LATEST)
        if not numbered and not now and time.monotonic() - self.saved_at < LATEST_EVERY:
            return
        try:
            for target in [self.final] * last + [path]:  # in this order: a run that is over has its final file
                save_checkpoint(state, target)
        except OSError as error:
            message = f"could not write {target}: {error}; the checkpoints before it are as they were"
            if last or now:
                raise UserError(message) from error
            print(f"{message}, and training goes on", file=sys.stderr, flush=True)
            return
        self.saved_at = time.monotonic()
        if numbered:
            (self.folder / LATEST).unlink(missing_ok=True)
            for old in numbered_checkpoints(self.folder)[:-self.keep or None] if self.keep else []:
                old.unlink(missing_ok=True)
