"""Write README.md of a study, with all its tables, and its pictures, from the logs that benchmarks/study/run.py keeps.

    python benchmarks/study/tables.py results/FOLDER
"""
import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
from scipy import stats  # dppy brings it

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.study import pictures  # noqa: E402
from benchmarks.study.logs import ADJUSTED, KNN, PLAIN, Study, accuracy, count, hours, traits  # noqa: E402

GROUPS = ("many", "medium", "few", "overall")
ABOUT = """\
Written by `python benchmarks/study/tables.py` from the logs beside it. `benchmarks/study/logs.py` explains the names of
variants, and the last table has the command of each run."""
ABOUT_ACCURACIES = """\
Test accuracy at the last epoch, in percent: mean ± sample deviation over the seeds. "adj." is that of the same weights
with adjusted logits. Images and core-hours are those of one run and of the encoder that it starts from. Each of the two
views of stage 1 counts as an image."""
ABOUT_DIFFERENCES = """\
Mean differences in points, with their 95 % intervals: Student's of pairs of runs with the same seed, else Welch's. Too
few runs give no interval. Compared are variants that differ in one respect, and each variant with that plain training
by the same recipe whose cost is nearest. Last comes what adjusted logits change. Each encoder was trained once, so an
interval holds for this encoder only. One interval in 20 misleads by chance."""
ABOUT_NEIGHBOURS = """\
Accuracy of a class-balanced vote of the nearest neighbours on the encoder's features along stage 1, in percent."""
ABOUT_DRAWS = "Means of p and margin over the images that were drawn and that were left, over the five largest classes:"


def readme(study):
    """The text of a study's README.md."""
    blocks = [f"# {study.folder.name}", ABOUT]
    if study.later:
        blocks += ["## Accuracy", ABOUT_ACCURACIES, accuracies(study), "![Accuracy against cost](./cost.png)",
                   "![Accuracy against images seen](./accuracy.png)", "## Differences", ABOUT_DIFFERENCES,
                   differences(study)]
    if study.stages1:
        blocks += ["## Stage 1", ABOUT_NEIGHBOURS, neighbours(study), "![kNN accuracy by epoch](./knn.png)"]
    if study.records_with("drawn"):
        blocks += ["## Draws", ABOUT_DRAWS, "![p and margin of drawn and left images](./draws.png)"]
    return "\n\n".join([*blocks, "## Runs", runs(study)]) + "\n"


