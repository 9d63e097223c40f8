"""A run that was killed, stopped or changed goes on as it should: at the start of an epoch, as if nothing had been."""
import functools
import os
import random
import re
import shutil
import signal

import pytest
import torch
from conftest import FINETUNE, LINEPROB, PRETRAIN, STAGES, final_file, run
from run_process import at_step, differences, finish, kill_and_resume, signal_self

from util.errors import UserError
from util.run.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("few_images")


def epochs(history):
    return [record["epoch"] for record in history]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_run_ends_as_one_left_alone(stage, tmp_path):
    source = None
    if stage != "pretrain_bns":
        finish("pretrain_bns", tmp_path / "extractor", "--epochs", 1)
        source = final_file(PRETRAIN, tmp_path / "extractor")
    found, landed = kill_and_resume(stage, tmp_path, source, kills=3, epochs=6, rng=random.Random(1))
    assert not found and landed == 3


@pytest.mark.slow
def test_full_disk_ends_the_run_in_a_line_and_leaves_what_was_saved(tmp_path):
    flags = ["--epochs", 4, "--save_freq", 1, "--resume", "auto"]
    finish("pretrain_bns", tmp_path / "reference", *flags)
    finish("pretrain_bns", tmp_path / "full", *flags, code=-signal.SIGKILL, prepare=stop_amid(2, signal.SIGKILL))
    kept = sorted((tmp_path / "full").glob("*.pth"))
    output = finish("pretrain_bns", tmp_path / "full", *flags, code=2, largest_file=2**20)
    assert re.search(r"error: .*File too large: '.*checkpoint-2.pth'\n$", output) and "Traceback" not in output
    assert sorted((tmp_path / "full").glob("*.pth")) == kept
    finish("pretrain_bns", tmp_path / "full", *flags)
    assert differences(tmp_path / "full", tmp_path / "reference", "pretrain_bns") == []


def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_counts(tmp_path, capsys):
    flags = ["--epochs", 3, "--num_samples", 10, "--save_freq", 1, "--resume", "auto"]
    run(LINEPROB, tmp_path, *flags)
    damaged = tmp_path / "checkpoint-2.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with pytest.raises(UserError, match="checkpoint-2.pth"):
        run(LINEPROB, tmp_path, *flags)
    damaged.unlink()
    assert epochs(run(LINEPROB, tmp_path, *flags)) == [0, 1, 2]
    assert f"continuing {tmp_path / 'checkpoint-1.pth'} in epoch 2" in capsys.readouterr().out


def test_nothing_left_to_train_writes_the_final_file(tmp_path):
    """As after a kill between the last checkpoint and that file."""
    flags = ["--epochs", 2, "--batch_size", 40, "--save_freq", 1]
    history = run(PRETRAIN, tmp_path, *flags)
    final = final_file(PRETRAIN, tmp_path)
    shutil.move(final, tmp_path / "before")
    assert run(PRETRAIN, tmp_path, *flags, "--resume", "auto") == history
    before, after = (load_checkpoint(path)["model"] for path in (tmp_path / "before", final))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def stop_amid(epoch, *signums, pause=0.0):
    """For `prepare` of a run: signals come between two steps of an epoch."""
    return functools.partial(at_step, epoch, 1, functools.partial(signal_self, *signums, pause=pause))


def close_terminal():
    """Nothing can be written any more, and a signal says why."""
    reader, writer = os.pipe()
    os.close(reader)
    for number in (1, 2):
        os.dup2(writer, number)
    signal_self(signal.SIGHUP)


@pytest.mark.slow
@pytest.mark.parametrize("stage, signum, stop, flags", [
    ("pretrain_bns", signal.SIGINT, stop_amid(1, signal.SIGINT), ["--opt", "sgd"]),
    ("lineprob_bns", signal.SIGHUP, functools.partial(at_step, 1, 1, close_terminal), ["--augment", "auto"]),
    ("finetune_ipdpp", signal.SIGTERM, stop_amid(1, signal.SIGTERM), ["--amp", "float16"])])
def test_stopped_amid_an_epoch_and_resumed_run_ends_as_one_left_alone(stage, signum, stop, flags, tmp_path):
    flags = ["--epochs", 4, "--save_freq", 50, *flags]
    finish(stage, tmp_path / "reference", *flags)
    stopped = functools.partial(finish, stage, tmp_path / "stopped", *flags, save_every=60.0)
    stopped(code=128 + signum, prepare=stop)
    assert load_checkpoint(tmp_path / "stopped" / "checkpoint-1.pth")["epoch"] == 1
    # Killed after epoch 2 was logged and before it was saved: it is trained and logged a second time.
    stopped("--resume", "auto", code=-signal.SIGKILL, prepare=stop_amid(3, signal.SIGKILL))
    assert len((tmp_path / "stopped" / "log.txt").read_text().splitlines()) == 3
    assert "in epoch 2" in stopped("--resume", "auto")
    assert differences(tmp_path / "stopped", tmp_path / "reference", stage) == []


