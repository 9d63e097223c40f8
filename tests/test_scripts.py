"""The six command lines: what the documents tell users to type, the defaults, and --help."""
import os
import re
import shlex
from pathlib import Path

import pytest
from conftest import FINETUNE, PRETRAIN, STAGES, command_line, load

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [f"main_{dataset}_{stage}" for dataset in ("cifar10", "cifar100") for stage in STAGES]


def parse(script, flags=()):
    return vars(load(script).get_args_parser().parse_args(flags))


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


# The paper's recipe: the flags that all scripts share, then those of each.
SHARED = {"imbalanced_factor": 100, "input_size": 32, "weight_decay": 0.05, "lr": None, "blr": 1e-3, "min_lr": 0,
          "resume": None, "toy_data": False, "amp": "auto", "device": "auto"}
OF_STAGE = {"pretrain_bns": {"epochs": 1000, "embed_dim": 128, "temperature": 0.5, "bns_form": "published"},
            "lineprob_bns": {"epochs": 100, "batch_size": 64, "logit_adjustment": 1},
            "finetune_ipdpp": {"epochs": 100, "batch_size": 64, "logit_adjustment": 1, "loss": "cross_entropy",
                               "ipdpp_kernel": "paper", "ipdpp_sampler": "exact"}}
EACH = {"main_cifar10_pretrain_bns": {"batch_size": 1024, "warmup_epochs": 20, "seed": 0, "jitter_strength": 2},
        "main_cifar100_pretrain_bns": {"batch_size": 512, "warmup_epochs": 20, "seed": 0, "jitter_strength": 2},
        "main_cifar10_lineprob_bns": {"num_samples": 100, "warmup_epochs": 20, "seed": 0, "jitter_strength": 2},
        "main_cifar100_lineprob_bns": {"num_samples": 50, "warmup_epochs": 5, "seed": 42, "jitter_strength": 1},
        "main_cifar10_finetune_ipdpp": {"num_samples": 500, "sampling_freq": 10, "warmup_epochs": 5, "seed": 42,
                                        "jitter_strength": 1},
        "main_cifar100_finetune_ipdpp": {"num_samples": 50, "sampling_freq": 20, "warmup_epochs": 5, "seed": 42,
                                         "jitter_strength": 1}}


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults(script):
    """Those of CIFAR-100 are all in which its scripts differ."""
    _, dataset, stage = script.split("_", 2)
    expected = {**SHARED, **OF_STAGE[stage], **EACH[script], "stage": stage, "dataset": dataset,
                "model": {"cifar10": "resnet18", "cifar100": "resnet34"}[dataset], "num_classes": int(dataset[5:]),
                "data_root": f"/mnt/data/{dataset}", "output_dir": f"./output_dir/{dataset}/{stage}_{dataset}"}
    args, ten = parse(script), f"main_cifar10_{stage}"
    assert {name: args[name] for name in expected} == expected
    assert load(script).main is load(ten).main and args.keys() == parse(ten).keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_the_command_in_it(script, capsys):
    assert command_line(script, "--help") == 0 and "usage:" in capsys.readouterr().out
    (named, flags), = commands(load(script).__doc__)
    assert named == script and parse(named, flags)


def test_short_and_old_names_and_a_quoted_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = parse(PRETRAIN, "-dr there -sf 7 --num_views 1.5".split())
    assert (args["data_root"], args["save_freq"], args["jitter_strength"]) == ("there", 7, 1.5)
    args = parse(FINETUNE, ["--data_root", "~/d", "--output_dir", "~/o", "--resume", "auto", "~/r"])
    assert (args["data_root"], args["output_dir"]) == ("/home/me/d", "/home/me/o")
    assert args["resume"] == ["auto", "/home/me/r"]
