"""The six command lines: what the documents tell users to type, the defaults, --help, and the stages in their order."""
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, contents, final_file, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pretrain_bns", "lineprob_bns", "finetune_ipdpp")
SCRIPTS = [f"main_{dataset}_{stage}" for dataset in ("cifar10", "cifar100") for stage in STAGES]
PRETRAIN, LINEPROB, FINETUNE = SCRIPTS[:3]

# The commands of the authors' README.
AUTHORS = {
    "main_cifar10_lineprob_bns": [
        "--imbalanced_factor 100 --num_classes 10 --batch_size 64 --data_root /mnt/data/cifar10 "
        "--eval output_dir/cifar10/lineprob_bns_cifar10/lineprob_bns_cifar10_if100.pth",
        "--epochs 100 --batch_size 64 --imbalanced_factor 100 --num_classes 10 --data_root /mnt/data/cifar10 "
        "--resume ./output_dir/cifar10/pretrain_bns_cifar10/pretrain_bns_cifar10_if100.pth "
        "--output_dir ./output_dir/cifar10/lineprob_bns_cifar10 "
        "--log_dir ./output_dir/cifar10/lineprob_bns_cifar10"],
    "main_cifar100_lineprob_bns": [
        "--imbalanced_factor 100 --num_classes 100 --batch_size 64 --data_root /mnt/data/cifar100 "
        "--eval ./output_dir/cifar100/lineprob_bns_cifar100/lineprob_bns_cifar100_if100.pth",
        "--epochs 100 --batch_size 64 --imbalanced_factor 100 --num_classes 100 --data_root /mnt/data/cifar100 "
        "--resume ./output_dir/cifar100/pretrain_bns_cifar100/pretrain_bns_cifar100_if100.pth "
        "--output_dir ./output_dir/cifar100/lineprob_bns_cifar100 "
        "--log_dir ./output_dir/cifar100/lineprob_bns_cifar100"],
    "main_cifar10_finetune_ipdpp": [
        "--imbalanced_factor 100 --num_classes 10 --batch_size 64 --data_root /mnt/data/cifar10 "
        "--eval ./output_dir/cifar10/finetune_ipdpp_cifar10/finetune_ipdpp_cifar10_if100.pth",
        "--epochs 100 --batch_size 64 --imbalanced_factor 100 --num_classes 10 --num_samples 500 "
        "--data_root /mnt/data/cifar10 "
        "--resume ./output_dir/cifar10/pretrain_bns_cifar10/pretrain_bns_cifar10_if100.pth "
        "--output_dir ./output_dir/cifar10/finetune_ipdpp_cifar10 "
        "--log_dir ./output_dir/cifar10/finetune_ipdpp_cifar10"],
    "main_cifar100_finetune_ipdpp": [
        "--imbalanced_factor 100 --num_classes 100 --batch_size 64 --data_root /mnt/data/cifar100 "
        "--eval ./output_dir/cifar100/finetune_ipdpp_cifar100/finetune_ipdpp_cifar100_if100.pth",
        "--epochs 100 --batch_size 64 --imbalanced_factor 100 --num_classes 100 --num_samples 50 "
        "--data_root /mnt/data/cifar100 "
        "--resume ./output_dir/cifar100/pretrain_bns_cifar100/pretrain_bns_cifar100_if100.pth "
        "--output_dir ./output_dir/cifar100/finetune_ipdpp_cifar100 "
        "--log_dir ./output_dir/cifar100/finetune_ipdpp_cifar100"],
    "main_cifar10_pretrain_bns": [
        "--epochs 1000 --batch_size 1024 --imbalanced_factor 10 --num_classes 10 --data_root /mnt/data/cifar10 "
        "--output_dir ./output_dir/cifar10/pretrain_bns_cifar10 "
        "--log_dir ./output_dir/cifar10/pretrain_bns_cifar10"],
    "main_cifar100_pretrain_bns": [
        "--epochs 1000 --batch_size 512 --imbalanced_factor 100 --num_classes 100 --data_root /mnt/data/cifar100 "
        "--output_dir ./output_dir/cifar100/pretrain_bns_cifar100 "
        "--log_dir ./output_dir/cifar100/pretrain_bns_cifar100"],
}

