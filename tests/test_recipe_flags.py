"""The flags of the field's recipe: --opt, --augment, --min_crop, --encoder."""
import importlib
import re
import shutil

import pytest
import torch
from conftest import final_file, run

from util.run.checkpoint import load_checkpoint

PRETRAIN, LINEPROB, FINETUNE = (f"main_cifar10_{stage}" for stage in ("pretrain_bns", "lineprob_bns", "finetune_ipdpp"))
BRIEF = ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", 60]


def final(script, folder):
    return final_file(importlib.import_module(script), folder)


def weights(script, folder):
    return load_checkpoint(final(script, folder))["model"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [PRETRAIN, LINEPROB, FINETUNE])
def test_a_resumed_run_by_sgd_ends_as_one_left_alone(script, quick_runs, tmp_path):
    flags = ["--opt", "sgd", "--lr", 0.1, "--epochs", 4, "--batch_size", 60, "--save_freq", 2]
    if script != PRETRAIN:
        flags += ["--augment", "auto"]
    run(script, tmp_path / "whole", *flags)
    (tmp_path / "rest").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint-1.pth", tmp_path / "rest")
    run(script, tmp_path / "rest", *flags, "--resume", "auto")
    whole, rest = (load_checkpoint(final(script, tmp_path / name)) for name in ("whole", "rest"))
    momenta = [one["momentum_buffer"] for one in whole["optimizer"]["state"].values()]
    assert momenta and all(momentum.abs().max() > 0 for momentum in momenta)
    for one, other in zip(momenta, rest["optimizer"]["state"].values(), strict=True):
        assert torch.equal(one, other["momentum_buffer"])
    assert all(torch.equal(value, rest["model"][name]) for name, value in whole["model"].items())
    assert (tmp_path / "whole" / "log.txt").read_bytes() == (tmp_path / "rest" / "log.txt").read_bytes()


@pytest.mark.parametrize("before, after", [("adamw", "sgd"), ("sgd", "adamw")])
def test_a_run_can_change_its_optimiser(before, after, quick_runs, tmp_path):
    run(LINEPROB, tmp_path, *BRIEF, "--opt", before)
    history = run(LINEPROB, tmp_path, *BRIEF, "--opt", after, "--epochs", 2, "--resume", "auto")
    assert [record["epoch"] for record in history] == [0, 1]


def test_sgd_is_pytorchs_with_nesterov_momentum(quick_runs, tmp_path):
    """One update of the linear layer: both parameters move by lr (gradient + decay of the weight) (1 + momentum)."""
    flags = ["--batch_size", 58, "--num_samples", 10, "--epochs", 1, "--warmup_epochs", 0, "--opt", "sgd"]
    steps = {}
    for lr, decay in ((1e-9, 0), (0.1, 1e-9), (0.1, 0.5)):
        run(LINEPROB, tmp_path / f"{lr} {decay}", *flags, "--lr", lr, "--weight_decay", decay)
        steps[lr, decay] = load_checkpoint(final(LINEPROB, tmp_path / f"{lr} {decay}"))
    start = steps[1e-9, 0]["model"]
    for name, decays in (("lin.bias", False), ("lin.weight", True)):
        index = 0 if name == "lin.bias" else 1  # biases come first
        gradient = steps[0.1, 1e-9]["optimizer"]["state"][index]["momentum_buffer"]
        decayed = gradient + 0.5 * start[name] * decays
        for decay, direction in ((1e-9, gradient), (0.5, decayed)):
            moved = steps[0.1, decay]["model"][name] - start[name]
            torch.testing.assert_close(moved, -0.1 * 1.9 * direction, atol=1e-6, rtol=0)


@pytest.mark.parametrize("target", [PRETRAIN, LINEPROB, FINETUNE])
@pytest.mark.parametrize("source", [PRETRAIN, LINEPROB, FINETUNE])
def test_a_new_run_begins_with_the_encoder_of_any_stage(source, target, quick_runs, tmp_path):
    """Of its own stage by --encoder, since --resume would continue the run. Its head is a new one."""
    run(source, tmp_path / "source", *BRIEF)
    path, given = final(source, tmp_path / "source"), weights(source, tmp_path / "source")
    flag = "--encoder" if source == target else "--resume"
    history = run(target, tmp_path / "target", *BRIEF, "--lr", 1e-12, flag, path)
    assert [record["epoch"] for record in history] == [0]
    taken = weights(target, tmp_path / "target")
    for name, value in given.items():
        if name.startswith("enc.") and (target == LINEPROB or not re.search("running|num_batches", name)):
            torch.testing.assert_close(taken[name], value, atol=1e-9, rtol=0)
        elif source == target and name in ("projector.0.weight", "lin.weight"):
            run(target, tmp_path / "fresh", *BRIEF, "--lr", 1e-12)
            torch.testing.assert_close(taken[name], weights(target, tmp_path / "fresh")[name], atol=1e-9, rtol=0)


def test_a_run_from_an_encoder_continues_by_itself(quick_runs, tmp_path):
    run(FINETUNE, tmp_path / "source", *BRIEF)
    flags = [*BRIEF, "--encoder", final(FINETUNE, tmp_path / "source"), "--resume", "auto"]
    run(FINETUNE, tmp_path / "run", *flags)
    first = weights(FINETUNE, tmp_path / "run")
    history = run(FINETUNE, tmp_path / "run", *flags, "--epochs", 2, "--lr", 1e-12)
    assert [record["epoch"] for record in history] == [0, 1]
    torch.testing.assert_close(weights(FINETUNE, tmp_path / "run")["lin.weight"], first["lin.weight"])
