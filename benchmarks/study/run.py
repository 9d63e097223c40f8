"""Do the runs of a study: stage 1, what is trained from its encoder, and the same from scratch.

    python benchmarks/study/run.py --runs "bns bns-*" cifar10 CIFAR_FOLDER results/cifar10_if100 --model cifar_resnet32

What follows the results folder are flags for every script. Give the command again to go on: a finished run is not
repeated, and a stopped one continues after its last checkpoint. Several may work at once, for example one per core: a
run that is under way elsewhere is passed over, and so is one whose encoder is missing.

The results folder gets the log of each finished run, VARIANT-seed<number>.txt, a README.md with all tables, and in
`commands` a line per part of a run: its command, seconds (on CPU cores those that it computed), hardware and commit.
Checkpoints go to output_dir/RESULTS_FOLDER/VARIANT-seed<number>. To add a variant, add a line to `variants` below.
benchmarks/study/logs.py says what its name means.
"""
import argparse
import fcntl
import re
import resource
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.study import tables  # noqa: E402
from benchmarks.study.logs import encoder_of, is_stage1, read_commands  # noqa: E402
from util.imbalanced_cifar import long_tailed_counts  # noqa: E402

CORE = "bns bns-probe bns-ipdpp bns-uniform bns-no_sampling scratch-uniform scratch-cross_entropy"
UNIFORM, ALL = "--ipdpp_sampler uniform", "--ipdpp_sampler none"
# The field's recipes: that of Cao et al. (arXiv 1906.07413), and the one with AutoAugment and Cutout.
CROP = "--augment crop --opt sgd --lr 0.1 --weight_decay 2e-4 --batch_size 128"
STRONG = "--augment auto --opt sgd --lr 0.1 --weight_decay 5e-4 --batch_size 128 --warmup_epochs 5"


def variants(dataset, factor, stage1_epochs):
    """All variants, a dict from name to (number of seeds, own flags). `stage1_epochs`: those of `bns`."""
    epochs = partial(epochs_for, dataset=dataset, factor=factor)
    numbers = {"cifar10": (100, 200, 1000), "cifar100": (10, 20, 100)}[dataset]
    table = {
        # The paper's two stages, probing, and what they are compared with.
        "bns": (1, ""),
        "bns-probe": (3, ""),
        "bns-ipdpp": (3, ""),
        "bns-uniform": (3, UNIFORM),
        "bns-no_sampling": (2, f"{ALL} --epochs {epochs('all')}"),
        "scratch-uniform": (3, UNIFORM),
        "scratch-cross_entropy": (2, f"{ALL} --epochs 200"),
        # Plain training that sees as many images as stage 1, whose views count twice, and stage 2 together.
        "scratch-cross_entropy-as_long": (2, f"{ALL} --epochs {2 * stage1_epochs + epochs('all')}"),
        # Other forms of the method.
        "bns-ipdpp-n2_kernel": (3, "--ipdpp_kernel published"),
        "bns-ipdpp-adjusted_loss": (3, "--loss logit_adjusted"),
        "scratch-adjusted_loss": (2, f"--loss logit_adjusted {ALL} --epochs 200"),
        "eq12": (1, "--bns_form eq12"),
        "eq12-probe": (3, ""),
        "eq12-ipdpp": (3, ""),
        # Plain training by the field's recipes.
        "scratch-crop": (1, f"{ALL} {CROP} --epochs 200 --warmup_epochs 5"),
        "scratch-strong": (2, f"{ALL} {STRONG} --epochs 200"),
        "scratch-strong-e90": (2, f"{ALL} {STRONG} --epochs 90"),
        "scratch-strong-e160": (2, f"{ALL} {STRONG} --epochs 160"),
        "scratch-strong-e450": (1, f"{ALL} {STRONG} --epochs 450"),
        "scratch-strong-wd0.001-e90": (1, f"{ALL} {STRONG} --weight_decay 1e-3 --epochs 90"),
        "scratch-strong-adjusted_loss": (2, f"{ALL} {STRONG} --epochs 200 --loss logit_adjusted"),
        # Is BNS worth its time? The same from its encoder, and from one of 40 epochs.
        "bns-strong": (1, f"{ALL} {STRONG} --epochs 200"),
        "bns-strong-e90": (1, f"{ALL} {STRONG} --epochs 90"),
        "bns40": (1, "--epochs 40"),
        "bns40-strong-e90": (2, f"{ALL} {STRONG} --epochs 90"),
    }
    # How many images to keep of a class, at the same number of images seen; and the learning rate.
    for sampling, flags in ("ipdpp", ""), ("uniform", UNIFORM):
        for images in numbers:
            fewer = f"--num_samples {images} --epochs {epochs(images)}"
            table[f"bns-{sampling}-n{images}"] = 3, f"{fewer} {flags}"
        for lr in ("0.00025", "0.001"):
            table[f"bns-{sampling}-lr{lr}"] = 3, f"--lr {lr} {flags}"
    for lr in ("0.00025", "0.001"):
        table[f"scratch-uniform-lr{lr}"] = 2, f"--lr {lr} {UNIFORM}"
    # Stage 2 by the strong recipe, from three encoders: BNS's, that of plain training, and that of both in turn.
    for name in "bns-{}-strong", "strong-{}", "bns_strong-{}":
        for lr in "0.003", "0.01", "0.03", "0.1":
            for sampling, flags in ("ipdpp", ""), ("uniform", UNIFORM), ("all", f"{ALL} --epochs {epochs('all')}"):
                variant, recipe = name.format(sampling), f"{STRONG} --lr 0.1 --lr {lr}"  # the last counts
                table[f"{variant}-lr{lr}"] = 3, f"{recipe} {flags}"
                table[f"{variant}-adjusted_loss-lr{lr}"] = 3, f"{recipe} {flags} --loss logit_adjusted"
                for images in numbers if sampling != "all" else ():
                    fewer = f"--num_samples {images} --epochs {epochs(images)}"
                    table[f"{variant}-n{images}-lr{lr}"] = 3, f"{recipe} {fewer} {flags}"
    return table