# The paper's recipe: the flags that all scripts share, then those of each. One departure: a numbered checkpoint every
# 10 epochs of the later stages, not every 1 or 5.
SHARED = {"imbalanced_factor": 100, "input_size": 32, "weight_decay": 0.05, "lr": None, "blr": 1e-3, "min_lr": 0,
          "accum_iter": 1, "resume": None, "toy_data": False, "amp": "auto", "device": "auto",
          "compile": False, "deterministic": False, "eval": None, "log_dir": None, "overwrite": False}
EACH = ("epochs", "batch_size", "warmup_epochs", "seed", "save_freq", "jitter_strength")
DEFAULTS = {"main_cifar10_pretrain_bns": (1000, 1024, 20, 0, 50, 2),
            "main_cifar10_lineprob_bns": (100, 64, 20, 0, 10, 2),
            "main_cifar10_finetune_ipdpp": (100, 64, 5, 42, 10, 1),
            "main_cifar100_pretrain_bns": (1000, 512, 20, 0, 50, 2),
            "main_cifar100_lineprob_bns": (100, 64, 5, 42, 10, 1),
            "main_cifar100_finetune_ipdpp": (100, 64, 5, 42, 10, 1)}
OF_STAGE = {"pretrain_bns": {"embed_dim": 128, "temperature": 0.5, "bns_form": "published", "eval_freq": 25},
            "lineprob_bns": {"eval_freq": 1, "logit_adjustment": 1},
            "finetune_ipdpp": {"eval_freq": 1, "logit_adjustment": 1, "loss": "cross_entropy", "mcmc_steps": 1000,
                               "ipdpp_kernel": "paper", "ipdpp_sampler": "exact"}}
DRAWN = {"main_cifar10_lineprob_bns": {"num_samples": 100}, "main_cifar100_lineprob_bns": {"num_samples": 50},
         "main_cifar10_finetune_ipdpp": {"num_samples": 500, "sampling_freq": 10},
         "main_cifar100_finetune_ipdpp": {"num_samples": 50, "sampling_freq": 20}}


def load(script):
    return importlib.import_module(script)


def parse(script, flags=()):
    return vars(load(script).get_args_parser().parse_args(flags))


def commands(document):
    """(script, flags) of every command line in a text, in blocks of code and amid sentences."""
    lines = document.replace("\\\n", " ")
    found = re.findall(r"(?:\bpython|\btorchrun\b[^`\n]*) (main_cifar\w+)\.py\b([^`\n;|&>]*)", lines)
    return [(script, [word for word in shlex.split(flags, comments=True) if word != "..."]) for script, flags in found]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_authors_commands_parse(script):
    for command in AUTHORS[script]:
        flags = command.split()
        args = parse(script, flags)
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            parsed = args[flag.removeprefix("--")]
            assert parsed == (type(parsed)(value) if flag != "--resume" else [value]), flag


