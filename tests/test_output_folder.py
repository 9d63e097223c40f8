"""What a run finds in its folders, what it writes and deletes there, and what it leaves alone."""
import functools
import signal
from pathlib import Path

import pytest
from conftest import TINY, command_line, run
from run_process import STAGES, Run, at_step, finish, signal_self

from util.run.checkpoint import load_checkpoint, save_checkpoint

PRETRAIN, LINEPROB, FINETUNE = (f"main_cifar10_{stage}" for stage in STAGES)
FINAL = "lineprob_bns_cifar10_if100.pth"
PROBE = ["--num_samples", "5", "--epochs", "1"]


def contents(folder):
    """All files but the empty lock, by their path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def events(folder):
    return sorted(path.name for path in folder.glob("events.out.tfevents.*"))


def refused(capsys, script, output_dir, *flags):
    """The one line in which a run is refused."""
    capsys.readouterr()
    assert command_line(script, *TINY, "--output_dir", output_dir, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# ---------------------------------------------------------------------------------------- checkpoints


def test_newest_checkpoints_are_kept_and_the_final_file_always(quick_runs, tmp_path):
    def names(folder):
        return sorted(path.name for path in folder.iterdir() if path.suffix == ".pth")

    flags = ["--num_samples", 5, "--save_freq", 1, "--eval_freq", 9]
    run(LINEPROB, tmp_path, *flags, "--keep_checkpoints", 2, "--epochs", 5)
    assert names(tmp_path) == ["checkpoint-3.pth", "checkpoint-4.pth", FINAL]
    # Gone back by an epoch, what is written from here on is newer than what has a higher number.
    run(LINEPROB, tmp_path, *flags, "--keep_checkpoints", 2, "--epochs", 9, "--start_epoch", 1,
        "--resume", tmp_path / "checkpoint-3.pth")
    assert names(tmp_path) == ["checkpoint-7.pth", "checkpoint-8.pth", FINAL]
    run(LINEPROB, tmp_path / "all", *flags, "--keep_checkpoints", 0, "--epochs", 5)
    assert names(tmp_path / "all") == [f"checkpoint-{epoch}.pth" for epoch in range(5)] + [FINAL]


# ---------------------------------------------------------------------------------------- another run


def test_another_run_is_left_alone_or_deleted_with_overwrite(quick_runs, tmp_path, capsys):
    run(FINETUNE, tmp_path, "--num_samples", 5, "--epochs", 2, "--save_freq", 1)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    error = refused(capsys, FINETUNE, tmp_path, *PROBE)
    assert "holds another run (log.txt)" in error and "--overwrite to delete it" in error
    assert contents(tmp_path) == before

    old = events(tmp_path)
    run(FINETUNE, tmp_path, *PROBE, "--overwrite")
    assert not set(old) & set(events(tmp_path)) and len(events(tmp_path)) == 1
    names = {str(path) for path in contents(tmp_path)} - set(events(tmp_path))
    assert names == {"notes.txt", "log.txt", "checkpoint-0.pth", "finetune_ipdpp_cifar10_if100.pth",
                     "projector_config.pbtxt"} | {f"00001/test_features/{name}" for name in
                                                  ("tensors.tsv", "metadata.tsv", "sprite.png")}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("first_logs_to", ["logs", "second"])
def test_a_log_dir_of_another_run_is_refused(overwrite, first_logs_to, quick_runs, tmp_path, capsys):
    """The second run names the first's --log_dir, or has as its --output_dir what the first took as --log_dir."""
    run(LINEPROB, tmp_path / "first", *PROBE, "--log_dir", tmp_path / first_logs_to)
    before = contents(tmp_path)
    flags = ["--log_dir", tmp_path / "logs"] if first_logs_to == "logs" else []
    if overwrite:
        flags.append("--overwrite")
    error = refused(capsys, LINEPROB, tmp_path / "second", *PROBE, *flags)
    assert f"{tmp_path / first_logs_to} holds the curves of another run" in error
    assert contents(tmp_path) == before and not (first_logs_to == "logs" and (tmp_path / "second").exists())


def test_a_run_takes_up_and_deletes_its_own_curves_only(quick_runs, tmp_path):
    logs = tmp_path / "logs"
    run(LINEPROB, tmp_path / "run", *PROBE, "--log_dir", logs)
    first = events(logs)
    run(LINEPROB, tmp_path / "run", *PROBE, "--epochs", 2, "--log_dir", logs, "--resume", "auto")
    both = events(logs)
    assert set(first) < set(both) and len(both) == 2
    # A run in a folder that was moved goes on, beside the events that bear the name of the old place.
    (tmp_path / "run").rename(tmp_path / "moved")
    for name in both:
        (logs / name).rename(tmp_path / "moved" / name)
    run(LINEPROB, tmp_path / "moved", *PROBE, "--epochs", 3, "--resume", "auto")
    assert len(events(tmp_path / "moved")) == 3


