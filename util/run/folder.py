"""The output folder: one folder, one run. What is refused, what a run deletes, and how many checkpoints stay."""
import fcntl
import os
import re
from pathlib import Path

from util.errors import UserError
from util.run.checkpoint import save_checkpoint
from util.run.log import say


class Folder:
    """One run's `checkpoint-<epoch>.pth`, `log.txt` and, last, `final_name` in `path`. All else is the user's.

    Args:
        keep: checkpoints to keep, those of the last epochs; 0 for all.
    """

    def __init__(self, path, final_name, keep):
        self.path, self.keep, self._lock = Path(path), keep, None
        self.final = self.path / final_name

    def checkpoints(self):
        """Paths of `checkpoint-<epoch>.pth`, in the order of epochs. (A checkpoint-9-best.pth is the user's copy.)"""
        own = [path for path in self.path.glob("checkpoint-*.pth") if re.fullmatch(r"checkpoint-\d+", path.stem)]
        return sorted(own, key=lambda path: int(path.stem.removeprefix("checkpoint-")))

    def newest(self):
        """The checkpoint of the last epoch, else the final file of the run that left log.txt, else None: a Path."""
        own = self.checkpoints()
        if not own and self.final.exists() and (self.path / "log.txt").exists():
            own = [self.final]
        return own[-1] if own else None

    def claim(self, log_dir, auto, overwrite, source):
        """Make the folder ready for a run, and lock it until `release` or the end of the process.

        Args:
            log_dir: TensorBoard's folder, Path. `overwrite` deletes the events in it if it is this folder.
            auto: whether a run may lie here, as with --resume auto.
            overwrite: whether it is to be deleted.
            source: Path of the checkpoint that the run starts from, or None.

        Raises:
            UserError: another process has the lock, or another run lies here, and neither flag permits to use it.
            OSError: the folder cannot be written.
        """
        for folder in (self.path, log_dir):  # before anything is deleted
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise UserError(f"--output_dir: {self.path} is in use by another process") from error
        except OSError:  # a file system without locks, such as some of NFS
            pass
        earlier = [path for path in (self.path / "log.txt", *self.checkpoints()) if path.exists()]
        if earlier and not (auto or overwrite):
            raise UserError(f"--output_dir: {self.path} holds another run ({earlier[0].name}); expected an empty "
                            "folder, or --resume auto to continue that run, or --overwrite to delete it")
        if not earlier and self.final.exists():
            downloaded = self.final.with_suffix(".downloaded.pth")
            if downloaded.exists():
                raise UserError(f"--output_dir: {self.path} holds {self.final.name} and {downloaded.name}, both from "
                                "elsewhere; expected one of them at most")
            os.replace(self.final, downloaded)
            say(f"{self.final} comes from elsewhere; it is kept as {downloaded.name}")
        elif overwrite:
            if source and source.resolve() in [path.resolve() for path in (*earlier, self.final)]:
                raise UserError(f"--overwrite: would delete {source}, from which this run starts")
            events = self.path.glob("events.out.tfevents.*") if log_dir.resolve() == self.path.resolve() else []
            for path in (*earlier, self.final, *events):
                path.unlink(missing_ok=True)

    def save(self, state, epoch):
        """Write the checkpoint of an epoch, and delete all but the newest `keep`. Raises OSError."""
        save_checkpoint(state, self.path / f"checkpoint-{epoch}.pth")
        if self.keep:
            for old in self.checkpoints()[:-self.keep]:
                old.unlink()

    def release(self):
        if self._lock:
            self._lock.close()
            self._lock = None
