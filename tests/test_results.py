"""benchmarks/study/tables.py and weights.py, and that the documents state what the logs in results/ say."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run

from benchmarks.study import tables, weights
from benchmarks.study.logs import Study

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted(path.parent for path in ROOT.glob("results/*/commands"))
DOCUMENTS = ["README.md", "RESULTS.md"]
FIGURE = re.compile(r"[+-]?\d+\.\d+(?: \([+-].*?\))?|\d+(?= points)")  # such as 77.2 or -1.0 (-1.9 to +0.0)


def write_log(folder, name, figures, epochs=2, images=1000, cost="(1800 s on 1 core, commit abc1234)"):
    """A log whose last epoch has `figures`, and its line in `commands`."""
    folder.mkdir(exist_ok=True)
    records = [{"epoch": epoch, "train_images": images} for epoch in range(epochs)]
    records[-1].update(figures)
    (folder / f"{name}.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    with open(folder / "commands", "a") as commands:
        commands.write(f"{name}: main_x.py --lr 1 {cost}\n")


def evaluated(overall, adjusted=None, medium=0.5, **more):
    """Figures of an evaluated epoch; few-shot accuracy is half of the overall one, many-shot its double."""
    record = {"test_acc1": overall, "test_many": overall / 50, "test_medium": medium, "test_few": overall / 200}
    if adjusted is not None:
        record |= {"test_adjusted_acc1": adjusted, "test_adjusted_many": adjusted / 100, "test_adjusted_medium": medium,
                   "test_adjusted_few": adjusted / 100}
    return record | more


@pytest.fixture
def folder(tmp_path):
    """A stage 1 in two parts, two variants from it, a run and plain training on GPUs, and a chain of encoders."""
    folder = tmp_path / "cifar10_if100"
    shots = {"knn_acc1": 30.0, "knn_many": 0.4, "knn_medium": None, "knn_few": 0.1}
    write_log(folder, "bns-seed0", shots, 4, 12_000, "(3600 s on 1 core, commit abc1234, stopped)")
    with open(folder / "commands", "a") as commands:
        commands.write("bns-seed0: main_x.py --lr 1 (3600 s on 1 core, commit def5678 with changes)\n")
    for seed, ours, theirs in ((42, 40, 39), (43, 42, 40), (44, 44, 44)):
        draws = [{"class": c, "drawn_mean_p": 0.4, "left_mean_p": 0.6, "drawn_margin": -1.0, "left_margin": 1.0}
                 for c in range(5)]
        write_log(folder, f"bns-ipdpp-seed{seed}", evaluated(ours, ours + 10, drawn=draws))
        hardware = "2 H100" if seed == 44 else "1 core"
        write_log(folder, f"bns-uniform-seed{seed}", evaluated(theirs, theirs + 10),
                  cost=f"(1800 s on {hardware}, commit abc1234)")
    for seed in (42, 43):
        write_log(folder, f"scratch-cross_entropy-seed{seed}", evaluated(seed, seed + 1), images=1_500_000,
                  cost="(900 s on 2 H100, commit abc1234)")
    write_log(folder, "bns-strong-seed42", evaluated(20, medium=None))
    write_log(folder, "bns_strong-ipdpp-seed42", evaluated(30))
    return folder


def test_tables(folder):
    tables.write(folder)
    lines = (folder / "README.md").read_text().splitlines()
    for line in (
        # 2 epochs of 1000 images after 4 of 12,000 in two views: 98,000; half an hour after two hours.
        "| bns-ipdpp | 3 | 84.0 ± 4.0 | 50.0 ± 0.0 | 21.0 ± 1.0 | 42.0 ± 2.0 "
        "| 52.0 ± 2.0 | 50.0 ± 0.0 | 52.0 ± 2.0 | 52.0 ± 2.0 | 98 k | 2.50 |",
        # As much, since only the two runs on a core count.
        "| bns-uniform | 3 | 82.0 ± 5.3 | 50.0 ± 0.0 | 20.5 ± 1.3 | 41.0 ± 2.6 "
        "| 51.0 ± 2.6 | 50.0 ± 0.0 | 51.0 ± 2.6 | 51.0 ± 2.6 | 98 k | 2.50 |",
        # Another 2000 and half an hour through the chain.
        "| bns_strong-ipdpp | 1 | 60.0 | 50.0 | 15.0 | 30.0 | – | – | – | – | 100 k | 3.00 |",
        "| scratch-cross_entropy | 2 | 85.0 ± 1.4 | 50.0 ± 0.0 | 21.2 ± 0.4 | 42.5 ± 0.7 "
        "| 43.5 ± 0.7 | 50.0 ± 0.0 | 43.5 ± 0.7 | 43.5 ± 0.7 | 3.00 M | 0.50 H100 |",
        "| bns-ipdpp against bns-uniform | plain | 3 pairs | +2.0 (-3.0 to +7.0) | +0.0 | +0.5 (-0.7 to +1.7) "
        "| +1.0 (-1.5 to +3.5) |",
        "| bns-ipdpp | adjusted against plain | 3 pairs | -32.0 (-37.0 to -27.0) | +0.0 | +31.0 (+28.5 to +33.5) "
        "| +10.0 |",
        "| bns | 4 | 40.0 | – | 10.0 | 30.0 | 96 k | 2.00 |",
        "| bns-seed0 | 4 | 2.00 | abc1234, def5678 with changes | `main_x.py --lr 1` |",
    ):
        assert line in lines, line
    order = [line.split()[1] for line in lines if line.startswith("| ")]
    assert order.index("scratch-cross_entropy") < order.index("bns-ipdpp") < order.index("bns-uniform")
    for name in ("cost.png", "knn.png", "draws.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_stage_1_alone(tmp_path):
    write_log(tmp_path / "study", "bns-seed0", {"knn_acc1": 30.0})
    tables.write(tmp_path / "study")
    assert "| bns | 2 | – | – | – | 30.0 | 4 k | 0.50 |" in (tmp_path / "study" / "README.md").read_text()


def test_what_is_compared():
    cost = dict.fromkeys(("bns-ipdpp", "bns-uniform", "bns-ipdpp-n100", "scratch-cross_entropy"), 2)
    cost |= {"scratch-strong": 2.5, "scratch-strong-e450": 5, "bns-strong-e90": 5.4, "bns-ipdpp-strong": 4.6,
             "strong-ipdpp": 3, "strong-ipdpp-adjusted_loss": 3}
    study = SimpleNamespace(later=list(cost), cost=lambda variant: {"core": cost[variant]})
    assert set(tables.comparisons(study)) == {
        ("bns-ipdpp", "bns-uniform"), ("bns-ipdpp-n100", "bns-ipdpp"), ("bns-ipdpp-strong", "bns-ipdpp"),
        ("bns-ipdpp-strong", "strong-ipdpp"), ("strong-ipdpp-adjusted_loss", "strong-ipdpp"),
        ("scratch-strong-e450", "scratch-strong"),
        ("scratch-cross_entropy", "scratch-strong"),
        # With plain training by the same recipe and of nearly the same cost.
        ("bns-ipdpp", "scratch-cross_entropy"), ("bns-uniform", "scratch-cross_entropy"),
        ("bns-ipdpp-n100", "scratch-cross_entropy"), ("bns-strong-e90", "scratch-strong-e450"),
        ("bns-ipdpp-strong", "scratch-strong-e450"), ("strong-ipdpp", "scratch-strong"),
    }


def test_intervals():
    # Differences 1, 2, 0: mean 1, deviation 1, t(2) = 4.3027.
    half = 4.3027 / 3 ** 0.5
    assert tables.compare([70, 72, 74], [69, 70, 74], True) == pytest.approx((1, 1 - half, 1 + half), abs=1e-3)
    # Variances 1 and 1, three runs each: error sqrt(2/3), t(4) = 2.7764.
    half = 2.7764 * (2 / 3) ** 0.5
    assert tables.compare([1, 2, 3], [3, 4, 5], False) == pytest.approx((-2, -2 - half, -2 + half), abs=1e-3)
    # Variances 1 and 8 of 3 and 2 runs: parts 1/3 and 4, so 1.17 degrees of freedom (Welch and Satterthwaite).
    freedom = (13 / 3) ** 2 / (1 / 18 + 16)
    half = tables.stats.t.ppf(0.975, freedom) * (13 / 3) ** 0.5
    assert tables.compare([1, 2, 3], [0, 4], False) == pytest.approx((0, -half, half))
    for case in (([3], [1], True), ([3, 4], [1], False), ([60, 60], [59, 59], True), ([60, 60], [59, 59], False)):
        assert np.isnan(tables.compare(*case)[1:]).all()  # no deviation is no certainty


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_readme_of_a_study_is_what_its_logs_say(folder):
    assert (folder / "README.md").read_text() == tables.readme(Study(folder))


def tables_of(path):
    """The tables of a Markdown file, each as the line above it and its rows, dicts from the header to the cells."""
    for above, table in re.findall(r"^(.*)\n((?:\|.*\n)+)", path.read_text(), re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        yield above, [dict(zip(header, row, strict=True)) for row in rows]


def rows_of(path):
    return [row for _, rows in tables_of(path) for row in rows]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_of_the_documents_are_those_of_the_studies(document):
    """A table of variants or differences has rows and columns of those that the line above it names.

    Where that line names several, each with a label, as `<!-- 10: results/FOLDER/README.md`, the label begins the names
    of that study's columns, which may be empty. Rows in italics are figures of others.
    """
    for above, rows in tables_of(ROOT / document):
        sources = re.findall(r"(\d+: |)(results/\S+/README.md)", above)
        assert sources or not {"variant", "difference"} & rows[0].keys(), rows[0]
        for label, readme in sources:
            theirs = rows_of(ROOT / readme)
            for row in rows:
                ours = {name.removeprefix(label): cell for name, cell in row.items()
                        if name.startswith(label) or ":" not in name}
                of_others = next(iter(ours.values())).startswith("*")
                absent = not any(cell for name, cell in row.items() if name.startswith(label))
                assert of_others or absent or any(ours.items() <= other.items() for other in theirs), row


@pytest.mark.parametrize("document", DOCUMENTS)
def test_figures_in_prose_are_those_of_the_variants_that_the_sentence_names(document):
    """In backticks. A figure begins a cell in the rows of these variants or of their differences, or is all of it."""
    rows = [row for folder in STUDIES for row in rows_of(folder / "README.md")]
    text = re.sub(r"```.*?```|<!--.*?-->|\]\(\S*\)", "", (ROOT / document).read_text(), flags=re.DOTALL)
    text = re.sub(r"^(\||    ).*", "", text, flags=re.MULTILINE)  # tables, formulas
    for sentence in re.split(r"(?<=[.?!])\s+|\n\n", text):
        named, known = set(re.findall(r"`(\S+?)`", sentence)), set()
        for name, *cells in map(dict.values, rows):
            if named.issuperset(name.split(" against ")):
                known.update(cells, (cell.split(" ")[0] for cell in cells))
        assert known.issuperset(FIGURE.findall(re.sub(r"`.*?`", "", " ".join(sentence.split())))), sentence


@pytest.mark.slow
def test_exported_weights_evaluate_alike(tmp_path):
    script, small = "main_cifar10_finetune_ipdpp", tmp_path / "small.pth"
    full = tmp_path / "finetune_ipdpp_cifar10_if100.pth"
    run(script, tmp_path, "--epochs", 1, "--num_samples", 5)
    weights.export(full, small)
    saved = torch.load(small, weights_only=True)
    assert set(saved) == {"model", "epoch", "args"} and saved["epoch"] == 0
    assert str(tmp_path) not in str(saved["args"]) and {"model", "num_samples", "stage"} <= saved["args"].keys()
    assert run(script, tmp_path, "--eval", full) == run(script, tmp_path, "--eval", small)
