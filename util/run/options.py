"""The command line: every flag with its help. Each script chooses groups of flags and sets their defaults."""
import argparse
import math
import os
import sys

import torch

from util.errors import UserError
from util.run.log import say


def number(kind, expected, fits):
    """An argparse type: a finite `kind` (int or float) for which `fits` holds; `expected` says which ones those are."""
    def parse(text):
        try:
            value = kind(text)
            if math.isfinite(value) and fits(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"found '{text}', expected {expected}")
    return parse


def path(text):
    """An argparse type: the name of a file or folder. A quoted ~ reaches Python as it is."""
    if not text:
        raise argparse.ArgumentTypeError("found an empty name, expected a file or folder (is a variable unset?)")
    return os.path.expanduser(text)


AT_LEAST_0 = number(int, "a whole number of at least 0", lambda value: value >= 0)
AT_LEAST_1 = number(int, "a whole number of at least 1", lambda value: value >= 1)
AT_LEAST_2 = number(int, "a whole number of at least 2", lambda value: value >= 2)
NOT_NEGATIVE = number(float, "a number of at least 0", lambda value: value >= 0)
FACTOR = number(float, "a number of at least 1", lambda value: value >= 1)
POSITIVE = number(float, "a number above 0", lambda value: value > 0)
SHARE = number(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
STRENGTH = number(float, "a number from 0 to 2.5", lambda value: 0 <= value <= 2.5)
SEED = number(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
ON = {"action": "store_true"}

GROUPS = {
    "data": {
        "--data_root -dr": dict(type=path, help="folder that holds CIFAR, or that it is downloaded to"),
        "--toy_data": dict(ON, help="render toy images in memory instead of reading CIFAR"),
        "--imbalanced_factor": dict(type=FACTOR, help="images of the largest class per image of the smallest"),
        "--num_classes": dict(type=AT_LEAST_1, help="classes of the data set"),
        "--input_size": dict(type=AT_LEAST_2, help="side of the images fed to the model, pixels"),
        "--augment": dict(choices=["simclr", "crop", "auto"], help="of the training images: SimCLR's; padding, crop "
                          "and flip; these, AutoAugment and Cutout. Only simclr heeds --min_crop and the jitter"),
        "--min_crop": dict(type=SHARE, help="area of SimCLR's smallest crop, as a share of the image"),
        "--jitter_strength --num_views": dict(type=STRENGTH, help="strength s of the colour jitter (the published "
                                              "code calls it --num_views)"),
    },
    "model": {"--model": dict(help="a ResNet of timm, such as resnet18, or cifar_resnet20, 32 or 56")},
    "balanced negative sampling": {
        "--embed_dim": dict(type=AT_LEAST_1, help="dimensions of the projections"),
        "--temperature": dict(type=POSITIVE, help="divides the cosine similarities"),
        "--bns_form": dict(choices=["published", "eq12"],
                           help="the loss of the published code, or equation 12 of the paper"),
        "--num_extra_positives": dict(type=AT_LEAST_0, help="with --bns_form eq12: other images of an image's class "
                                      "that are its positives, m"),
    },
    "classifier": {
        "--num_samples": dict(type=AT_LEAST_1, help="training images drawn per class, at most"),
        "--logit_adjustment": dict(type=NOT_NEGATIVE, metavar="TAU", help="evaluate also with logits minus TAU times "
                                   "the log of each class's share of the images trained on; 0: do not"),
    },
    "information-preservable DPP": {
        "--sampling_freq": dict(type=AT_LEAST_1, help="epochs between draws: a new one comes before epoch e, counted "
                                "from 0, if (e + 1) is a multiple of this, except before the last"),
        "--ipdpp_sampler": dict(choices=["exact", "uniform", "none"], help="exact k-DPP; plain random undersampling; "
                                "no undersampling at all"),
        "--ipdpp_kernel": dict(choices=["paper", "published"], help="similarities divided by N (equation 16) or, as in "
                               "the published code, by N^2"),
        "--loss": dict(choices=["cross_entropy", "logit_adjusted"], help="logit_adjusted: cross-entropy of logits plus "
                       "the log of each class's share of the images trained on; predictions are not adjusted then"),
    },
    "optimisation": {
        "--epochs": dict(type=AT_LEAST_1, help="passes over the training images, or those drawn"),
        "--batch_size": dict(type=AT_LEAST_2, help="images per process and step; batch norm needs two"),
        "--opt": dict(choices=["adamw", "sgd"], help="optimiser; sgd: with Nesterov momentum of 0.9"),
        "--weight_decay": dict(type=NOT_NEGATIVE, help="on weights only: not on biases and norms"),
        "--lr": dict(type=POSITIVE, help="learning rate; unset, --blr * (images per step, of all processes) / 256"),
        "--blr": dict(type=POSITIVE, help="learning rate per 256 images of a step"),
        "--min_lr": dict(type=NOT_NEGATIVE, help="learning rate at the end"),
        "--warmup_epochs": dict(type=AT_LEAST_0, help="epochs of linear warm-up; where that would be all epochs, a "
                                "fifth of --epochs instead"),
        "--amp": dict(choices=["auto", "bfloat16", "float16", "none"], help="precision of the network; auto: bfloat16 "
                      "where the hardware has it, else float16 on CUDA and float32 on the CPU; none: float32"),
        "--seed": dict(type=SEED, help="seed of all random choices"),
    },
    "run": {
        "--resume": dict(nargs="+", action="extend", type=path, metavar="FILE", help="checkpoint of this stage to "
                         "continue from, or of another, whose encoder to start from; auto: the highest epoch in "
                         "--output_dir. Of both, given together or apart, auto comes first"),
        "--encoder": dict(type=path, metavar="FILE", help="start from the encoder in this checkpoint, of any stage"),
        "--eval": dict(type=path, metavar="FILE", help="evaluate this checkpoint and stop. Data, model and draws are "
                       "those that it was trained with, unless you give a flag"),
        "--eval_freq": dict(type=AT_LEAST_1, help="epochs between evaluations on the test set"),
        "--output_dir": dict(type=path, help="folder for checkpoints and log.txt"),
        "--log_dir": dict(type=path, help="folder for TensorBoard; unset, --output_dir"),
        "--overwrite": dict(ON, help="delete the run in --output_dir first"),
        "--save_freq -sf": dict(type=AT_LEAST_1, help="epochs between checkpoints; or ten minutes"),
        "--keep_checkpoints": dict(type=AT_LEAST_0, help="checkpoints to keep; 0: all"),
        "--device": dict(help="auto (CUDA where there is one, else the CPU), cpu, cuda, cuda:N"),
        "--compile": dict(ON, help="compile the model with torch.compile"),
        "--deterministic": dict(ON, help="on CUDA, repeat a run bit for bit, at some cost of speed"),
    },
}
# These may change without a word when a run continues.
RUN_FLAGS = {names.split()[0].strip("-") for names in GROUPS["run"]} | {"data_root"}


class Parser(argparse.ArgumentParser):
    """Parses the flags of `groups` (titles in GROUPS). It takes no abbreviations, and an error is one line."""

    def __init__(self, description, groups):
        super().__init__(description=description, allow_abbrev=False, formatter_class=Formatter)
        for title in groups:
            group = self.add_argument_group(title)
            for names, settings in GROUPS[title].items():
                group.add_argument(*names.split(), **settings)

    def parse_args(self, args=None, namespace=None):
        """Parse; `given` of the result holds the names of the flags that the user gave."""
        words = {word.partition("=")[0] for word in (sys.argv[1:] if args is None else args)}
        parsed = super().parse_args(args, namespace)
        parsed.given = [action.dest for action in self._actions if words & set(action.option_strings)]
        return parsed

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def launch(main, parser):
    """Run an entry script: parse, call `main(args)`, and turn an error that the user can mend into one line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
    try:
        main(parser.parse_args())
    except (UserError, OSError) as error:  # an OSError names the file
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except torch.OutOfMemoryError:
        parser.exit(2, f"{parser.prog}: error: out of memory: lower --batch_size or take a smaller --model\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted before or after the training\n")
    finally:
        say("", end="")  # so that a reader that left, such as `head`, brings no traceback
