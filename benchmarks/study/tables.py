"""Write README.md of a study, with all its tables, and its pictures, from the logs that benchmarks/study/run.py keeps.

    python benchmarks/study/tables.py results/FOLDER
"""
import sys
import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats  # dppy brings it

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.study import pictures  # noqa: E402
from benchmarks.study.logs import ADJUSTED, KNN, PLAIN, Study, accuracy, traits  # noqa: E402

GROUPS = ("many", "medium", "few", "overall")
ABOUT = """\
Written by `python benchmarks/study/tables.py` from the logs beside it. `benchmarks/study/logs.py` explains the names of
variants, and the last table has the command of each run."""
ABOUT_ACCURACIES = """\
Test accuracy at the last epoch, in percent: mean ± sample deviation over the seeds. "adj." is that of the same weights
with adjusted logits. Images and core-hours are those of one run and of the encoder that it starts from. Each of the two
views of stage 1 counts as an image. Where only some runs had a GPU, the core-hours are those of the others."""
ABOUT_DIFFERENCES = """\
Mean differences in points, with their 95 % intervals: Student's of pairs of runs with the same seed, else Welch's.
Compared are variants that differ in one respect, each with the plain training by the same recipe whose cost is nearest,
and adjusted with plain figures. Encoders are trained once, so an interval holds for its encoder; one in 20 misleads."""
ABOUT_NEIGHBOURS = "Accuracy of a class-balanced vote of the nearest neighbours on the encoder's features, in percent."
ABOUT_DRAWS = "Means of p and margin over the images that were drawn and that were left, over the five largest classes:"


def readme(study):
    """The text of a study's README.md."""
    blocks = [f"# {study.folder.name}", ABOUT]
    if study.later:
        blocks += ["## Accuracy", ABOUT_ACCURACIES, accuracies(study), "![Accuracy against cost](./cost.png)",
                   "## Differences", ABOUT_DIFFERENCES, differences(study)]
    if study.stages1:
        blocks += ["## Stage 1", ABOUT_NEIGHBOURS, neighbours(study), "![kNN accuracy by epoch](./knn.png)"]
    if study.records_with("drawn"):
        blocks += ["## Draws", ABOUT_DRAWS, "![p and margin of drawn and left images](./draws.png)"]
    return "\n\n".join([*blocks, "## Runs", runs(study)]) + "\n"


def markdown(header, rows):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def accuracies(study):
    rows = []
    for variant in study.later:
        cells = [mean_and_deviation(study.curves(variant, group, kind)[:, -1])
                 for kind in (PLAIN, ADJUSTED) for group in GROUPS]
        images, cost = millions(study.images_in_all(variant)), hours(study.cost(variant))
        rows.append([variant, str(len(study.runs[variant])), *cells, images, cost])
    return markdown(["variant", "runs", *GROUPS, *(f"{group} adj." for group in GROUPS), "images", "core-hours"], rows)


def differences(study):
    rows = []
    for ours, theirs in [*comparisons(study), *((variant, variant) for variant in study.later)]:
        name, kinds = f"{ours} against {theirs}", [(PLAIN, PLAIN, "plain"), (ADJUSTED, ADJUSTED, "adjusted")]
        if ours == theirs:
            name, kinds = ours, [(ADJUSTED, PLAIN, "adjusted against plain")]
        elif "adjusted_loss" in ours and "adjusted_loss" not in theirs:  # that loss leaves nothing to adjust
            kinds = [(PLAIN, ADJUSTED, "plain against adjusted")]
        rows += [[name, figures, *difference(study, (ours, our_kind), (theirs, their_kind))]
                 for our_kind, their_kind, figures in kinds]
    return markdown(["difference", "figures", "runs", *GROUPS], [row for row in rows if set(row[3:]) != {"–"}])


def comparisons(study):
    """Pairs of variants that are compared. The one with more in its name comes first, plain training last."""
    plain = [variant for variant in study.later
             if traits(variant)["encoder"] == "scratch" and "images" not in traits(variant)]
    ordered = sorted(study.later, key=lambda variant: (variant in plain, -len(variant.split("-")), variant))
    pairs = [(ours, theirs) for ours, theirs in combinations(ordered, 2) if len(differing_traits(ours, theirs)) == 1]
    for ours in ordered:
        distances = {theirs: abs(sum(study.cost(theirs).values()) - sum(study.cost(ours).values())) for theirs in plain
                     if ours not in plain and not differing_traits(ours, theirs) & {"recipe", "adjusted_loss"}}
        pairs += [(ours, min(distances, key=distances.get))] if distances else []
    return sorted(set(pairs), key=lambda pair: [ordered.index(variant) for variant in pair])


