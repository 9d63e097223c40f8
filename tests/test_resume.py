import json
import os
import random
import signal
from pathlib import Path

import pytest
from kill_resume import STAGES, Run, differences, kill_and_resume, tensorboard

from util.checkpoint import load_checkpoint


def finish(stage, folder, *flags, code=0, **limits):
    run = Run(stage, folder, *flags, **limits)
    assert run.end() == code, run.console.read_text()
    return run.console.read_text()


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".pth" or path.name == "log.txt")


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extractor")
    finish("pretrain_bns", folder, "--epochs", 1)
    return folder / "pretrain_bns_cifar10_if100.pth"


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_run_ends_as_one_left_alone(stage, tmp_path, extractor):
    source = None if stage == "pretrain_bns" else extractor
    found, landed = kill_and_resume(stage, tmp_path, source, kills=3, epochs=6, rng=random.Random(1))
    assert not found and landed == 3


@pytest.mark.parametrize("stage, signum", [("pretrain_bns", signal.SIGINT), ("finetune_ipdpp", signal.SIGTERM)])
def test_stopped_amid_an_epoch_and_resumed_run_ends_as_one_left_alone(stage, signum, tmp_path):
    flags = ["--epochs", 3, "--batch_size", 8] + ["--sampling_freq", 1] * (stage == "finetune_ipdpp")
    finish(stage, tmp_path / "reference", *flags)

    run = Run(stage, tmp_path / "stopped", *flags, latest_every=60.0)
    assert run.wait_until(lambda: run.says("epoch 0  train_loss"))
    assert run.kill(signum) == 128 + signum
    assert run.says("stopped in epoch 1 after step") and run.says("add --resume auto to the command")
    assert load_checkpoint(tmp_path / "stopped" / "checkpoint-latest.pth")["partial"]["step"] > 0
    # Killed after the stopped epoch was logged and before it was saved: it is logged a second time.
    run = Run(stage, tmp_path / "stopped", *flags, "--resume", "auto", latest_every=60.0)
    assert run.wait_until(lambda: run.says("epoch 1  train_loss") and len(json_lines(tmp_path / "stopped")) == 2)
    assert run.kill(signal.SIGKILL) == -signal.SIGKILL
    finish(stage, tmp_path / "stopped", *flags, "--resume", "auto")
    assert differences(tmp_path / "stopped", tmp_path / "reference", stage) == []


def json_lines(folder):
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


def test_tensorboard_has_each_epoch_once(tmp_path):
    flags = ["--sampling_freq", 1, "--batch_size", 30, "--resume", "auto"]
    for epochs in (2, 4):
        finish("finetune_ipdpp", tmp_path, *flags, "--epochs", epochs)
    points = tensorboard(tmp_path)
    steps = {tag: [step for other, step, _ in points if other == tag] for tag, _, _ in points}
    assert steps["test/acc1"] == [999, 1999, 2999, 3999]
    assert len(steps["train_loss"]) == len(set(steps["train_loss"])) == 4 * 3
    assert steps["train_ipdpp/striped disc/mean_p"] == [0, 2000]  # none in the last epoch, which was epoch 1 at first


def test_second_ctrl_c_ends_the_run_at_once(tmp_path):
    run = Run("pretrain_bns", tmp_path, "--epochs", 9, "--batch_size", 240, latest_every=60.0)
    assert run.wait_until(lambda: run.says("epoch 0  train_loss"))
    run.send(signal.SIGINT)
    assert run.wait_until(lambda: run.says("SIGINT: stopping after this step"))
    assert run.kill(signal.SIGINT) == -signal.SIGINT
    assert not run.says("--resume auto")


