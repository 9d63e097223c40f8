"""What a recipe needs besides its method: processes, precision, where to start, logs, checkpoints, and how it ends."""
import math
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError
from util.run import log
from util.run.checkpoint import save_checkpoint
from util.run.folder import Folder
from util.run.processes import Processes, keep_freed_memory, set_precision
from util.run.resume import begin_from, take_trained_flags
from util.run.signals import StopSignal

SAVE_EVERY = 600.0  # seconds after which a checkpoint is written, whatever --save_freq says


class Run:
    """One run of a script, a context manager. A recipe calls `begin`, then `end_epoch` for each of `epochs`, `finish`.

    Attributes that recipes and engine use:

        args, model            the flags; the model that `begin` was given, without DDP and torch.compile
        device, processes      where tensors lie; the processes of the run
        autocast(), scaler     precision of the forward pass; scales the loss of float16
        start_epoch, subset    first epoch to train; images drawn before it, or None
        steps, began           batches of an epoch; when the training began, by time.monotonic
        evaluated              with --eval: its checkpoint
        log                    TensorBoard and log.txt

    Raises:
        UserError: a flag that this machine cannot obey, or a checkpoint of --eval that cannot be read.
    """

    def __init__(self, args):
        self.args = args
        self.folder, self.stop, self.stopping = None, None, False
        self.processes = Processes(args.device)
        self.device = self.processes.device
        if args.eval:
            self.evaluated = take_trained_flags(args, self.say)
        self.autocast, self.scaler = set_precision(args, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        """Give back signals and the folder's lock, however the run ended."""
        if self.stop:
            self.stop.restore()
            self.log.close()
        if self.folder:
            self.folder.release()
        if error is None or self.stopping:  # after an error, the other processes may not come to this
            self.processes.end()

    def say(self, text):
        if self.processes.first:
            log.say(text)

    def begin(self, model, optimizer, steps):
        """Load what --resume or --encoder names, claim the output folder, open the logs. Returns the network to train.

        Args:
            model: has the encoder `enc`. Its weights are loaded in place.
            steps: batches of an epoch.

        Raises:
            UserError: a checkpoint cannot be read or does not fit, or the folder may not be used.
            OSError: a file cannot be written.
        """
        args, first = self.args, self.processes.first
        self.model, self.optimizer, self.steps = model, optimizer, steps
        final = f"{args.stage}_{args.dataset}_if{args.imbalanced_factor:.10g}.pth"
        self.folder = Folder(args.output_dir, final, args.keep_checkpoints)
        log_dir = Path(args.log_dir or args.output_dir)
        source = begin_from(self, model, optimizer)
        self.processes.wait()  # until all have read `source`, which `claim` may rename
        auto = "auto" in (args.resume or [])
        self.processes.from_first(self.folder.claim, log_dir, auto, args.overwrite, source)
        self.log = log.RunLog(self.folder.path, log_dir, self.start_epoch, quiet=not first)
        if self.history:  # else an empty log.txt would be taken for a run, should this one end before its first epoch
            self.processes.from_first(self.log.write_history, self.history)
        self.last_epoch = self.start_epoch - 1
        self.began = self.saved_at = time.monotonic()
        self.stop = StopSignal()
        data = f"toy data like {args.dataset}" if args.toy_data else args.dataset
        lr = optimizer.param_groups[0]["initial_lr"]  # the scheduler has set "lr" to the warm-up's first, 0
        self.say(f"{args.stage} on {data} at IF {args.imbalanced_factor:.10g}: {steps} steps an epoch, {args.model}, "
                 f"{self.device}, amp {args.amp}, lr {lr:g}, {self.processes.world_size} process(es)")
        network = DistributedDataParallel(model) if self.processes.world_size > 1 else model
        # One graph for each batch size. With dynamic shapes, the smaller last batch would slow down all later ones.
        return torch.compile(network, dynamic=False) if args.compile else network

    def epochs(self):
        """The epochs to train, until a signal stops the run."""
        for epoch in range(self.start_epoch, self.args.epochs):
            yield epoch
            if self.stopping:
                return

    def evaluates(self, epoch):
        return (epoch + 1) % self.args.eval_freq == 0 or epoch == self.args.epochs - 1

    def end_epoch(self, epoch, stats, subset=None):
        """Write `stats` (dict of figures) to log.txt, and a checkpoint if it is time, or if a signal came.

        subset: int64 indices of the images drawn, for the checkpoint.

        Raises:
            UserError: a figure or weight is not finite; nothing is written then.
            OSError: a file cannot be written; those before it are as they were.
        """
        finite = torch.stack([value.isfinite().all() for value in self.model.state_dict().values()]).all()
        if not (finite and all(math.isfinite(value) for value in stats.values() if isinstance(value, float))):
            raise UserError(f"epoch {epoch}: the loss or a weight is not finite any more: lower --lr or --blr, or try "
                            "--amp none; checkpoints written before are as they were")
        self.history.append({"epoch": epoch, **stats})
        self.last_epoch, self.subset = epoch, subset
        if "test_acc1" in stats:
            self.say(f"Max accuracy: {max(record.get('test_acc1', 0) for record in self.history):.2f}%")
        last = epoch == self.args.epochs - 1
        self.stopping = self.processes.any(self.stop.signum is not None) and not last
        self.log.results(stats, epoch)  # a run killed after its checkpoint would never plot them
        self.processes.from_first(self.log.write_history, self.history)
        self.processes.from_first(self._save, last)

    def _save(self, last):
        due = (self.last_epoch + 1) % self.args.save_freq == 0 or time.monotonic() - self.saved_at > SAVE_EVERY
        if due or last or self.stopping:
            self.folder.save(self._state(), self.last_epoch)
            self.saved_at = time.monotonic()

    def _state(self):
        flags = {name: value for name, value in vars(self.args).items() if name != "given"}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": self.last_epoch,
                "scaler": self.scaler.state_dict(), "args": flags, "history": self.history, "subset": self.subset}

    def finish(self):
        """Write the final file. Returns the run's log, a list of dicts.

        Raises:
            SystemExit: instead of all that, after SIGTERM, Ctrl-C or SIGHUP in any process.
        """
        args, final = self.args, self.folder.final
        if self.stopping:
            self.say(f"stopped after epoch {self.last_epoch}; add --resume auto to the command to go on from there")
            raise SystemExit(128 + (self.stop.signum or 15))  # 15: the signal came to another process
        # A run that had been finished before keeps its file, which says by which flags it was trained.
        if self.start_epoch < args.epochs or not self.processes.from_first(final.exists):
            self.processes.from_first(lambda: save_checkpoint(self._state(), final))
        self.say(f"finished after epoch {self.last_epoch}: weights in {final}, figures in {self.log.path}, "
                 f"TensorBoard events in {args.log_dir or args.output_dir}")
        return self.history