def epochs_for(images, dataset, factor):
    """Epochs on at most `images` of a class, or "all", that see as many images as 100 epochs of stage 2."""
    classes, largest, own = {"cifar10": (10, 5000, 500), "cifar100": (100, 500, 50)}[dataset]
    counts = long_tailed_counts(classes, largest, factor)
    seen = counts if images == "all" else counts.clip(max=images)
    return round(100 * counts.clip(max=own).sum() / seen.sum())


def plan(args):
    """The runs that the options ask for, a dict from VARIANT-seed<number> to the words of its command.

    Where a flag comes twice, the variant's own wins over that of the options. An encoder is named by its final file
    below the folder of checkpoints. It is trained once: that of stage 1 with seed 0, another with seed 42. Raises
    SystemExit if a pattern of --runs matches no run.
    """
    given = re.findall(r"--epochs (\d+)", args.stage1_flags)
    table = variants(args.dataset, args.imbalanced_factor, int(given[-1]) if given else 1000)
    factor, runs = f"{args.imbalanced_factor:g}", {}
    for variant, (number, flags) in table.items():
        common = ["--imbalanced_factor", factor, *args.flags]
        encoder, start = encoder_of(variant, table), ["--resume", "auto"]
        if encoder and is_stage1(encoder):
            start += [f"{encoder}-seed0/pretrain_bns_{args.dataset}_if{factor}.pth"]
        elif encoder:  # --resume would continue that run
            start = ["--encoder", f"{encoder}-seed42/finetune_ipdpp_{args.dataset}_if{factor}.pth", *start]
        if is_stage1(variant):
            own = ["--seed", "0", *args.stage1_flags.split(), *flags.split()]
            runs[f"{variant}-seed0"] = [f"main_{args.dataset}_pretrain_bns.py", *common, *own, *start]
            continue
        stage = "lineprob_bns" if variant.endswith("-probe") else "finetune_ipdpp"
        for seed in args.seeds[:number]:
            own = ["--eval_freq", "10", *args.later_flags.split(), *flags.split(), "--seed", seed]
            runs[f"{variant}-seed{seed}"] = [f"main_{args.dataset}_{stage}.py", *common, *own, *start]
    chosen = set()
    for pattern in args.runs:
        fitting = {name for name in runs if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}-seed*")}
        if not fitting:
            raise SystemExit(f"--runs: found '{pattern}', expected some of: {' '.join(table)}")
        chosen |= fitting
    return {name: words for name, words in runs.items() if name in chosen}


