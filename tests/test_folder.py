"""One folder, one run: what is refused, written, kept and deleted there, and what is left alone."""
import functools
import os
import shutil
import signal

import pytest
from conftest import TINY, command_line, run
from run_process import STAGES, Run, at_step, finish, signal_self

from util.run.checkpoint import load_checkpoint, save_checkpoint

PRETRAIN, LINEPROB, FINETUNE = (f"main_cifar10_{stage}" for stage in STAGES)
FINAL = "lineprob_bns_cifar10_if100.pth"
PROBE = ["--num_samples", "5", "--epochs", "1"]


def files(folder):
    """All files but the lock, by their path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def refused(capsys, script, output_dir, *flags):
    """The one line in which a run is refused."""
    capsys.readouterr()
    assert command_line(script, *TINY, "--output_dir", output_dir, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_last_epochs_are_kept_by_their_numbers(quick_runs, tmp_path):
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


def test_copies_and_notes_are_the_users(quick_runs, tmp_path, capsys):
    flags = ["--num_samples", 5, "--save_freq", 1, "--keep_checkpoints", 1]
    run(LINEPROB, tmp_path, *flags, "--epochs", 2)
    mine = ["checkpoint-1-best.pth", "checkpoint-9 (copy).pth", "checkpoint-latest.pth", "notes.txt"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    capsys.readouterr()
    run(LINEPROB, tmp_path, *flags, "--epochs", 3, "--resume", "auto")
    assert f"continuing {tmp_path / 'checkpoint-1.pth'} in epoch 2" in capsys.readouterr().out
    run(LINEPROB, tmp_path, *flags, "--epochs", 1, "--overwrite")
    assert checkpoints(tmp_path) == sorted([*mine[:-1], "checkpoint-0.pth", FINAL])
    assert all((tmp_path / name).read_text() == "mine" for name in mine)


def test_what_was_trained_is_saved_before_it_is_shown(quick_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{LINEPROB}.show_predictions", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(LINEPROB, tmp_path, *PROBE)
    assert checkpoints(tmp_path) == ["checkpoint-0.pth"] and len((tmp_path / "log.txt").read_text().splitlines()) == 1


def test_another_run_is_refused_or_deleted_with_overwrite(quick_runs, tmp_path, capsys):
    run(FINETUNE, tmp_path, "--num_samples", 5, "--epochs", 2, "--save_freq", 1)
    before = files(tmp_path)
    error = refused(capsys, FINETUNE, tmp_path, *PROBE)
    assert "holds another run (log.txt)" in error and "--overwrite to delete it" in error
    assert files(tmp_path) == before
    run(FINETUNE, tmp_path, *PROBE, "--overwrite", "--log_dir", tmp_path / "logs")
    assert set(before) <= set(files(tmp_path)) | {"checkpoint-1.pth"}, "the events do not lie in --log_dir"
    run(FINETUNE, tmp_path, *PROBE, "--overwrite")
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert checkpoints(tmp_path) == ["checkpoint-0.pth", "finetune_ipdpp_cifar10_if100.pth"]


@pytest.mark.slow
def test_folder_in_use_is_refused_until_its_run_ends_or_is_killed(quick_runs, tmp_path, capsys):
    folder = tmp_path / "run"
    first = Run("pretrain_bns", folder, "--epochs", 10000)
    assert first.wait_until(first.has_written)
    for flags in ([], ["--overwrite"], ["--resume", "auto"]):
        error = refused(capsys, PRETRAIN, folder, *flags, "--batch_size", 24, "--epochs", 10000)
        assert f"--output_dir: {folder} is in use by another process" in error
    assert first.process.is_alive() and first.kill() == -signal.SIGKILL
    finish("pretrain_bns", folder, "--epochs", 1, "--overwrite")
    run(PRETRAIN, folder, "--epochs", 2, "--batch_size", 24, "--resume", "auto")  # nor is it held after the end


def test_signals_and_lock_are_given_back_after_a_failure(quick_runs, tmp_path, monkeypatch):
    """As in a notebook, where `main(args)` fails and is called again."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with monkeypatch.context() as patch:
        patch.setattr(f"{LINEPROB}.train_one_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(LINEPROB, tmp_path, *PROBE)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    monkeypatch.setattr("sys.argv", [""])
    assert len(run(LINEPROB, tmp_path, *PROBE, "--overwrite")) == 1


# ---------------------------------------------------------------------------------------- a downloaded final file


@pytest.fixture
def downloaded(quick_runs, tmp_path):
    """A folder with nothing but the final file of a run elsewhere, weights only, as one downloads it."""
    run(LINEPROB, tmp_path / "elsewhere", *PROBE, "--seed", 5)
    (tmp_path / "run").mkdir()
    save_checkpoint({"model": load_checkpoint(tmp_path / "elsewhere" / FINAL)["model"]}, tmp_path / "run" / FINAL)
    return tmp_path / "run"


@pytest.mark.parametrize("flags", [[], ["--resume", "auto"], ["--overwrite"]], ids=" ".join)
def test_downloaded_file_is_evaluated_and_then_kept_under_another_name(flags, downloaded, capsys):
    original = (downloaded / FINAL).read_bytes()
    kept = downloaded / FINAL.replace(".pth", ".downloaded.pth")
    figures = run(LINEPROB, downloaded, "--eval", downloaded / FINAL)
    assert list(files(downloaded)) == [FINAL]
    run(LINEPROB, downloaded, *PROBE, *flags)
    assert f"{downloaded / FINAL} comes from elsewhere; it is kept as {kept.name}" in capsys.readouterr().out
    assert kept.read_bytes() == original and load_checkpoint(downloaded / FINAL)["epoch"] == 0
    assert run(LINEPROB, downloaded, "--eval", kept) == figures
    # From here on it is a run as any other.
    assert "another run" in refused(capsys, LINEPROB, downloaded, *PROBE)
    run(LINEPROB, downloaded, *PROBE, "--overwrite", "--epochs", 2)
    assert kept.read_bytes() == original and load_checkpoint(downloaded / FINAL)["epoch"] == 1


@pytest.mark.slow
def test_run_killed_before_its_first_checkpoint_begins_afresh(downloaded):
    killed = functools.partial(at_step, 1, 0, functools.partial(signal_self, signal.SIGKILL))
    flags = ["--epochs", 2, "--save_freq", 50]
    original, kept = (downloaded / FINAL).read_bytes(), downloaded / FINAL.replace(".pth", ".downloaded.pth")
    finish("lineprob_bns", downloaded, *flags, save_every=60.0, code=-signal.SIGKILL, prepare=killed)
    assert kept.read_bytes() == original and not list(downloaded.glob("checkpoint*"))
    assert "no checkpoint" in finish("lineprob_bns", downloaded, *flags, "--resume", "auto")
    assert (downloaded / FINAL).exists() and kept.read_bytes() == original


def test_a_run_goes_on_in_a_copy_of_its_folder(quick_runs, tmp_path):
    run(LINEPROB, tmp_path / "run", *PROBE)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert len(run(LINEPROB, tmp_path / "copy", *PROBE, "--epochs", 2, "--resume", "auto")) == 2


def test_a_run_without_its_checkpoints_goes_on_from_its_final_file(quick_runs, tmp_path):
    first = run(LINEPROB, tmp_path, *PROBE)
    (tmp_path / "checkpoint-0.pth").unlink()  # to save space
    history = run(LINEPROB, tmp_path, *PROBE, "--epochs", 2, "--lr", 1e-9, "--resume", "auto")
    assert [record["epoch"] for record in history] == [0, 1]
    assert history[0] == first[0]  # an epoch trained anew would have the other learning rate


def test_a_finished_run_keeps_the_flags_that_it_was_trained_with(quick_runs, tmp_path):
    run(FINETUNE, tmp_path, *PROBE)
    before = files(tmp_path)["finetune_ipdpp_cifar10_if100.pth"]
    run(FINETUNE, tmp_path, *PROBE, "--loss", "logit_adjusted", "--resume", "auto")
    assert files(tmp_path)["finetune_ipdpp_cifar10_if100.pth"] == before


@pytest.mark.parametrize("flags", [["--overwrite", "--log_dir", "{}/log.txt"], ["--batch_size", "20"]])
def test_nothing_is_lost_where_a_run_cannot_begin(flags, quick_runs, tmp_path, capsys):
    """Its TensorBoard has no place; or a file that came from elsewhere would take the place of an earlier one."""
    run(LINEPROB, tmp_path, *PROBE)
    if "--overwrite" not in flags:
        (tmp_path / "log.txt").unlink()
        (tmp_path / "checkpoint-0.pth").unlink()
        shutil.copy(tmp_path / FINAL, tmp_path / FINAL.replace(".pth", ".downloaded.pth"))
    before = files(tmp_path)
    refused(capsys, LINEPROB, tmp_path, *PROBE, *(flag.format(tmp_path) for flag in flags))
    assert files(tmp_path) == before
