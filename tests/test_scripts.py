import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pretrain_bns", "lineprob_bns", "finetune_ipdpp")
SCRIPTS = [f"main_{dataset}_{stage}" for dataset in ("cifar10", "cifar100") for stage in STAGES]
TINY = ["--toy_data", "--model", "test_resnet", "--input_size", "16", "--device", "cpu"]

# The commands of the authors' README.
README = {
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

# The paper's recipe: the flags that all scripts share, then those of each.
SHARED = {"imbalanced_factor": 100, "input_size": 32, "weight_decay": 0.05, "lr": None, "blr": 1e-3, "min_lr": 0,
          "accum_iter": 1, "start_epoch": None, "resume": None, "toy_data": False, "amp": "auto", "compile": False, "eval": None}
EACH = ("epochs", "batch_size", "warmup_epochs", "seed", "save_freq", "jitter_strength")
DEFAULTS = {"main_cifar10_pretrain_bns": (1000, 1024, 20, 0, 50, 2),
            "main_cifar10_lineprob_bns": (100, 64, 20, 0, 1, 2),
            "main_cifar10_finetune_ipdpp": (100, 64, 5, 42, 1, 1),
            "main_cifar100_pretrain_bns": (1000, 512, 20, 0, 50, 2),
            "main_cifar100_lineprob_bns": (100, 64, 5, 42, 5, 1),
            "main_cifar100_finetune_ipdpp": (100, 64, 5, 42, 5, 1)}
OF_STAGE = {"pretrain_bns": {"embed_dim": 128, "temperature": 0.5, "bns_form": "published", "eval_freq": 25},
            "lineprob_bns": {"eval_freq": 1, "logit_adjustment": 1},
            "finetune_ipdpp": {"eval_freq": 1, "logit_adjustment": 1, "loss": "cross_entropy",
                               "ipdpp_kernel": "paper", "ipdpp_sampler": "exact"}}
DRAWN = {"main_cifar10_lineprob_bns": {"num_samples": 100}, "main_cifar100_lineprob_bns": {"num_samples": 50},
         "main_cifar10_finetune_ipdpp": {"num_samples": 500, "sampling_freq": 10},
         "main_cifar100_finetune_ipdpp": {"num_samples": 50, "sampling_freq": 20}}


def load(script):
    return importlib.import_module(script)


def parse(script, flags=()):
    return vars(load(script).get_args_parser().parse_args(flags))


def run(script, *flags):
    return load(script).main(load(script).get_args_parser().parse_args([*TINY, *map(str, flags)]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_of_the_readme_parse(script):
    for command in README[script]:
        flags = command.split()
        args = parse(script, flags)
        for flag, value in zip(flags[::2], flags[1::2]):
            parsed = args[flag.removeprefix("--")]
            assert parsed == (type(parsed)(value) if flag != "--resume" else [value]), flag


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults(script):
    _, dataset, stage = script.split("_", 2)
    expected = SHARED | OF_STAGE[stage] | DRAWN.get(script, {}) | dict(zip(EACH, DEFAULTS[script])) | {
        "model": {"cifar10": "resnet18", "cifar100": "resnet34"}[dataset], "num_classes": int(dataset[5:]),
        "data_root": f"/mnt/data/{dataset}", "output_dir": f"./output_dir/{dataset}/{stage}_{dataset}"}
    args = parse(script)
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_groups_and_defaults(script, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)  # no network
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as end:
        parse(script, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.split("\n\n")[1].startswith(load(script).__doc__.splitlines()[0])
    groups = {"pretrain_bns": "balanced negative sampling:", "finetune_ipdpp": "information-preservable DPP:"}
    for group in ("data:", "model:", "optimisation:", "run:", groups.get(script.split("_", 2)[2], "run:")):
        assert f"\n{group}\n" in text
    entries = {re.match(r"\w+", entry).group(): entry for entry in text.split("\n  --")[1:]}
    for name, default in parse(script).items():
        if name not in ("stage", "dataset", "given"):
            assert default is None or f"(default: {default})" in entries[name], name


def test_short_and_old_names():
    args = parse("main_cifar10_pretrain_bns", "-dr there -sf 7 --num_views 1.5".split())
    assert (args["data_root"], args["save_freq"], args["jitter_strength"]) == ("there", 7, 1.5)


def scalars(folder, tag):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_chain_of_the_three_stages(tmp_path):
    """The commands, one after the other in a folder of their own, and the last --eval repeats the last epoch."""
    def command(stage, *flags):
        finished = subprocess.run(
            [sys.executable, ROOT / f"main_cifar10_{stage}.py", *TINY, "--epochs", "2", "--batch_size", "256", *flags],
            cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def results(stage):
        folder = tmp_path / "output_dir" / "cifar10" / f"{stage}_cifar10"
        records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        assert [record["epoch"] for record in records] == [0, 1]
        names = {f"{stage}_cifar10_if100.pth", "checkpoint-1.pth"}
        if stage != "pretrain_bns":  # which saves every 50 epochs
            names.add("checkpoint-0.pth")
        assert {path.name for path in folder.glob("*.pth")} == names
        checkpoint = torch.load(folder / "checkpoint-1.pth", weights_only=True)
        assert {"model", "optimizer", "epoch", "scaler", "args"} <= set(checkpoint) and checkpoint["epoch"] == 1
        for tag in ("train_loss", "lr"):
            steps = [step for step, _ in scalars(folder, tag)]
            assert steps == sorted(steps) and 0 <= steps[0] < 1000 <= steps[-1] < 2000
        losses = [value for step, value in scalars(folder, "train_loss") if step >= 1000]
        assert sum(losses) / len(losses) == pytest.approx(records[1]["train_loss"], rel=1e-5)
        return folder, records

    printed = command("pretrain_bns")
    extractor = str(results("pretrain_bns")[0].relative_to(tmp_path) / "pretrain_bns_cifar10_if100.pth")
    assert f"--resume {extractor}" in printed
    for stage, flags in (("lineprob_bns", ["--num_samples", "20"]), ("finetune_ipdpp", ["--num_samples", "50"])):
        printed = command(stage, "--resume", extractor, *flags)
        folder, records = results(stage)
        assert f"starting from the extractor {extractor}" in printed
        assert scalars(folder, "test/acc1")[-1][1] == pytest.approx(records[1]["test_acc1"])
        final = folder.relative_to(tmp_path) / f"{stage}_cifar10_if100.pth"
        before = sorted(tmp_path.rglob("*"))
        line = re.search(r"^\* Acc@1 .*$", command(stage, "--eval", str(final)), re.M).group()
        assert line == re.findall(r"^\* Acc@1 .*$", printed, re.M)[-1]
        assert sorted(tmp_path.rglob("*")) == before, "--eval writes nothing"


def test_chain_on_100_classes(tmp_path):
    flags = ["--epochs", 1, "--batch_size", 512, "--num_samples", 2]
    run("main_cifar100_pretrain_bns", "--output_dir", tmp_path / "p", *flags[:4])
    for stage in ("lineprob_bns", "finetune_ipdpp"):
        script = f"main_cifar100_{stage}"
        extractor = tmp_path / "p" / "pretrain_bns_cifar100_if100.pth"
        last = run(script, "--resume", extractor, "--output_dir", tmp_path / stage, *flags)[-1]
        metrics = run(script, "--eval", tmp_path / stage / f"{stage}_cifar100_if100.pth")
        assert len(metrics["per_class"]) == 100 and metrics["acc1"] == last["test_acc1"]


@pytest.mark.parametrize("factor", [12.5, 100])
def test_extractor_trained_at_another_factor_is_named(factor, tmp_path, capsys):
    run("main_cifar10_pretrain_bns", "--output_dir", tmp_path / "p", "--epochs", 1, "--batch_size", 512)
    run("main_cifar10_lineprob_bns", "--resume", tmp_path / "p" / "pretrain_bns_cifar10_if100.pth", "--epochs", 1,
        "--num_samples", 2, "--imbalanced_factor", factor, "--output_dir", tmp_path / "l")
    line, = re.findall("starting from the extractor .*", capsys.readouterr().out)
    assert line.endswith("unlike this run, was trained with imbalanced_factor 100") == (factor != 100)
    assert line.endswith("pretrain_bns_cifar10_if100.pth") == (factor == 100)


def test_imbalance_factor_names_the_final_file(tmp_path):
    run("main_cifar10_lineprob_bns", "--output_dir", tmp_path, "--imbalanced_factor", 12.5, "--epochs", 1,
        "--num_samples", 2)
    assert (tmp_path / "lineprob_bns_cifar10_if12.5.pth").exists()


@pytest.mark.parametrize("script", ["main_cifar10_lineprob_bns", "main_cifar100_lineprob_bns"])
def test_a_step_on_real_images(script, cifar_root, tmp_path, capsys):
    args = load(script).get_args_parser().parse_args(
        [*TINY[1:], "--data_root", cifar_root, "--num_samples", "5", "--epochs", "1", "--output_dir", str(tmp_path)])
    record, = load(script).main(args)
    assert f"Accuracy of the network on the 10000 test images: {record['test_acc1']:.1f}%" in capsys.readouterr().out
    assert 0 < record["train_loss"] < 10


def test_stages_do_not_take_each_others_checkpoints(tmp_path):
    run("main_cifar10_lineprob_bns", "--output_dir", tmp_path, "--epochs", 1, "--num_samples", 2)
    with pytest.raises(UserError, match="checkpoint of stage lineprob_bns, expected one of pretrain_bns"):
        run("main_cifar10_finetune_ipdpp", "--resume", tmp_path / "lineprob_bns_cifar10_if100.pth",
            "--output_dir", tmp_path / "other")