def markdown(header, rows):
    """A table as text. header: names; rows: lists of as many texts."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def accuracies(study):
    rows = []
    for variant in study.later:
        cells = [mean_and_deviation(study.last(variant, group, kind)) for kind in (PLAIN, ADJUSTED) for group in GROUPS]
        images = study.images_before(variant) + study.images(variant)[-1]
        rows.append([variant, str(len(study.runs[variant])), *cells, count(images), hours(study.cost(variant))])
    return markdown(["variant", "runs", *GROUPS, *(f"{group} adj." for group in GROUPS), "images", "core-hours"], rows)


def differences(study):
    rows = []
    for ours, theirs in comparisons(study):
        paired = traits(ours)["encoder"] == traits(theirs)["encoder"]
        kinds = [(PLAIN, PLAIN, "plain"), (ADJUSTED, ADJUSTED, "adjusted")]
        if "adjusted_loss" in ours and "adjusted_loss" not in theirs:  # that loss leaves nothing to adjust
            kinds = [(PLAIN, ADJUSTED, "plain against adjusted")]
        for our_kind, their_kind, figures in kinds:
            rows.append([f"{ours} against {theirs}", figures,
                         *difference_cells(study, (ours, our_kind), (theirs, their_kind), paired)])
    for variant in study.later:
        rows.append([variant, "adjusted against plain",
                     *difference_cells(study, (variant, ADJUSTED), (variant, PLAIN), paired=True)])
    rows = [row for row in rows if set(row[3:]) != {"–"}]
    return markdown(["difference", "figures", "runs", *GROUPS], rows)


def comparisons(study):
    """Pairs of variants that are compared. The one with more in its name comes first, plain training last."""
    def order(variant):
        return is_plain(variant), -len(variant.split("-")), variant

    wanted = []
    for ours in sorted(study.later, key=order):
        wanted += [(ours, theirs) for theirs in study.later
                   if order(ours) < order(theirs) and number_of_differences(traits(ours), traits(theirs)) == 1]
        same_recipe = [theirs for theirs in study.later if is_plain(theirs) and not is_plain(ours) and all(
            traits(ours).get(name) == traits(theirs).get(name) for name in ("recipe", "adjusted_loss"))]
        if same_recipe:
            nearest = min(same_recipe, key=lambda theirs: abs(total(study.cost(theirs)) - total(study.cost(ours))))
            wanted += [(ours, nearest)]
    return list(dict.fromkeys(wanted))


def is_plain(variant):
    """Whether it is plain training: from scratch, on all images."""
    return traits(variant)["encoder"] == "scratch" and "images" not in traits(variant)


def number_of_differences(ours, theirs):
    return sum(ours.get(name) != theirs.get(name) for name in ours | theirs)


def total(cost):
    return sum(cost.values())


def difference_cells(study, ours, theirs, paired):
    """Number of runs, and a difference per group. ours, theirs: (variant, PLAIN or ADJUSTED)."""
    samples = [study.runs[variant] for variant, _ in (ours, theirs)]
    if paired:
        seeds = [seed for seed in samples[0] if seed in samples[1]]
        samples = [{seed: sample[seed] for seed in seeds} for sample in samples]
        number = "1 pair" if len(seeds) == 1 else f"{len(seeds)} pairs"
    else:
        number = f"{len(samples[0])} and {len(samples[1])}"
    cells = []
    for group in GROUPS:
        values = [[accuracy(records[-1], group, kind) for records in sample.values()]
                  for sample, (_, kind) in zip(samples, (ours, theirs), strict=True)]
        cells.append(difference_cell(*compare(*values, paired)) if values[0] else "–")
    return [number, *cells]


def compare(ours, theirs, paired):
    """Mean difference of two samples and its 95 % interval: (difference, low, high).

    The interval is Student's of the pairs, or Welch's. Its ends are nan where no deviation can be estimated: there are
    too few runs, or all differ by the same.
    """
    difference, samples = np.mean(ours) - np.mean(theirs), [ours, theirs]
    if paired:
        samples = [np.subtract(ours, theirs)]
    if min(map(len, samples)) < 2 or all(np.allclose(sample, sample[0]) for sample in samples):
        return difference, np.nan, np.nan
    with warnings.catch_warnings(action="ignore"):  # two equal figures in one of two samples are no trouble
        test = stats.ttest_1samp(samples[0], 0) if paired else stats.ttest_ind(ours, theirs, equal_var=False)
    return difference, *test.confidence_interval()


def neighbours(study):
    rows = []
    for variant in study.stages1:
        records, images = next(iter(study.runs[variant].values())), study.images(variant)
        for record in records:
            if KNN + "acc1" in record:
                cells = [mean_and_deviation([accuracy(record, group, KNN)]) for group in GROUPS]
                cost = hours(study.cost(variant)) if record is records[-1] else ""
                rows.append([variant, str(record["epoch"] + 1), *cells, count(images[record["epoch"]]), cost])
    return markdown(["stage 1", "epochs", *GROUPS, "images", "core-hours"], rows)


def runs(study):
    """What each run cost and was: its own hours, without those of its encoder; the commits that its parts ran by."""
    rows = []
    for variant, by_seed in study.runs.items():
        for seed, records in by_seed.items():
            name = f"{variant}-seed{seed}"
            rows.append([name, str(len(records)), hours(study.hours[name]), ", ".join(study.commits[name]),
                         f"`{study.commands[name]}`"])
    return markdown(["run", "epochs", "core-hours", "commits", "command"], rows)


def mean_and_deviation(values):
    if np.isnan(values).any():
        return "–"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def difference_cell(difference, low, high):
    if np.isnan(difference):
        return "–"
    return f"{difference:+.1f}" + ("" if np.isnan(low) else f" ({low:+.1f} to {high:+.1f})")


def write(folder):
    """Write README.md and the pictures of a study into its folder."""
    study = Study(folder)
    (folder / "README.md").write_text(readme(study))
    pictures.draw(study)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
