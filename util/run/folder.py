"""The output folder of a run: checked and locked before training, then filled with checkpoints."""
import fcntl
import os
import shutil
import zlib
from pathlib import Path

from util.errors import UserError
from util.run.checkpoint import LATEST, numbered_checkpoints


class OutputFolder:
    """One run's `checkpoint-<epoch>.pth`, `checkpoint-latest.pth`, `log.txt` and, last, `final_name` in `path`.

    Args:
        log_dir: folder of TensorBoard's events. The names of this run's event files end in `suffix`.
        keep: numbered checkpoints to keep, 0 for all.
    """

    def __init__(self, path, log_dir, final_name, keep):
        self.path, self.log_dir, self.keep = Path(path), Path(log_dir), keep
        self.final = self.path / final_name
        self.downloaded = self.final.with_suffix(".downloaded.pth")
        self.suffix = f".{zlib.crc32(bytes(self.path.resolve())):08x}"
        self._lock = None

    def checkpoints(self):
        """This run's own checkpoints; a final file without any trace of a run is a downloaded one."""
        own = [self.path / LATEST, self.final] if self._traces() else []
        return [*(path for path in own if path.is_file()), *numbered_checkpoints(self.path)]

    def _traces(self):
        """Files that only a run of this project leaves."""
        named = [self.path / "log.txt", self.path / LATEST]
        return [path for path in named if path.exists()] + numbered_checkpoints(self.path)

    def claim(self, source, continues, auto, overwrite):
        """Make the folder ready, and lock it until `release` or the end of the process.

        Args:
            source: resolved path of the checkpoint that the run starts from, or None.
            continues: whether that is a checkpoint of the same stage.
            auto: whether any run that lies in the folder may be continued.
            overwrite: whether it may be deleted.

        Raises:
            UserError: the folder cannot be written, is in use, or holds another run, and neither --resume nor
                --overwrite permits to use it. Nothing is made or changed then.
            OSError: a file in it cannot be written.
        """
        lock = self.path / ".lock"
        self._check_folders()
        try:
            if lock.exists():
                self._acquire(lock)
            self._check_run(source, continues, auto, overwrite)
        except UserError:
            self.release()
            raise
        self.path.mkdir(parents=True, exist_ok=True)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._acquire(lock)
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        if self.final.exists() and not self._traces():
            os.replace(self.final, self.downloaded)
            print(f"{self.final} comes from elsewhere; it is kept as {self.downloaded.name}", flush=True)
        if overwrite:
            self._delete_earlier()

    def _check_folders(self):
        """Refuse a folder that cannot be written, and a --log_dir that holds another run's curves."""
        for flag, folder in (("--output_dir", self.path), ("--log_dir", self.log_dir)):
            nearest = next(place for place in (folder, *folder.parents) if os.path.exists(place))
            if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
                raise UserError(f"{flag}: {folder} is not a folder that can be written")
        # The suffix depends on the path. So a run that was moved has curves with an old suffix in its own folder.
        if self.log_dir.resolve() != self.path.resolve() or not self._traces():
            for path in self.log_dir.glob("events.out.tfevents.*"):
                if not path.name.endswith(self.suffix):
                    raise UserError(f"--log_dir: {self.log_dir} holds the curves of another run ({path.name}), "
                                    f"expected a folder of its own, such as {self.log_dir / self.path.name}")

    def _check_run(self, source, continues, auto, overwrite):
        inside = source is not None and source.parent == self.path.resolve()
        traces = self._traces()
        if overwrite and inside:
            raise UserError(f"--overwrite: would delete {source.name}, from which this run starts, "
                            "expected another --output_dir")
        if traces and not (overwrite or auto or (continues and inside)):
            raise UserError(f"--output_dir: {self.path} holds another run ({traces[0].name}); expected an empty "
                            "folder, or --resume auto to continue that run, or --overwrite to delete it")
        if self.final.exists() and self.downloaded.exists() and not traces:
            raise UserError(f"--output_dir: {self.final} and {self.downloaded.name} both come from elsewhere, "
                            "expected one of them at most")

    def _acquire(self, lock):
        self._lock = open(lock, "a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            raise UserError(f"--output_dir: {self.path} is in use by process {self._lock.read() or 'unknown'}, "
                            "expected a folder that no other run writes to") from error
        except OSError:  # a file system without locks, such as some of NFS
            pass

    def release(self):
        if self._lock:
            self._lock.close()
            self._lock = None

    def _delete_earlier(self):
        """Delete the earlier run in this folder, and its files in a --log_dir elsewhere."""
        for path in [*self._traces(), self.final]:
            path.unlink(missing_ok=True)
        alone = self.log_dir.resolve() == self.path.resolve()
        for path in self.log_dir.glob("events.out.tfevents.*" if alone else f"events.out.tfevents.*{self.suffix}"):
            path.unlink()
        (self.log_dir / "projector_config.pbtxt").unlink(missing_ok=True)
        for embedding in self.log_dir.glob("[0-9]*/test_features"):
            shutil.rmtree(embedding)

    def prune(self):
        """Delete checkpoint-latest.pth, now outdated, and all but the newest `keep` numbered checkpoints."""
        (self.path / LATEST).unlink(missing_ok=True)
        if self.keep:
            for old in numbered_checkpoints(self.path)[:-self.keep]:
                old.unlink(missing_ok=True)
