"""A run that was killed, stopped or changed goes on as it should: at the start of an epoch, as if nothing had been."""
import functools
import json
import os
import random
import re
import signal

import pytest
import torch
from conftest import run
from run_process import STAGES, at_step, differences, finish, kill_and_resume, signal_self, tensorboard

from util.errors import UserError
from util.run.checkpoint import load_checkpoint

PRETRAIN, LINEPROB, FINETUNE = (f"main_cifar10_{stage}" for stage in STAGES)


def records(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def epochs(folder):
    return [record["epoch"] for record in records(folder)]


# ---------------------------------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_run_ends_as_one_left_alone(stage, tmp_path):
    source = None
    if stage != "pretrain_bns":
        finish("pretrain_bns", tmp_path / "extractor", "--epochs", 1)
        source = tmp_path / "extractor" / "pretrain_bns_cifar10_if100.pth"
    found, landed = kill_and_resume(stage, tmp_path, source, kills=3, epochs=6, rng=random.Random(1))
    assert not found and landed == 3


@pytest.mark.slow
def test_full_disk_ends_the_run_in_a_line_and_leaves_what_was_saved(tmp_path):
    flags = ["--epochs", 4, "--save_freq", 1, "--resume", "auto"]
    finish("pretrain_bns", tmp_path / "reference", *flags)
    finish("pretrain_bns", tmp_path / "full", *flags, code=-signal.SIGKILL,
           prepare=functools.partial(at_step, 2, 0, functools.partial(signal_self, signal.SIGKILL)))
    kept = sorted((tmp_path / "full").glob("*.pth"))

    output = finish("pretrain_bns", tmp_path / "full", *flags, code=2, largest_file=2**20)
    assert re.search(r"error: .*could not write: File too large: '.*checkpoint-2.pth'\n$", output)
    assert "Traceback" not in output and sorted((tmp_path / "full").glob("*.pth")) == kept
    finish("pretrain_bns", tmp_path / "full", *flags)
    assert differences(tmp_path / "full", tmp_path / "reference", "pretrain_bns") == []


def die_before_the_final_file():
    replace = os.replace

    def replace_or_die(source, target):
        if target.name.startswith("lineprob"):
            signal_self(signal.SIGKILL)
        replace(source, target)
    os.replace = replace_or_die


@pytest.mark.slow
def test_killed_before_the_final_file(tmp_path):
    flags, killed = ["--epochs", 1, "--resume", "auto"], -signal.SIGKILL
    finish("lineprob_bns", tmp_path, *flags, code=killed, prepare=die_before_the_final_file)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["checkpoint-0.pth"]
    assert "nothing left to train" in finish("lineprob_bns", tmp_path, *flags)
    assert load_checkpoint(tmp_path / "lineprob_bns_cifar10_if100.pth")["epoch"] == 0


def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_counts(quick_runs, tmp_path, capsys):
    flags = ["--epochs", 3, "--num_samples", 10, "--save_freq", 1, "--resume", "auto"]
    run(LINEPROB, tmp_path, *flags)
    damaged = tmp_path / "checkpoint-2.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with pytest.raises(UserError, match="checkpoint-2.pth: no checkpoint.*delete it to go on from the one before"):
        run(LINEPROB, tmp_path, *flags)
    damaged.unlink()
    run(LINEPROB, tmp_path, *flags)
    assert f"continuing {tmp_path / 'checkpoint-1.pth'} in epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--resume FILE --resume auto", "--resume auto FILE", "--resume FILE auto",
                                   "--resume auto --encoder FILE"])
def test_auto_beside_a_file(flags, quick_runs, tmp_path, capsys):
    """A checkpoint of the folder comes first; without one, the file counts, in whatever order they are given."""
    run(PRETRAIN, tmp_path / "p", "--epochs", 1, "--batch_size", 60)
    file = tmp_path / "p" / "pretrain_bns_cifar10_if100.pth"
    flags = flags.replace("FILE", str(file)).split()
    run(LINEPROB, tmp_path / "l", "--num_samples", 5, "--epochs", 1, *flags)
    assert f"starting from the encoder of {file}\n" in capsys.readouterr().out
    given, probed = (load_checkpoint(path)["model"] for path in (file, tmp_path / "l" / "checkpoint-0.pth"))
    assert torch.equal(given["enc.conv1.weight"], probed["enc.conv1.weight"])
    run(LINEPROB, tmp_path / "l", "--num_samples", 5, "--epochs", 2, *flags)
    assert f"continuing {tmp_path / 'l' / 'checkpoint-0.pth'} in epoch 1\n" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- stopped by a signal


def stop_amid(epoch, *signums, pause=0.0):
    """For `prepare` of a run: signals come between two steps of an epoch."""
    return functools.partial(at_step, epoch, 1, functools.partial(signal_self, *signums, pause=pause))


@pytest.mark.slow
@pytest.mark.parametrize("stage, signum", [("pretrain_bns", signal.SIGINT), ("lineprob_bns", signal.SIGHUP),
                                           ("finetune_ipdpp", signal.SIGTERM)])
