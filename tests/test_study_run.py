"""benchmarks/study/run.py: which runs a study has, their commands, and what doing them leaves."""
import fcntl
import importlib
import os
import re
import time
from pathlib import Path

import pytest

from benchmarks.study import run as study_run
from benchmarks.study.logs import PART, encoder_of

ROOT = Path(__file__).resolve().parents[1]
# Stands in for the scripts: notes its flags, and leaves what a run leaves. STOP and WRONG name runs that end early.
STUB = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[-1])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if folder.name == os.environ.get("WRONG"):
    sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
(folder / "log.txt").write_text('{"epoch": 0, "train_images": 10, "test_acc1": 50.0}\\n')
if folder.name == os.environ.get("STOP"):
    sys.exit(143)
script, dataset = Path(sys.argv[0]).stem.split("_", 2)[2], Path(sys.argv[0]).stem.split("_")[1]
(folder / f"{script}_{dataset}_if100.pth").touch()
time.sleep(float(os.environ["SLEEP"] or 0))
while time.process_time() < float(os.environ["WORK"] or 0):
    pass
"""


def parse(*words):
    return study_run.get_args_parser().parse_args([str(word) for word in words])


def commands(*options, dataset="cifar10"):
    """Dict from the names of the runs that the options ask for to their commands."""
    plan = study_run.plan(parse(*options, dataset, "data", "results"))
    return {name: " ".join(words) for name, words in plan.items()}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that calls run.py for stubs of the scripts. It returns the exit status and the runs done."""
    for script in ("pretrain_bns", "lineprob_bns", "finetune_ipdpp"):
        (tmp_path / f"main_cifar10_{script}.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_run, "ROOT", tmp_path)
    monkeypatch.setattr(study_run, "commit", lambda: "abc1234")
    monkeypatch.setattr(study_run.tables, "write", lambda folder: None)

    def call(*options, **variables):
        (tmp_path / "calls").write_text("")
        monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
        for name in ("WRONG", "STOP", "WORK", "SLEEP"):
            monkeypatch.setenv(name, variables.get(name, ""))
        status = 0
        try:
            study_run.main(parse(*options, "cifar10", "/data", "results", "--model", "cifar_resnet32"))
        except SystemExit as end:
            status = end.code
        return status, [Path(line.split()[-1]).name for line in (tmp_path / "calls").read_text().splitlines()]
    return call


@pytest.mark.parametrize("folder", sorted(path.parent for path in ROOT.glob("results/*_if100_*/commands")),
                         ids=lambda folder: folder.name)
def test_commands_are_those_of_the_runs_that_are_there(folder):
    noted = dict(PART.fullmatch(line).groups()[:2] for line in (folder / "commands").read_text().splitlines())
    args = parse("--runs", "*", "--stage1_flags", "--epochs 200", "--later_flags", "--lr 1e-3",
                 folder.name.split("_")[0], "data", folder, "--model", "cifar_resnet32")
    ours = {name: " ".join(words) for name, words in study_run.plan(args).items()}
    assert noted and {name: ours[name] for name in noted} == noted


def test_patterns_choose_runs():
    chosen = commands("--runs", "eq12 *-probe-seed7", "--seeds", "7 8")
    assert list(chosen) == ["bns-probe-seed7", "eq12-seed0", "eq12-probe-seed7"]
    assert set(commands()) < set(commands("--runs", "*"))
    with pytest.raises(SystemExit):
        commands("--runs", "bns bns-other")


@pytest.mark.parametrize("flags, expected", [("", 2027), ("--lr 1 --epochs 200", 427), ("--warmup_epochs 9", 2027)])
def test_plain_training_sees_as_many_images_as_both_stages(flags, expected):
    """Two views an epoch of stage 1, and 100 epochs of stage 2 on 3,386 of the 12,406 images: 27 on all."""
    plans = commands("--runs", "scratch-cross_entropy-as_long bns40", f"--stage1_flags={flags}")
    last = [int(re.findall(r"--epochs (\d+)", command)[-1]) for command in plans.values()]
    assert last == [expected, expected, 40]  # of two seeds and of bns40, whose own flags win


@pytest.mark.parametrize("variant, expected", [
    ("bns", None), ("bns_strong-ipdpp", "bns-strong"), ("strong-all-n100", "scratch-strong"), ("scratch-strong", None)])
def test_encoders_are_named_by_the_part_before_the_first_hyphen(variant, expected):
    table = ["bns", "bns-ipdpp", "bns-strong", "scratch-strong", "scratch-cross_entropy"]
    assert encoder_of(variant, table) == expected
    with pytest.raises(KeyError):
        encoder_of("eq12-ipdpp", table)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_scripts_know_all_flags(dataset):
    for command in commands("--runs", "*", "--imbalanced_factor", "50", dataset=dataset).values():
        script, *flags = command.split()
        parser = importlib.import_module(script.removesuffix(".py")).get_args_parser()
        args = parser.parse_args(flags)
        assert args.imbalanced_factor == 50 and args.resume[0] == "auto"


def test_what_is_left_and_that_it_is_not_repeated(study, tmp_path):
    options = "--runs", "bns bns-ipdpp scratch-uniform", "--seeds", "42"
    names = ["bns-seed0", "bns-ipdpp-seed42", "scratch-uniform-seed42"]
    assert study(*options) == (0, names)
    assert (tmp_path / "calls").read_text().splitlines()[1] == (
        "--imbalanced_factor 100 --model cifar_resnet32 --eval_freq 10 --seed 42 --resume auto "
        "output_dir/results/bns-seed0/pretrain_bns_cifar10_if100.pth "
        "--data_root /data --output_dir output_dir/results/bns-ipdpp-seed42")
    assert {path.stem for path in (tmp_path / "results").glob("*.txt")} == set(names)
    noted = (tmp_path / "results" / "commands").read_text()
    assert [PART.fullmatch(line)[1] for line in noted.splitlines()] == names
    assert " s on 1 core, commit abc1234)" in noted and "/data" not in noted and "output_dir" not in noted
    assert study(*options) == (0, [])


def test_stopped_and_killed_parts_go_on_and_are_noted(study, tmp_path):
    assert study("--runs", "bns", STOP="bns-seed0") == (143, ["bns-seed0"])
    results, folder = tmp_path / "results", tmp_path / "output_dir" / "results"
    assert not (results / "bns-seed0.txt").exists()
    # The next part is killed with the script, 100 s after its start, when it has just written its log.
    now, command = int(time.time()), PART.fullmatch((results / "commands").read_text().strip())[2]
    (folder / "bns-seed0.began").write_text(f"{now - 100}\n2 core, commit abc1234\n{command}\n")
    os.utime(folder / "bns-seed0" / "log.txt", (now - 1, now - 1))
    assert study("--runs", "bns") == (0, ["bns-seed0"])
    parts = [PART.fullmatch(line).groups() for line in (results / "commands").read_text().splitlines()]
    assert [part[-1] for part in parts] == [", stopped", ", stopped", None]
    assert parts[1][2:5] == ("99", "2", "core")
    assert (results / "bns-seed0.txt").exists() and not list(folder.glob("*.began"))


@pytest.mark.slow
def test_time_on_cores_is_what_was_computed_and_elsewhere_what_passed(study, tmp_path):
    study("--runs", "scratch-uniform", "--seeds", "1", WORK="1.5")
    study("--runs", "scratch-uniform", "--seeds", "2", SLEEP="2.5")
    study("--runs", "scratch-uniform", "--seeds", "3", "--hardware", "1 H100", SLEEP="2.5")
    lines = (tmp_path / "results" / "commands").read_text().splitlines()
    worked, slept, passed = (int(PART.fullmatch(line)[3]) for line in lines)
    assert worked >= 1 and slept < 2 <= passed


def test_other_flags_than_those_noted_are_refused(study):
    assert study("--runs", "bns", "--stage1_flags", "--epochs 200", STOP="bns-seed0")[0] == 143
    for _ in range(2):  # of a stopped run and of a finished one
        status, done = study("--runs", "bns", "--stage1_flags", "--epochs 1000")
        assert status and done == []
        assert study("--runs", "bns", "--stage1_flags", "--epochs 200")[0] == 0


def test_a_run_that_began_with_a_mistake_can_be_given_again_without_it(study, tmp_path):
    assert study("--runs", "bns", "--stage1_flags", "--epoch 1", WRONG="bns-seed0")[0] == 2
    assert not (tmp_path / "results" / "commands").exists()
    assert study("--runs", "bns", "--stage1_flags", "--epochs 1")[0] == 0


def test_runs_that_cannot_be_had_are_passed_over(study, tmp_path):
    assert study("--runs", "bns-ipdpp scratch-uniform", "--seeds", "42") == (0, ["scratch-uniform-seed42"])
    with open(tmp_path / "output_dir" / "results" / "bns-seed0.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = study("--runs", "bns scratch-cross_entropy", "--seeds", "42")
    assert done == (0, ["scratch-cross_entropy-seed42"])