def test_every_command_of_the_readme_parses_and_the_authors_are_among_them():
    found = commands((ROOT / "README.md").read_text())
    for script, flags in found:
        parse(script, flags)
    for script, lines in AUTHORS.items():
        for line in lines:
            assert (script, line.split()) in found


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_command_of_each_docstring_parses(script):
    (named, flags), = commands(load(script).__doc__)
    assert named == script and flags
    parse(named, flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults(script):
    _, dataset, stage = script.split("_", 2)
    expected = {**SHARED, **OF_STAGE[stage], **DRAWN.get(script, {}),
                **dict(zip(EACH, DEFAULTS[script], strict=True)), "stage": stage, "dataset": dataset,
                "model": {"cifar10": "resnet18", "cifar100": "resnet34"}[dataset], "num_classes": int(dataset[5:]),
                "data_root": f"/mnt/data/{dataset}", "output_dir": f"./output_dir/{dataset}/{stage}_{dataset}"}
    args = parse(script)
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("stage", STAGES)
def test_cifar100_script_is_that_of_cifar10_with_other_defaults(stage):
    def flags(script):
        return [{name: value for name, value in vars(action).items() if name not in ("default", "container")}
                for action in script.get_args_parser()._actions]

    ten, hundred = load(f"main_cifar10_{stage}"), load(f"main_cifar100_{stage}")
    assert hundred.main is ten.main and flags(hundred) == flags(ten)
    own = [name for name, value in vars(hundred).items() if getattr(value, "__module__", None) == hundred.__name__]
    assert own == ["get_args_parser"]
    assert len(Path(hundred.__file__).read_text().splitlines()) <= 32


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_groups_and_defaults(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as end:
        parse(script, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.split("\n\n")[1].startswith(load(script).__doc__.splitlines()[0])
    groups = {"pretrain_bns": "balanced negative sampling:", "lineprob_bns": "classifier:",
              "finetune_ipdpp": "information-preservable DPP:"}
    for group in ("data:", "model:", "optimisation:", "run:", groups[script.split("_", 2)[2]]):
        assert f"\n{group}\n" in text
    entries = {re.match(r"\w+", entry).group(): entry for entry in text.split("\n  --")[1:]}
    for name, default in parse(script).items():
        if name not in ("stage", "dataset", "given"):
            assert default is None or f"(default: {default})" in entries[name], name


@pytest.mark.slow
def test_help_needs_no_network():
    """Neither importing the scripts nor --help opens a socket."""
    program = """
import runpy, socket, sys
socket.socket.connect = socket.getaddrinfo = None
for name in sys.argv[1:]:
    sys.argv = [f"{name}.py", "--help"]
    try:
        runpy.run_path(f"{name}.py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0
"""
    finished = subprocess.run([sys.executable, "-c", program, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("usage: ") == 6


def test_short_and_old_names():
    args = parse(PRETRAIN, "-dr there -sf 7 --num_views 1.5".split())
    assert (args["data_root"], args["save_freq"], args["jitter_strength"]) == ("there", 7, 1.5)


def test_a_quoted_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = parse(FINETUNE, ["--data_root", "~/d", "--output_dir", "~/o", "--log_dir", "~/l", "--resume", "auto", "~/r"])
    assert [args[name] for name in ("data_root", "output_dir", "log_dir")] == [f"/home/me/{name}" for name in "dol"]
    assert args["resume"] == ["auto", "/home/me/r"] and parse(FINETUNE, ["--eval", "~/e"])["eval"] == "/home/me/e"


# The stages in their order.


def scalars(folder, tag):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.slow
def test_chain_of_the_three_stages(tmp_path):
    """As a user runs them, in a folder of their own, each by the command that the one before it named as next."""
    def command(words, *flags):
        finished = subprocess.run([sys.executable, *map(str, words[1:]), *map(str, flags)], cwd=tmp_path,
                                  capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert finished.returncode == 0, finished.stderr
        following = [shlex.split(line.removeprefix("next: ")) for line in finished.stdout.splitlines()
                     if line.startswith("next: ")]
        return finished.stdout, following

    def check(stage):
        folder = tmp_path / "output_dir" / "cifar10" / f"{stage}_cifar10"
        final = folder / f"{stage}_cifar10_if100.pth"
        assert {path.name for path in folder.glob("*.pth")} == {final.name, "checkpoint-1.pth"}
        for path in (final, folder / "checkpoint-1.pth"):
            checkpoint = torch.load(path, weights_only=True)
            assert {"model", "optimizer", "epoch", "scaler", "args"} <= set(checkpoint) and checkpoint["epoch"] == 1
        for tag in ("train_loss", "lr"):
            steps = [step for step, _ in scalars(folder, tag)]
            assert steps == sorted(steps) and 0 <= steps[0] < 1000 <= steps[-1] < 2000
        losses = [value for step, value in scalars(folder, "train_loss") if step >= 1000]
        assert sum(losses) / len(losses) == pytest.approx(checkpoint["history"][1]["train_loss"], rel=1e-5)
        return final.relative_to(tmp_path)

    short = ["--epochs", 2, "--batch_size", 256, *TINY[-4:]]
    printed, following = command(["python", ROOT / f"{PRETRAIN}.py", *TINY[:-4], *short])
    encoder = check("pretrain_bns")
    assert [Path(words[1]).name for words in following] == [f"{LINEPROB}.py", f"{FINETUNE}.py"]
    for stage, words in zip(STAGES[1:], following, strict=True):
        assert words[-2:] == ["--resume", str(encoder)]
        printed, (evaluation,) = command(words, *short, "--num_samples", 20)
        assert f"starting from the encoder of {encoder}" in printed
        assert evaluation[-2:] == ["--eval", str(check(stage))]
        before = contents(tmp_path)
        evaluated, _ = command(evaluation, *TINY[-4:])
        for pattern in (r"^\* Acc@1 .*$", r"^\* logit-adjusted .*$"):
            line, = re.findall(pattern, evaluated, re.M)
            assert line == re.findall(pattern, printed, re.M)[-1]
        assert contents(tmp_path) == before, "--eval writes nothing"


@pytest.mark.slow
def test_chain_on_100_classes(tmp_path, few_images):
    pretrain, *later = (load(script) for script in SCRIPTS[3:])
    flags = ["--epochs", 1, "--batch_size", 60]
    run(pretrain, tmp_path / "p", *flags)
    for script in later:
        out = tmp_path / script.__name__
        last, = run(script, out, *flags, "--num_samples", 2, "--resume", final_file(pretrain, tmp_path / "p"))
        metrics = run(script, out, "--eval", final_file(script, out))
        assert len(metrics["test_per_class"]) == 100
        assert metrics == {name: value for name, value in last.items() if name.startswith("test_")}


def test_encoder_trained_at_another_factor_is_named(tmp_path, few_images, capsys):
    flags = ["--epochs", 1, "--batch_size", 60]
    run(PRETRAIN, tmp_path / "p", *flags)
    path = final_file(load(PRETRAIN), tmp_path / "p")
    capsys.readouterr()
    run(LINEPROB, tmp_path / "other", *flags, "--resume", path, "--imbalanced_factor", 12.5)
    line, = re.findall("starting from the encoder .*", capsys.readouterr().out)
    assert line.endswith(f"of {path}, which, unlike this run, was trained with imbalanced_factor 100")


@pytest.mark.parametrize("factor", ["12.5", "100.0004"])
def test_imbalance_factor_names_the_final_file(factor, tmp_path, few_images):
    run(LINEPROB, tmp_path, "--imbalanced_factor", factor, "--epochs", 1, "--num_samples", 2)
    assert (tmp_path / f"lineprob_bns_cifar10_if{factor}.pth").exists()


# Real CIFAR.


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_stages_on_real_images_and_the_same_lines_by_eval(dataset, cifar_root, tmp_path, capsys):
    """Every line about the test set that training ends with is printed again by --eval of the checkpoint."""
    def lines(stage, *flags):
        script = load(f"main_{dataset}_{stage}")
        words = [*TINY[1:], "--input_size", 8, "--data_root", cifar_root, "--output_dir", tmp_path / stage, *flags]
        script.main(script.get_args_parser().parse_args([str(word) for word in words]))
        printed = capsys.readouterr().out.splitlines()
        return [line for line in printed if re.match(r"\* |Accuracy of the network", line)]

    flags = ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", 512]
    knn = lines("pretrain_bns", *flags)
    encoder = tmp_path / "pretrain_bns" / f"pretrain_bns_{dataset}_if100.pth"
    files = {"pretrain_bns": encoder}
    trained = {"pretrain_bns": knn}
    for stage in STAGES[1:]:
        files[stage] = tmp_path / stage / f"{stage}_{dataset}_if100.pth"
        trained[stage] = lines(stage, *flags, "--batch_size", 64, "--num_samples", 20, "--resume", encoder)
        assert [line.split()[1] for line in trained[stage]] == ["Acc@1", "of", "Many-Shot", "logit-adjusted"]
        assert " 10000 test images: " in trained[stage][1]
    before = contents(tmp_path)
    for stage in STAGES:
        assert lines(stage, "--eval", files[stage]) == trained[stage]
    assert len(knn) == 1 and knn[0].startswith("* kNN Acc@1 ")
    assert lines("pretrain_bns", "--eval", files["lineprob_bns"]) == knn  # probing leaves the encoder as it is
    other, = lines("pretrain_bns", "--eval", files["finetune_ipdpp"])
    assert re.sub(r"\d", "0", other) == re.sub(r"\d", "0", knn[0]) and other != knn[0]
    assert contents(tmp_path) == before
