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
def test_a_run_that_changes_its_optimiser_says_so(before, after, quick_runs, tmp_path, capsys):
    run(LINEPROB, tmp_path, *BRIEF, "--opt", before)
    capsys.readouterr()
    run(LINEPROB, tmp_path, *BRIEF, "--opt", after, "--epochs", 2, "--resume", "auto")
    out = capsys.readouterr().out
    assert re.search(f"--opt: .*{before}.*{after}", out) and "the optimiser starts afresh" in out


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
@pytest.mark.parametrize("source", [PRETRAIN, FINETUNE])
def test_encoder_begins_a_new_run_from_the_file_of_any_stage(source, target, quick_runs, tmp_path, capsys):
    run(source, tmp_path / "source", *BRIEF)
    given = weights(source, tmp_path / "source")
    path = final(source, tmp_path / "source")
    history = run(target, tmp_path / "target", *BRIEF, "--lr", 1e-12, "--encoder", path)
    assert [record["epoch"] for record in history] == [0]
    taken = weights(target, tmp_path / "target")
    for name, value in given.items():
        if name.startswith("enc.") and not re.search("running|num_batches", name):
            torch.testing.assert_close(taken[name], value, atol=1e-9, rtol=0)
    if source == target:  # the head is a new one
        head = "projector.0.weight" if source == PRETRAIN else "lin.bias"
        assert "starting from the encoder" in capsys.readouterr().out
        fresh = run(target, tmp_path / "fresh", *BRIEF, "--lr", 1e-12)
        assert fresh and torch.allclose(taken[head], weights(target, tmp_path / "fresh")[head], atol=1e-9)


def test_a_run_from_an_encoder_continues_by_itself(quick_runs, tmp_path):
    run(FINETUNE, tmp_path / "source", *BRIEF)
    flags = [*BRIEF, "--encoder", final(FINETUNE, tmp_path / "source"), "--resume", "auto"]
    run(FINETUNE, tmp_path / "run", *flags)
    first = weights(FINETUNE, tmp_path / "run")
    history = run(FINETUNE, tmp_path / "run", *flags, "--epochs", 2, "--lr", 1e-12)
    assert [record["epoch"] for record in history] == [0, 1]
    torch.testing.assert_close(weights(FINETUNE, tmp_path / "run")["lin.weight"], first["lin.weight"])


def test_augment_and_min_crop_change_what_is_trained_on(quick_runs, tmp_path):
    def loss(*flags):
        return run(FINETUNE, tmp_path / " ".join(map(str, flags)), *BRIEF, *flags)[0]["train_loss"]

    losses = [loss("--augment", name) for name in ("simclr", "crop", "auto")] + [loss("--min_crop", 0.9)]
    assert len(set(losses)) == 4
    assert loss("--augment", "crop", "--min_crop", 0.9) == losses[1]