def test_stopped_amid_an_epoch_and_resumed_run_ends_as_one_left_alone(stage, signum, tmp_path):
    flags = ["--epochs", 4, "--save_freq", 50]
    finish(stage, tmp_path / "reference", *flags)

    stopped = functools.partial(finish, stage, tmp_path / "stopped", *flags, save_every=60.0)
    output = stopped(code=128 + signum, prepare=stop_amid(1, signum))
    assert f"{signum.name}: stopping after this epoch" in output
    assert output.splitlines()[-1] == "stopped after epoch 1; add --resume auto to the command to go on from there"
    assert load_checkpoint(tmp_path / "stopped" / "checkpoint-1.pth")["epoch"] == 1
    assert epochs(tmp_path / "stopped") == [0, 1]
    # Killed after epoch 2 was logged and before it was saved: it is trained and logged a second time.
    stopped("--resume", "auto", code=-signal.SIGKILL, prepare=stop_amid(3, signal.SIGKILL))
    assert epochs(tmp_path / "stopped") == [0, 1, 2]
    assert "in epoch 2" in stopped("--resume", "auto")
    assert differences(tmp_path / "stopped", tmp_path / "reference", stage) == []


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [(signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGTERM)])
def test_signals_within_a_second_count_as_one_and_a_later_one_ends_at_once(first, second, tmp_path):
    output = finish("lineprob_bns", tmp_path / "one", "--epochs", 9, code=128 + first,
                    prepare=stop_amid(1, first, second))
    assert output.count("stopping after this epoch") == 1 and "stopped after epoch 1" in output
    output = finish("lineprob_bns", tmp_path / "two", "--epochs", 9, code=-second,
                    prepare=stop_amid(1, first, second, pause=1.1))
    assert output.count("stopping after this epoch") == 1 and "stopped after epoch" not in output


# ---------------------------------------------------------------------------------------- other flags, other files


def test_changed_flags_are_obeyed(quick_runs, tmp_path):
    flags = ["--num_samples", 10, "--batch_size", 20]
    run(LINEPROB, tmp_path, *flags, "--epochs", 2)
    run(LINEPROB, tmp_path, *flags, "--epochs", 4, "--lr", "0.125", "--batch_size", 58, "--warmup_epochs", 0,
        "--resume", "auto")
    assert epochs(tmp_path) == [0, 1, 2, 3]
    assert records(tmp_path)[2]["train_lr"] == pytest.approx(0.125 / 2)  # half way down half a cosine of 4 updates


@pytest.mark.slow
@pytest.mark.parametrize("before, after, images", [
    ((LINEPROB, "--num_samples", 10), ("--num_samples", 20), 87),
    ((LINEPROB, "--num_samples", 5), ("--seed", 1), 36),
    ((FINETUNE, "--ipdpp_sampler", "none", "--num_samples", 10), ("--ipdpp_sampler", "exact"), 58),
    ((FINETUNE, "--ipdpp_sampler", "exact", "--num_samples", 10), ("--ipdpp_sampler", "none"), 127)])
def test_a_changed_draw_is_drawn_at_once(before, after, images, quick_runs, tmp_path):
    """Classes have 50, 30, 18, 11, 7, 4, 3, 2, 1 and 1 images."""
    run(*before[:1], tmp_path, *before[1:], "--epochs", 2, "--batch_size", 32)
    old = load_checkpoint(tmp_path / "checkpoint-1.pth")["subset"]
    run(before[0], tmp_path, *before[1:], *after, "--epochs", 4, "--batch_size", 32, "--resume", "auto")
    new = load_checkpoint(tmp_path / "checkpoint-3.pth")["subset"]
    assert [record["train_images"] for record in records(tmp_path)] == [len(old)] * 2 + [images] * 2
    assert len(new) == images and not torch.equal(old, new)


def test_tensorboard_has_each_epoch_once(quick_runs, tmp_path):
    flags = ["--sampling_freq", 1, "--num_samples", 10, "--batch_size", 20, "--resume", "auto"]
    for total in (2, 4):
        run(FINETUNE, tmp_path, *flags, "--epochs", total)
    points = tensorboard(tmp_path)
    steps = {tag: [step for other, step, _ in points if other == tag] for tag, _, _ in points}
    assert steps["test/acc1"] == [999, 1999, 2999, 3999]
    assert len(steps["train_loss"]) == len(set(steps["train_loss"])) == 4 * 3
    assert steps["train_ipdpp/striped disc/mean_p"] == [0, 2000]  # none in the last epoch, which was epoch 1 at first


def test_nothing_left_to_train_writes_the_final_file(quick_runs, tmp_path, capsys):
    flags = ["--epochs", 2, "--batch_size", 40, "--save_freq", 1]
    run(PRETRAIN, tmp_path / "a", *flags)
    run(PRETRAIN, tmp_path / "b", *flags, "--resume", tmp_path / "a" / "checkpoint-1.pth")
    final = tmp_path / "b" / "pretrain_bns_cifar10_if100.pth"
    assert f"wrote {final}" in capsys.readouterr().out
    assert (tmp_path / "b" / "log.txt").read_bytes() == (tmp_path / "a" / "log.txt").read_bytes()
    weights, trained = (load_checkpoint(path)["model"] for path in (final, tmp_path / "a" / final.name))
    assert all(torch.equal(value, trained[name]) for name, value in weights.items())
