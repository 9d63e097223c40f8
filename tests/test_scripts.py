"""The six command lines: what the documents tell users to type, the defaults, --help, and the stages in their order."""
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, command_line, final_file, run

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pretrain_bns", "lineprob_bns", "finetune_ipdpp")
SCRIPTS = [f"main_{dataset}_{stage}" for dataset in ("cifar10", "cifar100") for stage in STAGES]
PRETRAIN, LINEPROB, FINETUNE = SCRIPTS[:3]


def authors_commands():
    """(script, flags) of each command in the authors' README."""
    for dataset, classes, batch, factor, samples in (("cifar10", 10, 1024, 10, 500), ("cifar100", 100, 512, 100, 50)):
        out, data = f"./output_dir/{dataset}", f"--num_classes {classes} --data_root /mnt/data/{dataset}"
        for stage in STAGES:
            script, final = f"main_{dataset}_{stage}", f"{out}/{stage}_{dataset}/{stage}_{dataset}_if100.pth"
            folders = f"--output_dir {out}/{stage}_{dataset} --log_dir {out}/{stage}_{dataset}"
            if stage == "pretrain_bns":
                encoder = final
                yield script, f"--epochs 1000 --batch_size {batch} --imbalanced_factor {factor} {data} {folders}"
            else:
                common = f"--batch_size 64 --imbalanced_factor 100 {data}"
                drawn = f"--num_samples {samples}" if stage == "finetune_ipdpp" else ""
                yield script, f"{common} --eval {final}"
                yield script, f"{common} --epochs 100 {drawn} --resume {encoder} {folders}"


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


def test_every_command_of_the_readme_parses_and_the_authors_are_among_them():
    def settings(script, flags):
        values = parse(script, flags).items()
        return script, {name: os.path.normpath(value) if isinstance(value, str) else value for name, value in values}

    found = [settings(*command) for command in commands((ROOT / "README.md").read_text())]
    for script, flags in authors_commands():
        assert settings(script, flags.split()) in found


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
    ten, hundred = load(f"main_cifar10_{stage}"), load(f"main_cifar100_{stage}")
    assert hundred.main is ten.main and parse(hundred.__name__).keys() == parse(ten.__name__).keys()


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


def test_each_stage_names_the_next_command(tmp_path, quick_runs, capsys):
    """Followed, the commands lead through all stages to the evaluation of what they wrote."""
    def following(*command):
        assert command_line(*command) == 0
        lines = re.findall("^next: python (.*)$", capsys.readouterr().out, re.MULTILINE)
        return [(Path(script).stem, *flags) for script, *flags in map(shlex.split, lines)]

    short = [*TINY[-4:], "--epochs", 1, "--batch_size", 60]
    later = following(PRETRAIN, *TINY, *short, "--output_dir", tmp_path / "p")
    assert [script for script, *_ in later] == [LINEPROB, FINETUNE]
    for script, *flags in later:
        assert flags[-2:] == ["--resume", str(final_file(load(PRETRAIN), tmp_path / "p"))]
        evaluation, = following(script, *flags, *short, "--output_dir", tmp_path / script)
        assert evaluation[0] == script and evaluation[-1] == str(final_file(load(script), tmp_path / script))
        assert following(*evaluation, *TINY[-4:]) == []


@pytest.mark.parametrize("factor", ["12.5", "100.0004"])
def test_imbalance_factor_names_the_final_file(factor, tmp_path, quick_runs):
    run(LINEPROB, tmp_path, "--imbalanced_factor", factor, "--epochs", 1, "--num_samples", 2)
    assert (tmp_path / f"lineprob_bns_cifar10_if{factor}.pth").exists()
