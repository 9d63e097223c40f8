"""What a run needs besides its recipe: processes, precision, checkpoints, logs, the output folder and signals."""
import math
import os
import resource
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError
from util.run import resume as flag_checks
from util.run.checkpoint import (
    LATEST,
    load_checkpoint,
    load_encoder,
    load_weights,
    newest_checkpoint,
    restore_optimizer,
    save_checkpoint,
    stage_of,
)
from util.run.folder import OutputFolder
from util.run.log import Progress, RunLog
from util.run.processes import Processes, keep_freed_memory
from util.run.signals import StopSignal

PICTURES = 10  # epochs of a run whose evaluation TensorBoard shows as pictures
LATEST_EVERY = 60.0  # seconds; on a GPU, an epoch can be shorter than the writing of its checkpoint
DRAW_FLAGS = ("num_samples", "ipdpp_sampler", "ipdpp_kernel", "mcmc_steps", "seed")


class Run:
    """One run of a script. A recipe calls `begin` before its first epoch, `end_epoch` and, after the last, `finish`.

    Attributes that the recipes use:

        args, model            the flags; the model that `begin` was given, without DDP and torch.compile
        device, processes      where tensors lie; the processes of the run
        autocast(), scaler     precision of the forward pass; scales the loss of float16
        start_epoch, subset    first epoch to train; images drawn before it, or None
        evaluated              with --eval: its checkpoint
        log, progress          TensorBoard and log.txt; the progress line

    Raises:
        UserError: flags that do not go together, or a checkpoint of --eval that cannot be read.
    """

    def __init__(self, args):
        self.args = args
        self.processes = Processes(args.device)
        self.device = self.processes.device
        flag_checks.check(args, self.say)
        if args.eval:
            self.evaluated = load_checkpoint(args.eval, "--eval")
            flag_checks.adopt_trained(args, self.evaluated["args"], self.say)
        flag_checks.name_without_effect(args, self.say)
        dtype = amp_dtype(args.amp, self.device)
        args.amp = str(dtype).removeprefix("torch.") if dtype else "none"
        self.autocast = lambda: torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.backends.cudnn.benchmark = not args.deterministic
        torch.backends.cudnn.allow_tf32 = dtype is not None  # --amp none means float32 throughout
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def say(self, text):
        if self.processes.first:
            print(text, flush=True)

    def load_evaluated(self, model):
        """Load the checkpoint of --eval into `model`. Raises UserError if it is of another stage or does not fit."""
        source, args = f"--eval {self.args.eval}", self.evaluated["args"]
        if args.get("dataset", self.args.dataset) != self.args.dataset:
            raise UserError(f"{source} was trained on {args['dataset']}, expected one of {self.args.dataset}; its "
                            f"script is main_{args['dataset']}_{stage_of(self.evaluated)}.py")
        # Published files do not say their stage. Any of them that has a linear layer will do.
        if stage_of(self.evaluated) != self.args.stage and (
                "stage" in args or "lin.weight" not in self.evaluated["model"]):
            raise UserError(f"{source} holds {_describe_stage(self.evaluated)}, expected one of {self.args.stage}")
        load_weights(model, self.evaluated["model"], source)

    # ------------------------------------------------------------------------------------------ before training

    def images_per_update(self, num_images):
        """Images of all processes that make an update of the weights; in an epoch of `num_images`, at most as many."""
        return min(self.args.batch_size * self.processes.world_size * self.args.accum_iter, int(num_images))

    def updates_per_epoch(self, steps):
        """Updates of the weights in an epoch of `steps`."""
        return math.ceil(steps / self.args.accum_iter)

    def begin(self, model, optimizer, steps):
        """Load what --resume or --encoder names, claim the output folder, open the logs. Returns the network to train.

        Args:
            model: has the encoder `enc`. Its weights are loaded in place.
            steps: batches of an epoch.

        Raises:
            UserError: a checkpoint cannot be read or does not fit, the folder may not be used, or --min_lr is above the
                learning rate.
            OSError: a file cannot be written.
        """
        args, first = self.args, self.processes.first
        lr = optimizer.param_groups[0]["initial_lr"]  # the scheduler has set "lr" to the warm-up's first, 0
        if args.min_lr > lr:
            raise UserError(f"--min_lr: found {args.min_lr:g}, expected at most the learning rate, {lr:g}")
        self.model, self.optimizer = model, optimizer
        self.start_epoch, self.history, self.subset = args.start_epoch or 0, [], None
        final = f"{args.stage}_{args.dataset}_if{args.imbalanced_factor:.10g}.pth"
        self.auto = (args.resume or [])[:1] == ["auto"]
        self.folder = OutputFolder(args.output_dir, args.log_dir or args.output_dir, final, args.keep_checkpoints)
        checkpoint, path = self._find_checkpoint()
        flag = "--resume"
        if checkpoint is None and args.encoder:
            checkpoint, path, flag = load_checkpoint(args.encoder, "--encoder"), Path(args.encoder), "--encoder"
        continues = checkpoint is not None and flag == "--resume" and stage_of(checkpoint) == args.stage
        if continues:
            self._continue(checkpoint, path)
        elif checkpoint:
            other = flag_checks.check_encoder(args, checkpoint["args"], f"{flag} {path}")
            load_encoder(model.enc, checkpoint, f"{flag} {path}")
            note = f", which, unlike this run, was trained with {' '.join(other)}" if other else ""
            self.say(f"starting from the encoder of {path}{note}")
        elif not args.resume and args.stage != "pretrain_bns":
            self.say("no --resume and no --encoder: starting from a randomly initialised encoder")

        if self.start_epoch and not continues:
            self.say(f"--start_epoch {self.start_epoch}: continues no run, so the epochs before it are left out")
        source = path.resolve() if path else None
        self.processes.any(False)  # until all have read `path`, which `claim` may rename
        self.processes.from_first(self.folder.claim, source, continues, self.auto, args.overwrite)
        self.log = RunLog(self.folder.path, self.folder.log_dir, self.folder.suffix, self.start_epoch, quiet=not first)
        self.log.write_history(self.history)
        self.progress = Progress(args.epochs * steps, self.start_epoch * steps, quiet=not first)
        self.saved_at = time.monotonic()
        toy = "toy data like " if args.toy_data else ""
        self.say(f"{args.stage} on {toy}{args.dataset} at IF {args.imbalanced_factor:.10g}: {steps} steps an epoch, "
                 f"{args.model}, {self.device}, amp {args.amp}, lr {lr:g}, {self.processes.world_size} process(es)"
                 + (f"; continuing {path} in epoch {self.start_epoch}" if continues else ""))
        self.stop = StopSignal()
        network = model
        if self.processes.world_size > 1:
            network = DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)
        self._no_sync = network.no_sync if self.processes.world_size > 1 else nullcontext
        # One graph for each batch size. With dynamic shapes, the smaller last batch would slow down all later ones.
        return torch.compile(network, dynamic=False) if args.compile else network

    def _find_checkpoint(self):
        """What --resume names, as (checkpoint, path); (None, None) where there is nothing to resume."""
        wanted = list(self.args.resume or [])
        if self.auto:
            newest = self.processes.from_first(newest_checkpoint, self.folder.checkpoints())
            if newest:
                checkpoint = load_checkpoint(newest)
                if stage_of(checkpoint) != self.args.stage:
                    raise UserError(f"--output_dir: {self.args.output_dir} holds {_describe_stage(checkpoint)} "
                                    f"({newest.name}), expected one of stage {self.args.stage}, or an empty folder")
                return checkpoint, newest
            if self.folder.checkpoints():
                raise UserError(f"--resume auto: none of the checkpoints in {self.args.output_dir} can be loaded, "
                                "expected a good one, or --overwrite instead of --resume to delete that run")
            wanted.pop(0)
            instead = f"starting from {wanted[0]}" if wanted else "starting afresh"
            self.say(f"--resume auto: no checkpoint in {self.args.output_dir}, {instead}")
        return (load_checkpoint(wanted[0]), Path(wanted[0])) if wanted else (None, None)

    def _continue(self, checkpoint, path):
        """Continue the run of a checkpoint. Refuse other data or another model; say which other flags changed."""
        args, source = self.args, f"--resume {path}"
        changed = flag_checks.changed_flags(args, checkpoint["args"], source, self.say)
        load_weights(self.model, checkpoint["model"], source)
        if reason := restore_optimizer(self.optimizer, checkpoint):
            self.say(f"{source} {reason}; the optimiser starts afresh")
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        if args.start_epoch is None:
            self.start_epoch = checkpoint.get("epoch", -1) + 1
        self.history = [record for record in checkpoint.get("history", []) if record["epoch"] < self.start_epoch]
        self.subset = checkpoint.get("subset")
        if set(changed) & set(DRAW_FLAGS) or self.start_epoch != checkpoint.get("epoch", -1) + 1:
            self.subset = None  # drawn by other flags or for another epoch: draw anew at once

    # ------------------------------------------------------------------------------------------ epochs

    def sync_gradients(self, last_step):
        """Context for a forward and backward pass: gradients are exchanged only in the `last_step` of an update."""
        return nullcontext() if last_step else self._no_sync()

    def evaluates(self, epoch):
        return (epoch + 1) % self.args.eval_freq == 0 or epoch == self.args.epochs - 1

    def shows_pictures(self, epoch):
        return (self.args.epochs - 1 - epoch) % math.ceil(self.args.epochs / PICTURES) == 0

    def end_epoch(self, epoch, stats, subset=None):
        """Log `stats` (dict of figures), save a checkpoint, and stop if a signal came.

        subset: int64 indices of the images drawn, for the checkpoint.

        Raises:
            SystemExit: after SIGTERM, Ctrl-C or SIGHUP in any process, once the epoch is saved.
        """
        self.history.append({"epoch": epoch, **stats})
        self.subset = subset
        if "test_acc1" in stats:
            best = max(record.get("test_acc1", 0) for record in self.history)
            self.say(f"Max accuracy: {best:.2f}%")
        self.log.results(stats, epoch)
        self.log.write_history(self.history)
        last = epoch == self.args.epochs - 1
        stopped = self.processes.any(self.stop.signum is not None) and not last
        self.processes.from_first(self._save, epoch, last, stopped)
        if stopped:
            self.say(f"stopped after epoch {epoch}; add --resume auto to the command to go on from there")
            self._close()
            raise SystemExit(128 + (self.stop.signum or signal.SIGTERM))

    def _save(self, epoch, last=False, stopped=False):
        numbered = last or (epoch + 1) % self.args.save_freq == 0
        if not (numbered or stopped) and time.monotonic() - self.saved_at < LATEST_EVERY:
            return
        flags = {name: value for name, value in vars(self.args).items() if name != "given"}
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": epoch,
                 "scaler": self.scaler.state_dict(), "args": flags, "history": self.history, "subset": self.subset}
        names = [self.folder.final.name] if last else []  # first: a finished run then always has it
        names.append(f"checkpoint-{epoch}.pth" if numbered else LATEST)
        for name in names:
            path = self.folder.path / name
            try:
                save_checkpoint(state, path)
            except OSError as error:
                message = f"could not write {path}: {error}; the checkpoints before it are as they were"
                if last or stopped:
                    raise UserError(message) from error
                print(f"{message}, and training goes on", file=sys.stderr, flush=True)
                return
        self.saved_at = time.monotonic()
        if numbered:
            self.folder.prune()

    def _close(self, flags=None):
        self.stop.restore()
        self.log.close(flags)
        self.folder.release()
        self.processes.end()

    def finish(self):
        """Print what the run reached, where its files are and what to run next. Returns a list of dicts, its log."""
        args, final = self.args, self.folder.final
        wrote = "wrote"
        if self.start_epoch >= args.epochs:
            self.say(f"nothing left to train: {self.start_epoch} epochs were done before, --epochs is {args.epochs}")
            if self.processes.from_first(final.exists):
                wrote = "final file:"
            else:
                self.processes.from_first(self._save, self.start_epoch - 1, True)
        self._close({name: value for name, value in vars(args).items() if name not in flag_checks.SILENT_FLAGS})
        tested = [record for record in self.history if "test_acc1" in record]
        if tested:
            best = max(tested, key=lambda record: record["test_acc1"])
            self.say(f"last epoch {tested[-1]['epoch']}: {tested[-1]['test_acc1']:.2f}%; "
                     f"best epoch {best['epoch']}: {best['test_acc1']:.2f}%")
        self.say(f"peak memory {peak_memory(self.device):.2f} GiB on {self.device}")
        self.say(f"{wrote} {final}, {self.folder.path / 'log.txt'} and TensorBoard events in {self.folder.log_dir}")
        flags = ["--toy_data"] if args.toy_data else ["--data_root", args.data_root]
        if args.stage == "pretrain_bns":
            flags += ["--imbalanced_factor", f"{args.imbalanced_factor:.10g}", "--model", args.model,
                      "--input_size", str(args.input_size), "--resume", str(final)]
            stages = ["lineprob_bns", "finetune_ipdpp"]
        else:
            flags, stages = [*flags, "--eval", str(final)], [args.stage]
        for stage in stages:
            script = Path(sys.argv[0]).with_name(f"main_{args.dataset}_{stage}.py")
            self.say(f"next: {shlex.join(['python', str(script), *flags])}")
        return self.history


def _describe_stage(checkpoint):
    stage = stage_of(checkpoint)
    return f"a checkpoint of stage {stage}" if stage else "neither projector nor linear layer"


def amp_dtype(name, device):
    """The type that `--amp name` means on `device`: torch.bfloat16, torch.float16, or None for float32 throughout."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "none": None}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None


def peak_memory(device):
    """The most memory used so far, in GiB: of the CUDA device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