def differing_traits(ours, theirs):
    """Names of the traits in which two variants differ, a set."""
    return {name for name, _ in traits(ours).items() ^ traits(theirs).items()}


def difference(study, ours, theirs):
    """Number of runs, and a difference per group, as texts. ours, theirs: (variant, PLAIN or ADJUSTED)."""
    our_runs, their_runs = study.runs[ours[0]], study.runs[theirs[0]]
    paired = traits(ours[0])["encoder"] == traits(theirs[0])["encoder"]
    number = f"{len(our_runs)} and {len(their_runs)}"
    if paired:
        seeds = [seed for seed in our_runs if seed in their_runs]
        our_runs, their_runs = ({seed: runs[seed] for seed in seeds} for runs in (our_runs, their_runs))
        number = "1 pair" if len(seeds) == 1 else f"{len(seeds)} pairs"
    cells = []
    for group in GROUPS:
        values = [[accuracy(records[-1], group, kind) for records in runs.values()]
                  for runs, kind in ((our_runs, ours[1]), (their_runs, theirs[1]))]
        mean, low, high = compare(*values, paired) if values[0] else (np.nan, np.nan, np.nan)
        interval = "" if np.isnan(low) else f" ({low:+.1f} to {high:+.1f})"
        cells.append("–" if np.isnan(mean) else f"{mean:+.1f}{interval}")
    return [number, *cells]


def compare(ours, theirs, paired):
    """Mean difference of two samples, and the ends of its 95 % interval: Student's of the pairs, or Welch's.

    The ends are nan where no deviation can be estimated: there are too few runs, or all differ by the same.
    """
    mean = np.mean(ours) - np.mean(theirs)
    samples = [np.subtract(ours, theirs)] if paired else [ours, theirs]
    if min(map(len, samples)) < 2 or all(np.allclose(sample, sample[0]) for sample in samples):
        return mean, np.nan, np.nan
    with warnings.catch_warnings(action="ignore"):  # two equal figures in one of two samples are no trouble
        test = stats.ttest_1samp(samples[0], 0) if paired else stats.ttest_ind(ours, theirs, equal_var=False)
    return mean, *test.confidence_interval()


def neighbours(study):
    rows = []
    for variant in study.stages1:
        records, images = next(iter(study.runs[variant].values())), study.images(variant)
        for record in records:
            if KNN + "acc1" in record:
                cells = [mean_and_deviation([accuracy(record, group, KNN)]) for group in GROUPS]
                cost = hours(study.cost(variant)) if record is records[-1] else ""
                rows.append([variant, str(record["epoch"] + 1), *cells, millions(images[record["epoch"]]), cost])
    return markdown(["stage 1", "epochs", *GROUPS, "images", "core-hours"], rows)


def runs(study):
    """What each run was and cost: its own hours, without those of its encoder; the commits that its parts ran by."""
    rows = []
    for variant, by_seed in study.runs.items():
        for seed, records in by_seed.items():
            name = f"{variant}-seed{seed}"
            commits = ", ".join(dict.fromkeys(part[6] for part in study.parts[name]))
            rows.append([name, str(len(records)), hours(study.hours(name)), commits, f"`{study.parts[name][-1][2]}`"])
    return markdown(["run", "epochs", "core-hours", "commits", "command"], rows)


def millions(images):
    return f"{images / 1e6:.2f} M" if images >= 1e6 else f"{images / 1e3:.0f} k"


def hours(cost):
    """Hours by hardware as text: of CPU cores, or followed by the name of other hardware."""
    return " + ".join(f"{value:.2f}" if hardware == "core" else f"{value:.2f} {hardware}"
                      for hardware, value in cost.items())


def mean_and_deviation(values):
    if np.isnan(values).any():
        return "–"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def write(folder):
    """Write README.md and the pictures of a study into its folder."""
    study = Study(folder)
    (folder / "README.md").write_text(readme(study))
    for rows, draw in ((study.later, pictures.draw_cost), (study.stages1, pictures.draw_neighbours),
                       (study.records_with("drawn"), pictures.draw_draws)):
        if rows:
            draw(study)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
