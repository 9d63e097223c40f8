"""The tools that turn logs into RESULTS.md: the recipe of runs, tables and statistics, figures, exported weights."""
import fcntl
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import export_weights  # noqa: E402
import plot_results  # noqa: E402
from study import PART, Study, compare, standard_error  # noqa: E402

from util.checkpoint import load_checkpoint  # noqa: E402
from util.errors import UserError  # noqa: E402

TOY = ["--toy_data", "--model", "test_resnet", "--input_size", "16", "--device", "cpu"]
CORE = ["bns-seed0", *(f"bns-{name}-seed{seed}" for name in ("probe", "ipdpp", "uniform") for seed in (42, 43, 44)),
        "bns-no_sampling-seed42", "bns-no_sampling-seed43", *(f"scratch-uniform-seed{seed}" for seed in (42, 43, 44)),
        "scratch-cross_entropy-seed42", "scratch-cross_entropy-seed43"]


# ---------------------------------------------------------------------------------------------- statistics


def test_interval_of_pairs():
    # Differences 1, 2, 0: mean 1, deviation 1, t(2) = 4.3027. With 10 pairs (t(9) = 2.262 and 0.883) the two quantiles
    # add up to 3.145, times 1 / sqrt(10) 0.995; with 9 (2.306 and 0.889) to 1.065, more than the difference.
    assert compare([70, 72, 74], [69, 70, 74], True) == pytest.approx((1, 4.3027 / 3 ** 0.5, 10), abs=1e-3)


def test_interval_of_two_samples():
    # Variances 1 and 1, three runs each: error sqrt(2/3), t(4) = 2.7764. With 6 runs each (t(10) = 2.228 and 0.879)
    # 3.107 * sqrt(1/3) = 1.79 is below the difference of 2, with 5 (t(8)) 3.195 * sqrt(2/5) = 2.02 is not.
    assert compare([1, 2, 3], [3, 4, 5], False) == pytest.approx((-2, 2.7764 * (2 / 3) ** 0.5, 6), abs=1e-3)
    # Variances 1 and 8 of 3 and 2 runs: parts 1/3 and 4.
    error, freedom = standard_error([1, 8], [3, 2])
    assert error == pytest.approx((13 / 3) ** 0.5) and freedom == pytest.approx((13 / 3) ** 2 / (1 / 18 + 16))


def test_differences_without_an_interval_or_without_an_end():
    assert compare([3], [1], True)[0] == 2 and np.isnan(compare([3], [1], True)[1:]).all()
    assert np.isnan(compare([3, 4], [1], False)[1:]).all()
    assert compare([1, 2, 3], [3, 2, 1], True)[2] == np.inf
    for paired in (True, False):  # no deviation is no certainty
        assert compare([60, 60], [59, 59], paired)[0] == 1 and np.isnan(compare([60, 60], [59, 59], paired)[1:]).all()
    cells = [plot_results.difference_cell(*compare(*case)) for case in (
        ([70, 72, 74], [69, 70, 74], True), ([3], [1], True), ([1, 2, 3], [3, 2, 1], True), ([np.nan], [np.nan], True),
        ([1, 2, 3], [11, 12, 13], False))]
    assert cells == ["+1.0 (-1.5 to +3.5; 10 would tell)", "+2.0 (no interval)",
                     "+0.0 (-5.0 to +5.0; over 1000 would tell)", "–", "-10.0 (-12.3 to -7.7)"]


# ---------------------------------------------------------------------------------------------- tables of a study