# ---------------------------------------------------------------------------------------- two runs at once


@pytest.mark.slow
def test_folder_in_use_is_refused_until_its_run_ends_or_is_killed(quick_runs, tmp_path, capsys):
    folder = tmp_path / "run"
    first = Run("pretrain_bns", folder, "--epochs", 10000)
    assert first.wait_until(first.has_written)
    for flags in ([], ["--overwrite"], ["--resume", "auto"]):
        error = refused(capsys, PRETRAIN, folder, *flags, "--batch_size", 24, "--epochs", 1)
        assert f"--output_dir: {folder} is in use by process {first.process.pid}" in error
    assert first.process.is_alive() and first.kill() == -signal.SIGKILL
    finish("pretrain_bns", folder, "--epochs", 1, "--overwrite")
    run(PRETRAIN, folder, "--epochs", 2, "--batch_size", 24, "--resume", "auto")  # nor is it held after the end


# ---------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("source", ["checkpoint-0.pth", FINAL])
def test_overwrite_never_deletes_what_the_run_starts_from(source, quick_runs, tmp_path, capsys):
    run(LINEPROB, tmp_path, *PROBE)
    before = contents(tmp_path)
    flags = [*PROBE, "--overwrite"]
    for path in (tmp_path / source, tmp_path / "." / "x" / ".." / source):
        (tmp_path / "x").mkdir(exist_ok=True)
        for script in (LINEPROB, FINETUNE):
            assert f"would delete {source}" in refused(capsys, script, tmp_path, *flags, "--resume", path)
    assert contents(tmp_path) == before


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
    assert list(contents(downloaded)) == [Path(FINAL)]
    run(LINEPROB, downloaded, *PROBE, *flags)
    assert f"{downloaded / FINAL} comes from elsewhere; it is kept as {kept.name}" in capsys.readouterr().out
    assert kept.read_bytes() == original and load_checkpoint(downloaded / FINAL)["epoch"] == 0
    assert run(LINEPROB, downloaded, "--eval", kept) == figures
    # From here on it is a run as any other.
    assert "another run" in refused(capsys, LINEPROB, downloaded, *PROBE)
    run(LINEPROB, downloaded, *PROBE, "--overwrite", "--epochs", 2)
    assert kept.read_bytes() == original and load_checkpoint(downloaded / FINAL)["epoch"] == 1


def test_second_downloaded_file_replaces_no_first(downloaded, capsys):
    kept = downloaded / FINAL.replace(".pth", ".downloaded.pth")
    kept.write_text("an earlier one")
    before = contents(downloaded)
    assert "both come from elsewhere" in refused(capsys, LINEPROB, downloaded, *PROBE)
    assert contents(downloaded) == before


KILLED_AT_ONCE = functools.partial(at_step, 1, 0, functools.partial(signal_self, signal.SIGKILL))


@pytest.mark.slow
def test_run_killed_before_its_first_checkpoint_begins_afresh(downloaded):
    """Beside a downloaded file, and where --overwrite has deleted a run that was over."""
    flags = ["--epochs", 2, "--save_freq", 50]
    killed = functools.partial(finish, "lineprob_bns", downloaded, *flags, latest_every=60.0, code=-signal.SIGKILL,
                               prepare=KILLED_AT_ONCE)
    original, kept = (downloaded / FINAL).read_bytes(), downloaded / FINAL.replace(".pth", ".downloaded.pth")
    killed()
    assert kept.read_bytes() == original and not list(downloaded.glob("checkpoint*"))
    assert "starting afresh" in finish("lineprob_bns", downloaded, *flags, "--resume", "auto")
    assert (downloaded / FINAL).exists()

    killed("--overwrite", "--seed", 3)
    output = finish("lineprob_bns", downloaded, *flags, "--seed", 3, "--resume", "auto")
    assert "starting afresh" in output and load_checkpoint(downloaded / FINAL)["args"]["seed"] == 3
    assert kept.read_bytes() == original


@pytest.mark.parametrize("log_dir", ["file", "file/logs", "used"])
def test_a_refused_log_dir_leaves_no_empty_folder(log_dir, quick_runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "events.out.tfevents.1.host.1.0.of_another_run").touch()
    before = sorted(tmp_path.rglob("*"))
    refused(capsys, LINEPROB, tmp_path / "new" / "run", *PROBE, "--log_dir", tmp_path / log_dir)
    assert sorted(tmp_path.rglob("*")) == before