def train(name, words, args):
    """Train a run until it is over, from where an earlier part of it stopped.

    Raises SystemExit if it is stopped or fails, or was begun with other flags.
    """
    log, finished = args.checkpoints / name / "log.txt", args.results / f"{name}.txt"
    began_file, command = args.checkpoints / f"{name}.began", " ".join(words)
    with open(args.checkpoints / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return print(f"{name}: passed over: under way elsewhere")
        if began_file.exists():
            note_killed_part(name, began_file, log, args)
        noted = [part[2] for part in read_commands(args.results) if part[1] == name]
        if noted and noted[-1] != command:
            raise SystemExit(f"{name} was run with other flags; expected the same, or another folder: {noted[-1]}")
        if finished.exists():
            return
        words = [str(args.checkpoints / word) if word.endswith(".pth") else word for word in words]
        missing = [word for word in words if word.endswith(".pth") and not Path(word).exists()]
        if missing:
            return print(f"{name}: passed over: no {missing[0]}")

        print(f"+ {command}", flush=True)
        where = f"{args.hardware}, commit {commit()}"
        began_file.write_text(f"{time.time():.0f}\n{where}\n{command}\n")
        words += ["--data_root", args.data_root, "--output_dir", str(log.parent)]
        code, seconds = call([sys.executable, ROOT / words[0], *words[1:]], lock, args.hardware)
        began_file.unlink()
        if log.exists():  # else it was a wrong flag, say, and nothing was trained
            note(name, command, seconds, where + (", stopped" if code else ""), args)
        if code:
            raise SystemExit(code)
        copy = args.results / f".{name}.copy"
        copy.write_bytes(log.read_bytes())
        copy.rename(finished)  # never half of it


def call(words, lock, hardware):
    """Run a command. Returns its exit status, and the seconds that it computed, or those that passed on no CPU core."""
    clock = time.time
    if hardware.endswith(" core"):
        clock = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    began = clock()
    process = subprocess.Popen(words, pass_fds=[lock.fileno()])  # which holds the lock, should it outlive this script
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends Ctrl-C to the run too, which saves and leaves
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code, clock() - began


def note(name, command, seconds, where, args):
    with open(args.results / "commands", "a") as file:
        file.write(f"{name}: {command} ({seconds:.0f} s on {where})\n")


def note_killed_part(name, began_file, log, args):
    """Note a part that was killed together with this script. It ended, as far as is known, with its log's last line."""
    began, where, command = began_file.read_text().splitlines()
    if log.exists() and log.stat().st_mtime > float(began):
        note(name, command, log.stat().st_mtime - float(began), f"{where}, stopped", args)
    began_file.unlink()


def commit():
    """The commit that a run is trained by, and whether the product differs from it."""
    name = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    changed = ["git", "diff", "--quiet", "HEAD", "--", "*.py", ":!benchmarks", ":!image", ":!tests"]
    return name + (" with changes" if subprocess.call(changed, cwd=ROOT) else "")


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("dataset", choices=["cifar10", "cifar100"])
    parser.add_argument("data_root", help="folder that holds CIFAR")
    parser.add_argument("results", type=Path, help="folder for logs and `commands`")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags for every script")
    parser.add_argument("--runs", type=str.split, default=CORE, help="patterns, such as 'bns-* scratch-strong-seed42'")
    parser.add_argument("--seeds", type=str.split, default="42 43 44", help="of all but stage 1")
    parser.add_argument("--imbalanced_factor", type=float, default=100)
    parser.add_argument("--stage1_flags", default="", help="such as '--epochs 200'; else stage 1 is the paper's")
    parser.add_argument("--later_flags", default="", help="of all later stages, such as '--lr 0.001 --amp none'")
    parser.add_argument("--hardware", default="1 core", help="of a run, for its cost, such as '1 H100'")
    return parser


def main(args):
    runs, args.checkpoints = plan(args), Path(f"output_dir/{args.results}")
    args.results.mkdir(parents=True, exist_ok=True)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    for name, words in runs.items():
        train(name, words, args)
    if any(args.results.glob("*-seed*.txt")):
        tables.write(args.results)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