def write_log(folder, name, figures, epochs=2, images=1000, command="(1800 s on 1 core, commit abc1234)"):
    """A log whose last epoch has `figures`, and its line in `commands`."""
    folder.mkdir(exist_ok=True)
    records = [{"epoch": epoch, "train_loss": 1.0, "train_lr": 1e-3, "train_images": images} for epoch in range(epochs)]
    records[-1].update(figures)
    (folder / f"{name}.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    with open(folder / "commands", "a") as commands:
        commands.write(f"{name}: main_x.py --lr 1 {command}\n")


def evaluated(overall, adjusted=None, medium=0.5, **more):
    """Figures of an evaluated epoch; few-shot accuracy is half of the overall one, many-shot its double."""
    record = {"test_acc1": overall, "test_many": overall / 50, "test_medium": medium, "test_few": overall / 200}
    if adjusted is not None:
        record |= {"test_adjusted_acc1": adjusted, "test_adjusted_many": adjusted / 100, "test_adjusted_medium": medium,
                   "test_adjusted_few": adjusted / 100}
    return record | more


@pytest.fixture
def folder(tmp_path):
    """A study of a stage 1, two variants with three seeds, and one from scratch."""
    folder = tmp_path / "cifar10_if100"
    shots = {"knn_acc1": 30.0, "knn_many": 0.4, "knn_medium": None, "knn_few": 0.1}
    write_log(folder, "bns-seed0", shots, 4, 12_000, "(3600 s on 1 core, commit abc1234, stopped)")
    with open(folder / "commands", "a") as commands:
        commands.write("bns-seed0: main_x.py --lr 1 (3600 s on 1 core, commit def5678 with changes)\n")
    for seed, ours, theirs in ((42, 40, 39), (43, 42, 40), (44, 44, 44)):
        draws = [{"class": c, "mean_p": 0.5, "drawn_mean_p": 0.4, "left_mean_p": 0.6, "drawn_margin": -1.0,
                  "left_margin": 1.0} for c in range(5)]
        write_log(folder, f"bns-ipdpp-seed{seed}", evaluated(ours, ours + 10, drawn=draws))
        write_log(folder, f"bns-uniform-seed{seed}", evaluated(theirs, theirs + 10))
    for seed in (42, 43):
        write_log(folder, f"scratch-cross_entropy-seed{seed}", evaluated(seed, seed + 1), images=1_500_000,
                  command="(900 s on 2 H100, commit abc1234)")
    return folder


def test_tables(folder, capsys):
    plot_results.main(plot_results.argparse.Namespace(folder=folder))
    printed = capsys.readouterr().out.splitlines()
    # 2 epochs of 1000 images after 4 of 12,000 in two views: 98,000; half an hour after two hours.
    for line in (
        "| bns-ipdpp | 3 | 84.0 ± 4.0 | 50.0 ± 0.0 | 21.0 ± 1.0 | 42.0 ± 2.0 "
        "| 52.0 ± 2.0 | 50.0 ± 0.0 | 52.0 ± 2.0 | 52.0 ± 2.0 | 98 k | 2.50 |",
        "| scratch-cross_entropy | 2 | 85.0 ± 1.4 | 50.0 ± 0.0 | 21.2 ± 0.4 | 42.5 ± 0.7 "
        "| 43.5 ± 0.7 | 50.0 ± 0.0 | 43.5 ± 0.7 | 43.5 ± 0.7 | 3.00 M | 0.50 H100 |",
        "| bns-ipdpp against bns-uniform | plain | 3 pairs | +2.0 (-3.0 to +7.0; 10 would tell) "
        "| +0.0 (no interval) | +0.5 (-0.7 to +1.7; 10 would tell) "
        "| +1.0 (-1.5 to +3.5; 10 would tell) |",
        "| bns-ipdpp | adjusted against plain | 3 pairs | -32.0 (-37.0 to -27.0) "
        "| +0.0 (no interval) | +31.0 (+28.5 to +33.5) | +10.0 (no interval) |",
        "Parts of the runs were trained at several commits: abc1234, def5678 with changes.",
        "| bns | 4 | 40.0 | – | 10.0 | 30.0 | 96 k | 2.00 |",
    ):
        assert line in printed, line
    assert any(line.startswith("| bns-ipdpp against scratch-cross_entropy | adjusted | 3 and 2 |") for line in printed)
    order = [line.split()[1] for line in printed if line.startswith("| ")]
    assert order.index("scratch-cross_entropy") < order.index("bns-ipdpp") < order.index("bns-uniform")
    for name in ("accuracy.png", "knn.png", "draws.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and f"wrote {folder / name}" in printed


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
def test_tables_of_odd_studies(folder, tmp_path, capsys):
    write_log(folder, "bns-uniform-seed45", evaluated(40), epochs=1)  # shorter than its fellows
    write_log(folder, "bns-probe-seed42", {}, epochs=1)  # not evaluated yet
    write_log(folder, "bns-no_sampling-seed43", evaluated(20))
    write_log(folder, "eq12-ipdpp-seed42", evaluated(30, medium=None))  # one seed, an empty group, nothing adjusted
    write_log(folder, "scratch-uniform-seed42", evaluated(30), command="(1 s on 1 core, commit abc1234, stopped)")
    (folder / "scratch-adjusted_loss-seed42.txt").write_text("")
    plot_results.main(plot_results.argparse.Namespace(folder=folder))
    printed = capsys.readouterr().out
    for line in (
        "Shorter, so left out: bns-uniform-seed45, 1 of 2 epochs.",
        "Unfinished, so left out: bns-probe-seed42, 1 epochs.",
        "Unfinished, so left out: scratch-uniform-seed42, 2 epochs.",
        "Unfinished, so left out: scratch-adjusted_loss-seed42, 0 epochs.",
        "No finished stage 1 `eq12`: what it costs is missing in the rows of `eq12-...`.",
        "| eq12-ipdpp | 1 | 60.0 | – | 15.0 | 30.0 | – | – | – | – | 2 k | 0.50 |",
        "| bns-ipdpp against bns-no_sampling | plain | 1 pair | +44.0 (no interval) | +0.0 (no interval) "
        "| +11.0 (no interval) | +22.0 (no interval) |",
        "| eq12-ipdpp against scratch-cross_entropy | plain | 1 and 2 | -25.0 (no interval) | – "
        "| -6.2 (no interval) | -12.5 (no interval) |",
        "| eq12-ipdpp against bns-ipdpp | plain | 1 and 3 | -24.0 (no interval) | – | -6.0 (no interval) "
        "| -12.0 (no interval) |",
    ):
        assert line in printed, line
    assert "| bns-probe" not in printed and "| bns-uniform | 3 |" in printed and "| eq12-ipdpp | adj" not in printed

    for name in ("bns-seed0", "scratch-uniform-seed42"):  # a study with a stage 1 alone, and one that has nothing else
        alone = tmp_path / name
        alone.mkdir()
        (alone / f"{name}.txt").write_bytes((folder / f"{name}.txt").read_bytes())
        plot_results.main(plot_results.argparse.Namespace(folder=alone))
        assert "–" in capsys.readouterr().out  # no `commands`, so no hours
    with pytest.raises(UserError, match="found no"):
        plot_results.main(plot_results.argparse.Namespace(folder=tmp_path))


@pytest.mark.parametrize("name, text, found", [
    ("bns-seed0.txt", '{"epoch": 0, "train_images": 5}\n{"epoch": 1, "tra', "bns-seed0.txt, line 2: found '{"),
    ("bns-seed0.txt", "[1, 2]\n", "line 1: found '[1, 2]'"), ("bns-seed0.txt", '{"loss": 1}', "line 1"),
    ("bns-seed0.txt", "\x00\xff", "line 1"), ("bns-seed0-copy.txt", "", "expected VARIANT-seed<number>.txt")])
def test_files_that_are_no_logs_are_named(name, text, found, tmp_path):
    (tmp_path / name).write_text(text, encoding="latin1")
    with pytest.raises(UserError, match=re.escape(found)):
        Study(tmp_path)


def test_runs_evaluated_in_other_epochs(tmp_path, capsys):
    write_log(tmp_path, "scratch-uniform-seed42", evaluated(30), epochs=3)
    write_log(tmp_path, "scratch-uniform-seed43", evaluated(40), epochs=3)
    path = tmp_path / "scratch-uniform-seed43.txt"
    records = [json.loads(line) | evaluated(20) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_results.main(plot_results.argparse.Namespace(folder=tmp_path))
    assert "| scratch-uniform | 2 | 50.0 ± 14.1 |" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- tables of the documents


def rows_of(lines):
    """Rows of the Markdown table that `lines` begin with, as dicts from the header's names to the cells."""
    cells = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    assert cells, f"found '{lines[0]}', expected a table"
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def check_tables(document, root=ROOT):
    """Compare each table below a line `<!-- python benchmarks/plot_results.py FOLDER -->` with what that prints now.

    The document may leave out rows and columns, and add rows that begin in italics: figures of others. Returns how many
    rows were compared.
    """
    lines, compared = document.read_text().splitlines(), 0
    for number, line in enumerate(lines):
        marker = re.fullmatch(r"<!-- python benchmarks/plot_results.py (\S+) -->", line.strip())
        if not marker:
            continue
        printed = plot_results.tables(Study(root / marker[1])).splitlines()
        ours = [row for i in range(len(printed)) if printed[i].startswith("|") and not printed[i - 1].startswith("|")
                for row in rows_of(printed[i:])]
        for row in rows_of(lines[number + 1:]):
            if not next(iter(row.values())).startswith("*"):
                assert any(row.items() <= mine.items() for mine in ours), f"{marker[1]} has no row {row}"
                compared += 1
    return compared


def test_documents_state_what_the_logs_say():
    check_tables(ROOT / "README.md")
    assert check_tables(ROOT / "RESULTS.md") > 0


def test_altered_figures_are_found(folder):
    document = folder.parent / "RESULTS.md"
    marker = "<!-- python benchmarks/plot_results.py cifar10_if100 -->\n"
    tables = plot_results.tables(Study(folder)).split("\n\n")
    marked = [marker + table if table.startswith("|") else table for table in tables]
    document.write_text("\n\n".join(marked))
    assert check_tables(document, folder.parent) == 3 + 9 + 1
    published = (marker + "| variant | overall | overall adj. |\n|---|---|---|\n"
                 "| bns-ipdpp | 42.0 ± 2.0 | 52.0 ± 2.0 |\n| *paper* | *76.4* | |\n")
    document.write_text(published)
    assert check_tables(document, folder.parent) == 1
    for old, new in (("42.0 ±", "42.1 ±"), ("± 2.0", "± 2.1"), ("overall adj.", "few"), ("bns-ipdpp", "bns-uniform"),
                     ("*paper*", "paper"), ("| variant", "\n| variant")):
        document.write_text(published.replace(old, new, 1))
        with pytest.raises(AssertionError):
            check_tables(document, folder.parent)


# ---------------------------------------------------------------------------------------------- exported weights


def run_script(name, *arguments):
    module = importlib.import_module(name)
    return module.main(module.get_args_parser().parse_args([*TOY, *map(str, arguments)]))


@pytest.mark.slow
def test_exported_weights_evaluate_alike(tmp_path, capsys):
    script, name = "main_cifar10_finetune_ipdpp", "finetune_ipdpp_cifar10_if100.pth"
    run_script(script, "--epochs", 1, "--num_samples", 5, "--output_dir", tmp_path / "run")
    full, folder = tmp_path / "run" / name, tmp_path / "results"
    export_weights.main(export_weights.argparse.Namespace(files=[full], folder=folder))
    small = folder / name
    assert set(torch.load(small, weights_only=True)) == {"model", "epoch", "args"}
    before, after = load_checkpoint(full), load_checkpoint(small)
    assert after["epoch"] == 0 and before["model"].keys() == after["model"].keys()
    assert all(torch.equal(before["model"][key], after["model"][key]) for key in before["model"])
    assert before["args"].keys() - after["args"].keys() == before["args"].keys() & set(export_weights.OF_A_MACHINE)
    assert str(tmp_path) not in str(after["args"]) and {"model", "num_samples", "stage"} <= after["args"].keys()
    assert small.stat().st_size < full.stat().st_size / 2

    capsys.readouterr()
    printed = []
    for path in (full, small):
        run_script(script, "--eval", path)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "Acc@1" in printed[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/*_if*.pth")), ids=lambda path: path.name)
def test_weights_in_results_reach_what_a_log_beside_them_says(path, cifar_root):
    trained = load_checkpoint(path)["args"]
    script = importlib.import_module(f"main_{trained['dataset']}_{trained['stage']}")
    figures = script.main(script.get_args_parser().parse_args(["--data_root", cifar_root, "--eval", str(path)]))
    name = "knn_acc1" if trained["stage"] == "pretrain_bns" else "test_acc1"
    logs = path.parent.glob(f"*-seed{trained['seed']}.txt")
    last = [json.loads(log.read_text().splitlines()[-1]).get(name, np.nan) for log in logs]
    # Within what another processor's arithmetic may change.
    assert np.nanmin(np.abs(np.subtract(last, figures[name]))) <= 0.2


def test_what_is_no_final_file_is_refused(tmp_path):
    flags = {"stage": "pretrain_bns", "dataset": "cifar10"}
    state = {"model": {"w": torch.zeros(1)}, "epoch": 0, "args": flags}
    for name in ("checkpoint-0.pth", "pretrain_bns_cifar10_if100.pth"):  # the second, into its own folder
        torch.save(state, tmp_path / name)
        with pytest.raises(UserError, match="expected (a|none)"):
            export_weights.main(export_weights.argparse.Namespace(files=[tmp_path / name], folder=tmp_path))
        assert torch.load(tmp_path / name, weights_only=True)["args"] == flags
    files = [tmp_path / "pretrain_bns_cifar10_if100.pth", tmp_path / "checkpoint-0.pth"]
    for folder in (tmp_path / "new", tmp_path / "checkpoint-0.pth"):
        with pytest.raises(UserError, match="expected a"):
            export_weights.main(export_weights.argparse.Namespace(files=files, folder=folder))
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------- the recipe of the runs


# Takes the place of python: notes the command, and leaves what a run leaves; stops early where STOP names a run.
STUB = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
[[ $1 == main_* ]] || exit 0
folder="${@: -1}"
mkdir -p "$folder"
[[ $folder == */${WRONG:-none} ]] && exit 2
echo '{"epoch": 0}' > "$folder/log.txt"
[[ $folder == */${STOP:-none} ]] && exit 143
[[ $1 =~ main_(cifar[0-9]+)_(.*).py ]] && touch "$folder/${BASH_REMATCH[2]}_${BASH_REMATCH[1]}_if$3.pth"
"""


@pytest.fixture
def protocol(tmp_path, monkeypatch):
    """A function that calls protocol.sh with a stub for python: its result, with the commands in `calls`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)

    def call(dataset="cifar10", folder="results/cifar10_if100", flags=(), **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "OUT": str(tmp_path / "out"), "CALLS": str(calls),
               "OMP_NUM_THREADS": "1", **variables}
        command = ["bash", "benchmarks/protocol.sh", dataset, "/data", tmp_path / folder, *flags]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        done.calls = [line for line in calls.read_text().splitlines() if line.startswith("main_")]
        return done
    return call


def names(calls):
    return [Path(call.split()[-1]).name for call in calls]


def test_core_runs(protocol, tmp_path):
    done = protocol(flags=["--model", "cifar_resnet32"], BNS="--epochs 200")
    assert done.returncode == 0, done.stderr
    assert names(done.calls) == CORE
    out = f"{tmp_path}/out/{tmp_path}/results/cifar10_if100"
    by_name = dict(zip(names(done.calls), done.calls, strict=True))
    common = "--imbalanced_factor 100 --model cifar_resnet32"
    assert by_name["bns-seed0"] == (f"main_cifar10_pretrain_bns.py {common} --seed 0 --epochs 200 --resume auto "
                                    f"--data_root /data --output_dir {out}/bns-seed0")
    start = f"--resume auto {out}/bns-seed0/pretrain_bns_cifar10_if100.pth"
    assert by_name["bns-no_sampling-seed43"] == (
        f"main_cifar10_finetune_ipdpp.py {common} --eval_freq 10 --ipdpp_sampler none --epochs 27 --seed 43 {start} "
        f"--data_root /data --output_dir {out}/bns-no_sampling-seed43")
    assert "--epochs" not in by_name["bns-ipdpp-seed42"]
    assert f"--resume auto {out}" not in by_name["scratch-uniform-seed42"]

    results = tmp_path / "results" / "cifar10_if100"
    assert {path.stem for path in results.glob("*.txt")} == set(CORE)
    commands = (results / "commands").read_text()
    assert [PART.fullmatch(line)[1] for line in commands.splitlines()] == CORE
    assert str(tmp_path) not in commands and "/data" not in commands
    assert "--resume auto bns-seed0/pretrain_bns_cifar10_if100.pth (" in commands
    assert " s on 1 core, commit " in commands
    assert protocol().calls == []  # all are done


@pytest.mark.parametrize("flags, epochs", [("", 2027), ("--lr 1 --epochs 200", 427), ("--warmup_epochs 9", 2027)])
def test_plain_training_of_the_same_length(flags, epochs, protocol):
    # Two views an epoch of stage 1, then as many images as 27 epochs on all of them.
    done = protocol(RUNS="scratch-cross_entropy-as_long", BNS=flags)
    assert len(done.calls) == 2 and all(f"--ipdpp_sampler none --epochs {epochs} " in call for call in done.calls)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_scripts_know_all_flags(dataset, protocol):
    done = protocol(dataset, f"results/{dataset}_if50", IF="50", RUNS="*", SEEDS="1")
    for call in done.calls:
        script, *flags = shlex.split(call)
        parser = importlib.import_module(script.removesuffix(".py")).get_args_parser()
        args = parser.parse_args(flags)
        assert args.imbalanced_factor == 50 and args.resume[0] == "auto"
    numbers = ("100", "200", "1000") if dataset == "cifar10" else ("10", "20", "100")
    assert names(done.calls)[-19:] == [
        *(f"bns-{sampler}-n{number}-seed1" for number in numbers for sampler in ("ipdpp", "uniform")),
        "scratch-cross_entropy-as_long-seed1",
        *(f"{name}-lr{lr}-seed1" for lr in ("0.00025", "0.001") for name in ("bns-ipdpp", "bns-uniform",
                                                                             "scratch-uniform")),
        "bns-ipdpp-n2_kernel-seed1", "bns-ipdpp-adjusted_loss-seed1", "scratch-adjusted_loss-seed1", "eq12-seed0",
        "eq12-probe-seed1", "eq12-ipdpp-seed1"]


def test_own_flags_of_a_variant_win(protocol):
    done = protocol(LATER="--lr 1", RUNS="scratch-uniform scratch-uniform-lr0.001", SEEDS="1")
    assert [re.findall(r"--lr (\S+)", call)[-1] for call in done.calls] == ["1", "0.001"]


def test_stopped_and_killed_runs_go_on_and_add_up_their_time(protocol, tmp_path):
    stopped = protocol(RUNS="bns", STOP="bns-seed0")
    results, folder = tmp_path / "results" / "cifar10_if100", tmp_path / f"out/{tmp_path}/results/cifar10_if100"
    assert stopped.returncode == 143 and not (results / "bns-seed0.txt").exists()
    # The next part is killed with the script, 100 s after its start, when it has just written its log.
    now, command = int(time.time()), re.search("main_.*(?= \\()", (results / "commands").read_text())[0]
    (folder / "bns-seed0.began").write_text(f"{now - 100}\n2 core, commit abc1234\n{command}\n")
    os.utime(folder / "bns-seed0.began", (now - 100, now - 100))
    os.utime(folder / "bns-seed0" / "log.txt", (now - 1, now - 1))
    assert protocol(RUNS="bns").returncode == 0
    parts = [PART.fullmatch(line).groups() for line in (results / "commands").read_text().splitlines()]
    assert [part[-1] for part in parts] == [", stopped", ", stopped", None]
    assert parts[1][:4] == ("bns-seed0", "99", "2", "core")
    assert (results / "bns-seed0.txt").exists() and not list(folder.glob("*.began"))


@pytest.mark.slow
def test_time_on_cores_is_what_was_computed_and_elsewhere_what_passed(protocol, tmp_path):
    stub = tmp_path / "bin" / "python"
    stub.write_text(stub.read_text().replace("mkdir", "sleep 2\nmkdir"))
    protocol(RUNS="scratch-uniform", SEEDS="1")
    protocol(RUNS="scratch-uniform", SEEDS="2", ON="1 H100")
    commands = (tmp_path / "results" / "cifar10_if100" / "commands").read_text()
    seconds = [int(PART.fullmatch(line)[2]) for line in commands.splitlines()]
    assert seconds[0] < 2 <= seconds[1]
    stub.write_text(stub.read_text().replace("sleep 2", "for ((i = 0; i < 2000000; i++)); do :; done"))
    protocol(RUNS="scratch-uniform", SEEDS="3")
    assert int(PART.fullmatch((tmp_path / "results/cifar10_if100/commands").read_text().splitlines()[-1])[2]) >= 1


@pytest.mark.slow
def test_other_flags_in_the_folder_of_a_run_are_refused(protocol, tmp_path):
    assert protocol(RUNS="bns", BNS="--epochs 200", STOP="bns-seed0").returncode == 143
    for _ in range(2):  # of a stopped run and of a finished one
        done = protocol(RUNS="bns", BNS="--epochs 1000")
        assert done.returncode == 2 and "bns-seed0 was run with other flags" in done.stderr and done.calls == []
        assert protocol(RUNS="bns", BNS="--epochs 200").returncode == 0


def test_a_run_that_began_with_a_mistake_can_be_given_again_without_it(protocol, tmp_path):
    assert protocol(RUNS="bns", BNS="--epoch 1", WRONG="bns-seed0").returncode == 2
    assert not (tmp_path / "results/cifar10_if100/commands").exists()
    assert protocol(RUNS="bns", BNS="--epochs 1").returncode == 0


def test_runs_that_cannot_be_had_are_passed_over(protocol, tmp_path):
    done = protocol(RUNS="bns-ipdpp-seed42 scratch-uniform", SEEDS="42")
    assert names(done.calls) == ["scratch-uniform-seed42"] and "bns-ipdpp-seed42: passed over: no" in done.stdout
    with open(tmp_path / f"out/{tmp_path}/results/cifar10_if100/bns-seed0.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = protocol(RUNS="bns scratch-cross_entropy", SEEDS="42")
    assert names(done.calls) == ["scratch-cross_entropy-seed42"] and "under way elsewhere" in done.stdout


def test_factors_seeds_and_mistakes(protocol):
    done = protocol(folder="results/cifar10_if{IF}_x", IF="10 100", RUNS="scratch-*", SEEDS="7 8 9")
    assert [call.split()[2] for call in done.calls] == ["10"] * 13 + ["100"] * 13
    for wrong in (dict(IF="10"), dict(dataset="cifar100"), dict(dataset="mnist"), dict(RUNS="bns bns-other"),
                  dict(ON="H100"), dict(ON="1.5 core")):
        done = protocol(**wrong)
        assert done.returncode == 2 and done.stderr.startswith("protocol.sh: ") and done.calls == []
