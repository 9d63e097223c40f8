"""The command line: every flag with its help, in groups; each entry script sets its own defaults."""
import argparse
import math
import os
import sys

from util.errors import UserError
from util.signals import Interrupted


class Parser(argparse.ArgumentParser):
    """argparse that ends in one line instead of the whole usage, and knows no abbreviated flags."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=Formatter)

    def parse_args(self, args=None, namespace=None):
        """Parse; `given` of the result names the flags that the user gave, whatever their values."""
        parsed = super().parse_args(args, namespace)
        parsed.given = set(vars(super().parse_args(args, WithoutDefaults())))
        return parsed

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class WithoutDefaults(argparse.Namespace):
    """A namespace that claims to have every flag already, so that argparse sets no default in it."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)


class Unset(int):
    """A default that the user did not choose, hence one that may give way to what the user did choose."""


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite `kind` (int or float) within [low, high] and greater than `above`."""
    bounds = [f"of at least {low}"] * (low > -math.inf) + [f"above {above}"] * (above > -math.inf)
    bounds += [f"of at most {high}"] * (high < math.inf)
    expected = " ".join([{int: "a whole number", float: "a number"}[kind], " and ".join(bounds)]).strip()

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value > above and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"found '{text}', expected {expected}")
        return value
    return parse


AT_LEAST_0, AT_LEAST_1 = number(int, low=0), number(int, low=1)
POSITIVE = number(float, above=0)


def common_parser(description):
    """The flags of all six scripts."""
    parser = Parser(description)
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", "-dr", help="folder that holds CIFAR, or that it is downloaded to")
    data.add_argument("--toy_data", action="store_true", help="draw toy images in memory instead of reading CIFAR")
    data.add_argument("--imbalanced_factor", type=number(float, low=1), default=100,
                      help="training images of the largest class per image of the smallest")
    data.add_argument("--num_classes", type=AT_LEAST_1, help="classes of the data set")
    data.add_argument("--input_size", type=AT_LEAST_1, default=32, help="side of the images fed to the model, pixels")
    data.add_argument("--jitter_strength", "--num_views", type=number(float, low=0, high=2.5),
                      help="strength s of the colour jitter (the published code calls it --num_views)")

    model = parser.add_argument_group("model")
    model.add_argument("--model", help="timm model whose features are learned")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=AT_LEAST_1, help="passes over the training images")
    optimisation.add_argument("--batch_size", type=AT_LEAST_1, help="images per process and step")
    optimisation.add_argument("--accum_iter", type=AT_LEAST_1, default=1, help="steps whose gradients make one update")
    optimisation.add_argument("--weight_decay", type=number(float, low=0), default=0.05,
                              help="AdamW's, on weights only: not on biases and norms")
    optimisation.add_argument("--lr", type=POSITIVE, help="learning rate; unset, --blr * effective batch / 256")
    optimisation.add_argument("--blr", type=POSITIVE, default=1e-3, help="learning rate per 256 images of a batch")
    optimisation.add_argument("--min_lr", type=number(float, low=0), default=0.0, help="learning rate at the end")
    optimisation.add_argument("--warmup_epochs", type=AT_LEAST_0,
                              help="epochs of linear warm-up; the default shrinks to fit a short run")

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", help="folder for checkpoints and log.txt")
    run.add_argument("--log_dir", help="folder for TensorBoard; unset, --output_dir")
    run.add_argument("--overwrite", action="store_true", help="delete another run's files in --output_dir first")
    run.add_argument("--save_freq", "-sf", type=AT_LEAST_1, help="epochs between numbered checkpoints")
    run.add_argument("--keep_checkpoints", type=AT_LEAST_0, default=3, help="numbered checkpoints to keep; 0: all")
    run.add_argument("--start_epoch", type=AT_LEAST_0, help="first epoch; unset, the one after the checkpoint's")
    run.add_argument("--eval", metavar="FILE", help="evaluate this checkpoint and stop; what it was trained on and with "
                     "(data, factor, model, ...) is taken from it, unless a flag says otherwise")
    run.add_argument("--eval_freq", type=AT_LEAST_1, help="epochs between evaluations on the test set")
    run.add_argument("--device", default="auto", help="auto (CUDA where there is one, else the CPU), cpu, cuda, cuda:N")
    run.add_argument("--amp", choices=["auto", "bfloat16", "float16", "none"], default="auto",
                     help="precision of the encoder; auto: bfloat16 where the hardware has it, else float32")
    run.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    run.add_argument("--seed", type=AT_LEAST_0, help="of everything that is random")
    return parser


def pretrain_parser(description):
    """The flags of stage 1."""
    parser = common_parser(description)
    bns = parser.add_argument_group("balanced negative sampling")
    bns.add_argument("--embed_dim", type=AT_LEAST_1, default=128, help="dimensions of the projections")
    bns.add_argument("--temperature", type=POSITIVE, default=0.5, help="divides the cosine similarities")
    bns.add_argument("--bns_form", choices=["published", "eq12"], default="published",
                     help="the loss of the published code, or equation 12 of the paper")
    bns.add_argument("--num_extra_positives", type=AT_LEAST_0, default=4, help="m of equation 12")
    parser.add_argument("--resume", nargs="+", metavar="FILE",
                        help="checkpoint to continue from; auto: the newest of --output_dir, if there is one")
    parser.set_defaults(eval_freq=25)
    return parser


def classifier_parser(description):
    """The flags that both later stages have."""
    parser = common_parser(description)
    parser.add_argument("--resume", nargs="+", metavar="FILE",
                        help="pretrained extractor to start from, or checkpoint of this stage to continue from; auto: "
                        "the newest of --output_dir, if there is one (auto FILE: else FILE)")
    parser.add_argument("--logit_adjustment", type=number(float, low=0), default=1.0, metavar="TAU",
                        help="evaluate also with logits minus TAU times the log of each class's share of the images "
                        "trained on (Menon et al., 2021); 0: do not")
    parser.set_defaults(eval_freq=1)
    parser.add_argument("--num_samples", type=AT_LEAST_1, help="training images drawn per class, at most")
    return parser


def finetune_parser(description):
    """The flags of stage 2."""
    parser = classifier_parser(description)
    parser.add_argument("--loss", choices=["cross_entropy", "logit_adjusted"], default="cross_entropy",
                        help="logit_adjusted: cross-entropy of logits plus the log of each class's share of the images "
                        "trained on; predictions are then not adjusted again")
    ip_dpp = parser.add_argument_group("information-preservable DPP")
    ip_dpp.add_argument("--sampling_freq", type=AT_LEAST_1, help="draw anew before each 0-based epoch e with (e + 1) %% this == 0")
    ip_dpp.add_argument("--ipdpp_sampler", choices=["exact", "mcmc", "uniform", "none"], default="exact",
                        help="exact k-DPP; DPPy's exchange chain; plain random undersampling; no undersampling at all")
    ip_dpp.add_argument("--ipdpp_kernel", choices=["paper", "published"], default="paper",
                        help="similarities divided by N (equation 16) or, as in the published code, by N^2")
    ip_dpp.add_argument("--mcmc_steps", type=AT_LEAST_1, default=1000, help="moves of the chain of --ipdpp_sampler mcmc")
    return parser


def launch(main, parser):
    """Run an entry script: parse, call `main(args)`, and turn a user's mistake or a signal into one line and a code."""
    args = parser.parse_args()
    try:
        main(args)
    except UserError as error:
        process = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        parser.exit(2, f"{parser.prog}: error: {error}{process}\n")
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, flush=True)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted before or after the training\n")