@pytest.mark.slow
def test_signals_within_a_second_count_as_one_and_a_later_one_ends_at_once(tmp_path):
    signals = signal.SIGINT, signal.SIGTERM
    finish("lineprob_bns", tmp_path / "one", "--epochs", 9, code=128 + signal.SIGINT, prepare=stop_amid(1, *signals))
    assert (tmp_path / "one" / "checkpoint-1.pth").exists()
    finish("lineprob_bns", tmp_path / "two", "--epochs", 9, code=-signal.SIGTERM,
           prepare=stop_amid(1, *signals, pause=1.1))
    assert not (tmp_path / "two" / "checkpoint-1.pth").exists()


def under_nohup():
    """Amid epoch 1 its terminal is closed, of which nohup keeps the signal away."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(1, 1, close_terminal)


@pytest.mark.slow
def test_run_under_nohup_goes_on_in_silence(tmp_path):
    output = finish("pretrain_bns", tmp_path, "--epochs", 3, prepare=under_nohup)
    assert "epoch 1" not in output and load_checkpoint(final_file(PRETRAIN, tmp_path))["epoch"] == 2


@pytest.mark.parametrize("source, target, flag", [(PRETRAIN, FINETUNE, "--resume"), (LINEPROB, PRETRAIN, "--resume"),
                                                  (PRETRAIN, PRETRAIN, "--encoder"), (FINETUNE, FINETUNE, "--encoder")])
def test_a_new_run_begins_with_the_encoder_of_any_stage(source, target, flag, tmp_path):
    """Of its own stage by --encoder, since --resume would continue the run. Its head is a new one."""
    brief = ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", 60]
    run(source, tmp_path / "source", *brief)
    still = [*brief, "--lr", 1e-12]
    assert epochs(run(target, tmp_path / "run", *still, flag, final_file(source, tmp_path / "source"))) == [0]
    run(target, tmp_path / "fresh", *still)
    given, taken, fresh = (load_checkpoint(final_file(script, tmp_path / name))["model"] for script, name in (
        (source, "source"), (target, "run"), (target, "fresh")))
    for name, value in taken.items():
        if not re.search("running|num_batches", name):
            expected = given[name] if name.startswith("enc.") else fresh[name]
            torch.testing.assert_close(value, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("flags", ["--resume FILE --resume auto", "--resume auto FILE", "--resume FILE auto",
                                   "--resume auto --encoder FILE"])
def test_auto_beside_a_file(flags, tmp_path, capsys):
    """A checkpoint of the folder comes first; without one, the file counts, in whatever order they are given."""
    run(PRETRAIN, tmp_path / "p", "--epochs", 1, "--batch_size", 60)
    file = final_file(PRETRAIN, tmp_path / "p")
    flags = flags.replace("FILE", str(file)).split()
    run(LINEPROB, tmp_path / "l", "--num_samples", 5, "--epochs", 1, *flags)
    given, probed = (load_checkpoint(path)["model"] for path in (file, tmp_path / "l" / "checkpoint-0.pth"))
    assert torch.equal(given["enc.conv1.weight"], probed["enc.conv1.weight"])
    assert epochs(run(LINEPROB, tmp_path / "l", "--num_samples", 5, "--epochs", 2, *flags)) == [0, 1]
    assert f"continuing {tmp_path / 'l' / 'checkpoint-0.pth'} in epoch 1\n" in capsys.readouterr().out


def test_changed_flags_are_obeyed(tmp_path):
    flags = ["--num_samples", 10, "--batch_size", 20]
    run(LINEPROB, tmp_path, *flags, "--epochs", 2)
    history = run(LINEPROB, tmp_path, *flags, "--epochs", 4, "--lr", "0.125", "--batch_size", 58, "--warmup_epochs", 0,
                  "--resume", "auto")
    assert epochs(history) == [0, 1, 2, 3]
    assert history[2]["train_lr"] == pytest.approx(0.125 / 2)  # half way down half a cosine of 4 updates


@pytest.mark.parametrize("script, before, after, images", [
    (LINEPROB, ["--num_samples", 10], ["--num_samples", 20], 87), (LINEPROB, [], ["--seed", 1], 36),
    (FINETUNE, ["--ipdpp_sampler", "none"], ["--ipdpp_sampler", "exact"], 36)])
def test_a_changed_draw_is_drawn_at_once(script, before, after, images, tmp_path):
    """Classes have 50, 30, 18, 11, 7, 4, 3, 2, 1 and 1 images."""
    flags = ["--num_samples", 5, "--batch_size", 32, *before]
    run(script, tmp_path, *flags, "--epochs", 2)
    old = load_checkpoint(tmp_path / "checkpoint-1.pth")["subset"]
    history = run(script, tmp_path, *flags, *after, "--epochs", 4, "--resume", "auto")
    new = load_checkpoint(tmp_path / "checkpoint-3.pth")["subset"]
    assert [record["train_images"] for record in history] == [len(old)] * 2 + [images] * 2
    assert len(new) == images and not torch.equal(old, new)
