"""One folder, one run: what is refused, written, kept and deleted there, and what is left alone."""
import os
import shutil
import signal

import pytest
from conftest import FINETUNE, LINEPROB, PRETRAIN, TINY, command_line, contents, run
from run_process import Run, finish
from torch.utils.tensorboard import SummaryWriter

from util.run.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("few_images")
FINAL = "lineprob_bns_cifar10_if100.pth"
PROBE = ["--num_samples", "5", "--epochs", "1"]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def refused(capsys, script, output_dir, *flags):
    """The one line in which a run is refused."""
    capsys.readouterr()
    assert command_line(script, *TINY, "--output_dir", output_dir, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_last_epochs_are_kept_by_their_numbers(tmp_path):
    """Whatever the clock says: it is set back here, and the highest epoch is the one to go on from."""
    flags = ["--num_samples", 5, "--save_freq", 1, "--eval_freq", 9, "--keep_checkpoints", 2, "--resume", "auto"]
    run(LINEPROB, tmp_path, *flags, "--epochs", 11)
    assert checkpoints(tmp_path) == ["checkpoint-10.pth", "checkpoint-9.pth", FINAL]
    for path in tmp_path.glob("checkpoint-*.pth"):
        os.utime(path, (4e9, 4e9))  # written far in the future
    history = run(LINEPROB, tmp_path, *flags, "--epochs", 14)
    assert [record["epoch"] for record in history] == list(range(14))
    assert checkpoints(tmp_path) == ["checkpoint-12.pth", "checkpoint-13.pth", FINAL]
    run(LINEPROB, tmp_path / "all", *flags, "--keep_checkpoints", 0, "--epochs", 5)
    assert checkpoints(tmp_path / "all") == [f"checkpoint-{epoch}.pth" for epoch in range(5)] + [FINAL]


def test_copies_and_notes_are_the_users(tmp_path):
    flags = ["--num_samples", 5, "--save_freq", 1, "--keep_checkpoints", 1]
    run(LINEPROB, tmp_path, *flags, "--epochs", 2)
    mine = ["checkpoint-1-best.pth", "checkpoint-9 (copy).pth", "checkpoint-latest.pth", "notes.txt"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    assert len(run(LINEPROB, tmp_path, *flags, "--epochs", 3, "--resume", "auto")) == 3
    run(LINEPROB, tmp_path, *flags, "--epochs", 1, "--overwrite")
    assert checkpoints(tmp_path) == sorted([*mine[:-1], "checkpoint-0.pth", FINAL])
    assert all((tmp_path / name).read_text() == "mine" for name in mine)


def fail(*args, **kwargs):
    raise RuntimeError("a failure of the test")


def test_no_picture_or_curve_costs_an_epoch(tmp_path, monkeypatch):
    for name in ("add_images", "add_scalar"):
        monkeypatch.setattr(SummaryWriter, name, fail)
    assert len(run(FINETUNE, tmp_path, *PROBE)) == 1
    assert checkpoints(tmp_path) == ["checkpoint-0.pth", "finetune_ipdpp_cifar10_if100.pth"]


def test_another_run_is_refused_or_deleted_with_overwrite(tmp_path, capsys):
    run(FINETUNE, tmp_path, "--num_samples", 5, "--epochs", 2, "--save_freq", 1)
    before = contents(tmp_path)
    assert "--overwrite" in refused(capsys, FINETUNE, tmp_path, *PROBE)
    assert contents(tmp_path) == before
    run(FINETUNE, tmp_path, *PROBE, "--overwrite", "--log_dir", tmp_path / "logs")
    assert set(before) <= set(contents(tmp_path)) | {"checkpoint-1.pth"}, "the events do not lie in --log_dir"
    run(FINETUNE, tmp_path, *PROBE, "--overwrite")
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert checkpoints(tmp_path) == ["checkpoint-0.pth", "finetune_ipdpp_cifar10_if100.pth"]


@pytest.mark.slow
def test_folder_in_use_is_refused_until_its_run_ends_or_is_killed(tmp_path, capsys):
    folder = tmp_path / "run"
    first = Run("pretrain_bns", folder, "--epochs", 10000)
    assert first.wait_until(first.has_written)
    for flags in ([], ["--overwrite"], ["--resume", "auto"]):
        error = refused(capsys, PRETRAIN, folder, *flags, "--batch_size", 24, "--epochs", 10000)
        assert "in use by another process" in error
    assert first.process.is_alive() and first.kill() == -signal.SIGKILL
    finish("pretrain_bns", folder, "--epochs", 1, "--overwrite")
    run(PRETRAIN, folder, "--epochs", 2, "--batch_size", 24, "--resume", "auto")  # nor is it held after the end


def test_signals_and_lock_are_given_back_after_a_failure(tmp_path, monkeypatch):
    """As in a notebook, where `main(args)` fails and is called again."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with monkeypatch.context() as patch:
        patch.setattr(f"{LINEPROB}.train_one_epoch", fail)
        with pytest.raises(RuntimeError):
            run(LINEPROB, tmp_path, *PROBE)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert len(run(LINEPROB, tmp_path, *PROBE, "--overwrite")) == 1


@pytest.mark.parametrize("flags", [[], ["--resume", "auto"], ["--overwrite"]], ids=" ".join)
def test_downloaded_file_is_evaluated_and_then_kept_under_another_name(flags, tmp_path, capsys):
    """The folder holds nothing but the final file of a run elsewhere, weights only."""
    run(LINEPROB, tmp_path / "elsewhere", *PROBE, "--seed", 5)
    folder = tmp_path / "run"
    folder.mkdir()
    save_checkpoint({"model": load_checkpoint(tmp_path / "elsewhere" / FINAL)["model"]}, folder / FINAL)
    original, kept = (folder / FINAL).read_bytes(), folder / FINAL.replace(".pth", ".downloaded.pth")
    figures = run(LINEPROB, folder, "--eval", folder / FINAL)
    assert list(contents(folder)) == [FINAL]
    run(LINEPROB, folder, *PROBE, *flags)
    assert kept.read_bytes() == original and load_checkpoint(folder / FINAL)["epoch"] == 0
    assert run(LINEPROB, folder, "--eval", kept) == figures
    # From here on it is a run as any other.
    assert "another run" in refused(capsys, LINEPROB, folder, *PROBE)
    run(LINEPROB, folder, *PROBE, "--overwrite", "--epochs", 2)
    assert kept.read_bytes() == original and load_checkpoint(folder / FINAL)["epoch"] == 1


def test_a_run_without_its_checkpoints_goes_on_from_its_final_file(tmp_path):
    first = run(LINEPROB, tmp_path, *PROBE)
    (tmp_path / "checkpoint-0.pth").unlink()  # to save space
    flags = ["--num_samples", 5, "--epochs", 2, "--lr", 1e-9, "--resume", "auto"]
    history = run(LINEPROB, tmp_path, *flags)
    assert [record["epoch"] for record in history] == [0, 1]
    assert history[0] == first[0]  # an epoch trained anew would have the other learning rate
    for name in ("checkpoint-1.pth", FINAL):  # as if killed before the first checkpoint: it begins afresh
        (tmp_path / name).unlink()
    assert run(LINEPROB, tmp_path, *flags)[0] != first[0]


def test_a_finished_run_keeps_the_flags_that_it_was_trained_with(tmp_path):
    run(FINETUNE, tmp_path, *PROBE)
    final = tmp_path / "finetune_ipdpp_cifar10_if100.pth"
    before = final.read_bytes()
    run(FINETUNE, tmp_path, *PROBE, "--loss", "logit_adjusted", "--resume", "auto")
    assert final.read_bytes() == before


@pytest.mark.parametrize("flags", [["--overwrite", "--log_dir", "{}/log.txt"], ["--batch_size", "20"]])
def test_nothing_is_lost_where_a_run_cannot_begin(flags, tmp_path, capsys):
    """Its TensorBoard has no place; or a file that came from elsewhere would take the place of an earlier one."""
    run(LINEPROB, tmp_path, *PROBE)
    if "--overwrite" not in flags:
        (tmp_path / "log.txt").unlink()
        (tmp_path / "checkpoint-0.pth").unlink()
        shutil.copy(tmp_path / FINAL, tmp_path / FINAL.replace(".pth", ".downloaded.pth"))
    before = contents(tmp_path)
    refused(capsys, LINEPROB, tmp_path, *PROBE, *(flag.format(tmp_path) for flag in flags))
    assert contents(tmp_path) == before