def test_changed_flags_are_said_aloud_and_obeyed(tmp_path):
    finish("lineprob_bns", tmp_path, "--epochs", 2)
    output = finish("lineprob_bns", tmp_path, "--epochs", 4, "--lr", "0.125", "--batch_size", 69, "--warmup_epochs", 0,
                    "--resume", tmp_path / "checkpoint-1.pth")
    for line in ("--epochs: 2 in the checkpoint, 4 from here on", "--lr: None in the checkpoint, 0.125 from here on",
                 "--batch_size: 20 in the checkpoint, 69 from here on"):
        assert line in output
    assert "1 steps an epoch" in output
    history = json_lines(tmp_path)
    assert [record["epoch"] for record in history] == [0, 1, 2, 3]
    assert history[2]["train_lr"] == pytest.approx(0.125 / 2)  # half way through half a cosine over 4 updates


def test_newest_checkpoints_are_kept_and_the_final_file_always(tmp_path):
    flags = ["--save_freq", 1, "--keep_checkpoints", 2]
    finish("lineprob_bns", tmp_path, *flags, "--epochs", 5)
    final = "lineprob_bns_cifar10_if100.pth"
    assert files(tmp_path) == ["checkpoint-3.pth", "checkpoint-4.pth", final, "log.txt"]
    # Gone back by an epoch, what is written from here on is newer than what has a higher number.
    flags += ["--epochs", 9, "--start_epoch", 1]
    finish("lineprob_bns", tmp_path, *flags, "--resume", tmp_path / "checkpoint-3.pth")
    assert files(tmp_path) == ["checkpoint-7.pth", "checkpoint-8.pth", final, "log.txt"]
    finish("lineprob_bns", tmp_path / "all", "--save_freq", 1, "--epochs", 5, "--keep_checkpoints", 0)
    assert files(tmp_path / "all") == [f"checkpoint-{epoch}.pth" for epoch in range(5)] + [final, "log.txt"]


def test_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on(tmp_path):
    flags = ["--epochs", 4, "--save_freq", 1, "--resume", "auto"]
    finish("pretrain_bns", tmp_path / "reference", *flags)
    run = Run("pretrain_bns", tmp_path / "full", *flags)
    assert run.wait_until((tmp_path / "full" / "checkpoint-1.pth").exists)
    run.kill(signal.SIGKILL)
    kept = [path for path in files(tmp_path / "full") if path.endswith(".pth")]

    output = finish("pretrain_bns", tmp_path / "full", *flags, code=2, largest_file=2**20)
    assert "could not write" in output and "File too large" in output and "training goes on" in output
    assert "epoch 3  train_loss" in output and "Traceback" not in output
    assert [path for path in files(tmp_path / "full") if path.endswith(".pth")] == kept
    load_checkpoint(tmp_path / "full" / "checkpoint-1.pth")
    finish("pretrain_bns", tmp_path / "full", *flags)
    assert differences(tmp_path / "full", tmp_path / "reference", "pretrain_bns") == []


def die_before_second_checkpoint():
    replace, written = os.replace, []

    def replace_or_die(source, target):
        written.extend([target] * (target.suffix == ".pth"))
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = replace_or_die


def test_killed_between_the_two_files_of_the_last_epoch(tmp_path):
    flags, killed = ["--epochs", 1, "--resume", "auto"], -signal.SIGKILL
    finish("lineprob_bns", tmp_path, *flags, code=killed, latest_every=60.0, prepare=die_before_second_checkpoint)
    assert len(list(tmp_path.glob("*.pth"))) == 1
    finish("lineprob_bns", tmp_path, *flags)
    load_checkpoint(tmp_path / "lineprob_bns_cifar10_if100.pth")


def test_auto_passes_over_damaged_files_and_finds_the_newest_good_one(tmp_path):
    flags = ["--epochs", 3, "--save_freq", 1, "--resume", "auto"]
    finish("lineprob_bns", tmp_path, *flags)
    good = tmp_path / "checkpoint-1.pth"
    for path in (tmp_path / "checkpoint-2.pth", tmp_path / "lineprob_bns_cifar10_if100.pth"):
        path.write_bytes(good.read_bytes()[:-1000])
    output = finish("lineprob_bns", tmp_path, *flags)
    assert output.count("passed over") == 2 and f"continuing {good} in epoch 2" in output
    assert "no checkpoint" in output.splitlines()[1]  # the first time, there was none
