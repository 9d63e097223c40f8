"""The tools that turn logs into RESULTS.md: tables and statistics, figures, exported weights."""
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import export_weights  # noqa: E402
import plot_results  # noqa: E402
from study_logs import Study, compare, standard_error  # noqa: E402

from util.checkpoint import load_checkpoint  # noqa: E402
from util.errors import UserError  # noqa: E402

TOY = ["--toy_data", "--model", "test_resnet", "--input_size", "16", "--device", "cpu"]


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
