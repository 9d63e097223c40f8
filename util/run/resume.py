"""Whether flags go together, and with the flags that a checkpoint was trained with.

Raise UserError where they do not. What else the user should know goes to `say`, a function that prints a line.
"""
import timm

from util.errors import UserError
from util.imbalanced_cifar import DATASETS
from util.run.options import RUN_FLAGS

EVAL_FLAGS = ("toy_data", "imbalanced_factor", "model", "input_size", "num_samples", "ipdpp_sampler", "loss")
DATA_FLAGS = ("dataset", "toy_data", "imbalanced_factor")
FIXED_FLAGS = (*DATA_FLAGS, "model", "input_size", "embed_dim")  # must not change when a run continues
SILENT_FLAGS = RUN_FLAGS | {"data_root", "given"}  # may change without a message
WITHOUT_EFFECT = {  # a flag, and with which values of another it does nothing
    "num_samples": ("ipdpp_sampler", ("none",)),
    "sampling_freq": ("ipdpp_sampler", ("none",)),
    "ipdpp_kernel": ("ipdpp_sampler", ("uniform", "none")),
    "mcmc_steps": ("ipdpp_sampler", ("exact", "uniform", "none")),
    "num_extra_positives": ("bns_form", ("published",)),
    "logit_adjustment": ("loss", ("logit_adjusted",)),
}


def check(args, say):
    """Check that the flags go together. Shortens --warmup_epochs where it would leave no epoch after it."""
    classes = DATASETS[args.dataset].num_classes
    if args.num_classes != classes:
        raise UserError(f"--num_classes: found {args.num_classes}, expected {classes}, which {args.dataset} has")
    if args.eval:
        for flag in ("resume", "encoder", "start_epoch", "overwrite"):
            if flag in args.given:
                raise UserError(f"--{flag}: found together with --eval, expected one of the two")
        return
    if args.warmup_epochs >= args.epochs:
        say(f"--warmup_epochs: {args.warmup_epochs} of --epochs {args.epochs} would leave no epoch after it; "
            f"using {args.epochs // 5}")
        args.warmup_epochs = args.epochs // 5
    if (args.start_epoch or 0) >= args.epochs:
        raise UserError(f"--start_epoch: found {args.start_epoch}, expected less than --epochs {args.epochs}")
    if args.lr and "blr" in args.given:
        say(f"--blr has no effect with --lr {args.lr:g}")
    resume = args.resume or []
    auto = resume[:1] == ["auto"]
    if len(resume) > (2 if auto else 1) or "auto" in resume[1:]:
        raise UserError(f"--resume: found '{' '.join(resume)}', expected FILE, auto, or auto FILE")
    if args.encoder and resume not in ([], ["auto"]):
        raise UserError(f"--encoder: found together with --resume {' '.join(resume)}, expected one of the two files")
    if auto and args.start_epoch is not None:
        raise UserError("--start_epoch: found together with --resume auto, which goes on after the last epoch "
                        "done; expected one of the two")
    if auto and args.overwrite:
        raise UserError("--overwrite: found together with --resume auto, expected one of the two: to delete "
                        "the run in --output_dir, or to continue it")


def adopt_trained(args, trained, say):
    """Take the flags that the user did not give from those of --eval's checkpoint, `trained`."""
    dataset, taken = trained.get("dataset", args.dataset), []
    if dataset != args.dataset:
        say(f"evaluating on {args.dataset}; {args.eval} was trained on {dataset}")
    for name in EVAL_FLAGS:
        value = trained.get(name)
        if value is None or not hasattr(args, name) or value == getattr(args, name):
            continue
        if name in args.given:
            say(f"--{name} {getattr(args, name)}, as asked; {args.eval} was trained with {value}")
        elif name == "toy_data" and "data_root" in args.given:
            say(f"evaluating on the images of --data_root; {args.eval} was trained on toy images")
        elif name == "imbalanced_factor" and dataset != args.dataset:
            continue  # this data set may not have as many images
        elif name != "model" or timm.is_model(value):  # a published file may name it in another way
            setattr(args, name, value)
            taken.append(f"{name} {value}")
    if taken:
        say(f"from the checkpoint: {', '.join(taken)}")


def name_without_effect(args, say):
    """Say which of the flags that the user gave do nothing."""
    for name, (other, values) in WITHOUT_EFFECT.items():
        if name in args.given and getattr(args, other, None) in values:
            say(f"--{name} has no effect with --{other} {getattr(args, other)}")


def changed_flags(args, trained, source, say):
    """Names of the flags that change when a run continues.

    Args:
        trained: flags of the checkpoint, dict.
        source: names the flag and file in the error.

    Raises:
        UserError: one of FIXED_FLAGS changes.
    """
    changed = [name for name, value in vars(args).items()
               if name in trained and trained[name] != value and name not in SILENT_FLAGS]
    for name in changed:
        if name == "model" and not timm.is_model(trained["model"]):
            continue  # a published file may name it in another way; whether the weights fit is checked elsewhere
        if name in FIXED_FLAGS:
            raise UserError(f"{source} was trained with --{name} {trained[name]}, found --{name} "
                            f"{getattr(args, name)}; expected the same, or another --output_dir and no --resume")
        say(f"--{name}: {trained[name]} in the checkpoint, {getattr(args, name)} from here on")
    return changed


def check_encoder(args, trained, source):
    """Check --model against that of the encoder to start from. Returns what else differs, as flags and values."""
    if timm.is_model(str(trained.get("model"))) and trained["model"] != args.model:
        raise UserError(f"{source} was trained with --model {trained['model']}, found --model "
                        f"{args.model}; expected the same")
    return [f"{name} {trained[name]}" for name in (*DATA_FLAGS, "input_size")
            if trained.get(name) not in (None, getattr(args, name))]
