"""All that --resume, --encoder and --eval do.

--resume FILE continues the run of FILE if this stage wrote it; otherwise a new run starts from its encoder.
--encoder FILE always starts a new run from its encoder.
--resume auto continues the run in --output_dir from its highest epoch. If there is none, the other file counts, if one
is given, in whatever order; else the run starts afresh.
--eval FILE evaluates FILE, with the data, model and draws that it was trained with, unless the user gives a flag.
"""
from pathlib import Path

from util.errors import UserError
from util.run.checkpoint import load_checkpoint, load_encoder, load_weights, stage_of
from util.run.options import RUN_FLAGS

# What must stay when a run continues; what the last draw depends on; what --eval takes from the checkpoint.
MUST_STAY = {"dataset", "toy_data", "imbalanced_factor", "model", "input_size", "embed_dim", "opt"}
DRAWN_BY = {"num_samples", "ipdpp_sampler", "ipdpp_kernel", "seed"}
TRAINED_ON = ("toy_data", "imbalanced_factor", "model", "input_size", "num_samples", "ipdpp_sampler", "loss")


def take_trained_flags(args, say):
    """For --eval: load its checkpoint, and take the flags of TRAINED_ON from there, but for those that the user gave.

    say: prints a line. Returns the checkpoint. Raises UserError as `load_checkpoint`.
    """
    checkpoint, taken = load_checkpoint(args.eval, "--eval"), []
    for name in TRAINED_ON:
        trained = checkpoint["args"].get(name)
        if trained in (None, getattr(args, name, trained)):
            continue
        if name in args.given:
            say(f"--{name} {getattr(args, name)}, as asked; {args.eval} was trained with {trained}")
        else:
            setattr(args, name, trained)
            taken.append(f"{name} {trained}")
    if taken:
        say(f"from the checkpoint: {', '.join(taken)}")
    return checkpoint


def begin_from(run, model, optimizer):
    """Load what --resume or --encoder names into `model` and `optimizer`. Returns the path of the file, or None.

    run: Run; its `start_epoch`, `history` and `subset` are set.

    Raises:
        UserError: a file cannot be loaded or does not fit, or the flags name two.
    """
    args = run.args
    run.start_epoch, run.history, run.subset = 0, [], None
    words = args.resume or []
    files = [("--resume", word) for word in words if word != "auto"]
    files += [("--encoder", args.encoder)] if args.encoder else []
    if len(files) > 1:
        raise UserError(f"--resume, --encoder: found {', '.join(path for _, path in files)}, expected one file at most")
    if "auto" in words and args.overwrite:
        raise UserError("--overwrite: found together with --resume auto, expected one of the two")
    if "auto" in words:
        if newest := run.folder.newest():
            files = [("--resume auto", newest)]
        else:
            run.say(f"--resume auto: no checkpoint in {args.output_dir} yet")
    if not files:
        if args.stage != "pretrain_bns":
            run.say("no --resume and no --encoder: starting from a randomly initialised encoder")
        return None
    (flag, path), = files
    checkpoint = load_checkpoint(path, flag)
    stage = stage_of(checkpoint)
    if flag == "--resume auto" and stage != args.stage:
        raise UserError(f"--output_dir: {path} is of stage {stage}, expected one of {args.stage}")
    if flag != "--encoder" and stage == args.stage:
        _continue(run, checkpoint, path, model, optimizer)
    else:
        load_encoder(model.enc, checkpoint, f"{flag} {path}")
        run.say(f"starting from the encoder of {path}")
    return Path(path)


def _continue(run, checkpoint, path, model, optimizer):
    """Continue the run of a checkpoint. All but MUST_STAY may change, and all but RUN_FLAGS change aloud."""
    args, trained = run.args, checkpoint["args"]
    changed = {name for name, value in vars(args).items() if trained.get(name, value) != value} - RUN_FLAGS
    for name in sorted(changed):
        if name in MUST_STAY:
            raise UserError(f"--resume {path} was trained with --{name} {trained[name]}, found --{name} "
                            f"{getattr(args, name)}; expected the same; --encoder starts a new run from it")
        run.say(f"--{name}: {trained[name]} in the checkpoint, {getattr(args, name)} from here on")
    load_weights(model, checkpoint["model"], f"--resume {path}")
    if "optimizer" in checkpoint:  # its moments; learning rate and weight decay stay what the flags say
        state = {**checkpoint["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(state)
    else:
        run.say(f"{path} holds no state of the optimiser, which starts afresh")
    if run.scaler.is_enabled() and checkpoint.get("scaler"):
        run.scaler.load_state_dict(checkpoint["scaler"])
    run.start_epoch = checkpoint.get("epoch", -1) + 1
    run.history = checkpoint.get("history", [])
    run.subset = None if changed & DRAWN_BY else checkpoint.get("subset")
    run.say(f"continuing {path} in epoch {run.start_epoch}")
