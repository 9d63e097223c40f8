"""Print the tables of a study in Markdown and draw its figures, from the logs that benchmarks/study/run.py keeps.

    python benchmarks/plot_results.py results/FOLDER

benchmarks/study_logs.py says what the folder must hold. The figures lie beside the logs: accuracy.png, and knn.png and
draws.png where the logs hold what they show. tests/test_results.py compares a table of README.md or RESULTS.md with
what is printed here if the line right above it is <!-- python benchmarks/plot_results.py results/FOLDER -->.
"""
import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
from study_logs import ADJUSTED, KNN, MOST_SEEDS, PLAIN, Study, accuracy, compare  # noqa: E402

from util.errors import UserError  # noqa: E402
from util.options import launch  # noqa: E402

GROUPS = ("many", "medium", "few", "overall")
ROWS = 8  # of the table of a stage 1, at most
ABOUT_ACCURACIES = """\
Test accuracy at the last epoch, percent: mean ± sample deviation over the seeds. adj.: of the same weights, logit-
adjusted. Images and core-hours are of one run with its stage 1, whose two views count as two images."""
ABOUT_STATISTICS = """\
Mean differences in points with their 95 % intervals: of pairs of runs with the same seed, else Welch's. Where one
contains 0: how many pairs, or runs of each, would tell in 4 studies of 5, if difference and deviation stay. That is
rough: a deviation of three pairs is known within a factor of 0.5 to 6. Seeds vary the later stage only. Each stage 1
was trained once, so an interval holds for its encoder. One interval in 20 misleads by chance."""
ABOUT_NEIGHBOURS = "Accuracy of a class-balanced kNN vote on the encoder's features along stage 1, percent."


# ---------------------------------------------------------------------------------------------- tables


def tables(study):
    """All tables of a study, each below a line that explains it, and what is left out, as text."""
    blocks = [(ABOUT_ACCURACIES, accuracies(study)), (ABOUT_STATISTICS, statistics(study)),
              (ABOUT_NEIGHBOURS, neighbours(study))]
    return "\n\n".join([f"{about}\n\n{table}" for about, table in blocks if table] + study.notes)


def markdown(header, rows):
    """A table as text; none without rows."""
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def accuracies(study):
    rows = []
    for variant in study.later:
        cells = [mean_and_deviation(study.last(variant, group, kind)) for kind in (PLAIN, ADJUSTED) for group in GROUPS]
        images = study.images_before(variant) + study.images(variant)[-1]
        rows.append([variant, str(len(study.runs[variant])), *cells, count(images), hours(study.cost(variant))])
    return markdown(["variant", "runs", *GROUPS, *(f"{group} adj." for group in GROUPS), "images", "core-hours"], rows)


def statistics(study):
    rows = []
    for ours, theirs, paired in comparisons(study.later):
        seeds = [list(study.runs[variant]) for variant in (ours, theirs)]
        if paired:
            seeds = [sorted(set(seeds[0]) & set(seeds[1]))] * 2
        kinds = [(PLAIN, PLAIN, "plain"), (ADJUSTED, ADJUSTED, "adjusted")]
        if ours == theirs:
            kinds = [(ADJUSTED, PLAIN, "adjusted against plain")]
        elif ours.endswith("adjusted_loss") and not theirs.endswith("adjusted_loss"):  # it leaves nothing to adjust
            kinds = [(PLAIN, ADJUSTED, "plain against adjusted")]
        for our_kind, their_kind, figures in kinds if seeds[0] else ():
            cells = []
            for group in GROUPS:
                our_values = [accuracy(study.runs[ours][seed][-1], group, our_kind) for seed in seeds[0]]
                their_values = [accuracy(study.runs[theirs][seed][-1], group, their_kind) for seed in seeds[1]]
                cells.append(difference_cell(*compare(our_values, their_values, paired)))
            runs = f"{len(seeds[0])} and {len(seeds[1])}"
            if paired:
                runs = "1 pair" if len(seeds[0]) == 1 else f"{len(seeds[0])} pairs"
            name = ours if ours == theirs else f"{ours} against {theirs}"
            if set(cells) != {"–"}:
                rows.append([name, figures, runs, *cells])
    return markdown(["difference", "figures", "runs", *GROUPS], rows)


def comparisons(variants):
    """What is compared: (ours, theirs, whether runs of the same seed are a pair); a variant with itself, adjusted."""
    wanted = []
    for ours in variants:
        encoder, rest = ours.split("-", 1)
        kind, *changed = rest.split("-")  # such as ipdpp, n100
        if kind == "ipdpp":
            wanted.append((ours, f"{encoder}-{rest.replace('ipdpp', 'uniform')}", True))
        if changed:
            wanted.append((ours, f"{encoder}-{kind}", True))
        if rest == "ipdpp":
            wanted += [(ours, f"{encoder}-{other}", True) for other in ("no_sampling", "probe")]
        if encoder == "eq12":
            wanted.append((ours, f"bns-{rest}", False))
        if encoder != "scratch":
            everything = "scratch-adjusted_loss" if rest.endswith("adjusted_loss") else "scratch-cross_entropy"
            wanted += [(ours, theirs, False) for theirs in (f"scratch-{rest}", everything, f"{everything}-as_long")]
        elif kind != "cross_entropy":
            wanted.append((ours, "scratch-cross_entropy", False))
    wanted += [(ours, ours, True) for ours in variants]
    return [(ours, theirs, paired) for ours, theirs, paired in wanted if theirs in variants]


def neighbours(study):
    rows = []
    for variant in study.stages1:
        records, images = next(iter(study.runs[variant].values())), study.images(variant)
        evaluated = [record for record in records if KNN + "acc1" in record]
        for i in np.unique(np.linspace(len(evaluated) - 1, 0, ROWS).round().astype(int)) if evaluated else ():
            epoch = evaluated[i]["epoch"]
            cells = [mean_and_deviation([accuracy(evaluated[i], group, KNN)]) for group in GROUPS]
            cost = hours(study.cost(variant)) if epoch == records[-1]["epoch"] else ""
            rows.append([variant, str(epoch + 1), *cells, count(images[epoch]), cost])
    return markdown(["stage 1", "epochs", *GROUPS, "images", "core-hours"], rows)


def mean_and_deviation(values):
    if np.isnan(values).any():
        return "–"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def difference_cell(difference, half, seeds):
    if np.isnan(difference):
        return "–"
    if np.isnan(half):
        return f"{difference:+.1f} (no interval)"
    needed = f"over {MOST_SEEDS}" if seeds == np.inf else seeds
    tell = f"; {needed} would tell" if half >= abs(difference) else ""
    return f"{difference:+.1f} ({difference - half:+.1f} to {difference + half:+.1f}{tell})"


def count(images):
    return f"{images / 1e6:.2f} M" if images >= 1e6 else f"{images / 1e3:.0f} k"


def hours(cost):
    """Hours as text: of CPU cores, or followed by the name of other hardware."""
    return " + ".join(f"{value:.2f}" if hardware == "core" else f"{value:.2f} {hardware}"
                      for hardware, value in cost.items()) or "–"


# ---------------------------------------------------------------------------------------------- figures


def draw_accuracy(study, path):
    """Accuracy over images seen, in a band from the lowest to the highest run; last epoch: mean and deviation."""
    figure, axes = panels(3)
    axes[0].set(xscale="log", xlabel="images seen in this stage", ylabel="overall test accuracy, %", title="plain")
    axes[1].set(xscale="log", xlabel="images seen in this stage", title="logit-adjusted")
    axes[1].sharey(axes[0])
    axes[2].set(xlabel="overall test accuracy, %", title="last epoch: plain (dots), adjusted (triangles)")
    axes[2].set_yticks(range(len(study.later)), [
        f"{variant}, {count(study.images_before(variant) + study.images(variant)[-1])}" for variant in study.later])
    axes[2].invert_yaxis()
    colours = colormaps["tab10" if len(study.later) <= 10 else "tab20"]
    for number, variant in enumerate(study.later):
        colour, images, before = colours(number % 20), study.images(variant), study.images_before(variant)
        label = f"{variant}, after {count(before)} in stage 1" if before else variant
        for panel, kind, marker in zip(axes[:2], (PLAIN, ADJUSTED), "o^", strict=True):
            curves = study.curves(variant, "overall", kind)
            shown = ~np.isnan(curves).any(axis=0)  # epochs in which all runs were evaluated
            panel.plot(images[shown], curves[:, shown].mean(axis=0), ".-", color=colour, label=label)
            panel.fill_between(images[shown], curves[:, shown].min(axis=0), curves[:, shown].max(axis=0),
                               color=colour, alpha=0.15, linewidth=0)
            deviation = curves[:, -1].std(ddof=1) if len(curves) > 1 else 0
            axes[2].errorbar(curves[:, -1].mean(), number, xerr=deviation, fmt=marker, color=colour)
    save(figure, path)


def draw_neighbours(study, path):
    figure, axes = panels(1)
    axes[0].set(xlabel="epochs of stage 1", ylabel="kNN accuracy, %")
    for number, variant in enumerate(study.stages1):
        for colour, group in enumerate(GROUPS):
            curve = study.curves(variant, group, KNN)[0]
            shown = ~np.isnan(curve)
            axes[0].plot(1 + np.flatnonzero(shown), curve[shown], ("o-", "^--", "s:")[number % 3], markersize=3,
                         color=f"C{colour}", label=f"{variant}, {group}")
    save(figure, path)


def draw_draws(study, path):
    """Mean p and margin of drawn and left images: means over the seeds and over the classes logged, the largest.

    The first draw is left out: its classifier is untrained, and its margins would hide all others.
    """
    figure, axes = panels(3, subplot_kw={"xlabel": "epoch of the draw"})
    axes[0].set(ylabel="p of the true label, five largest classes")
    axes[1].set(ylabel="p: drawn minus left images")
    axes[2].set(ylabel="margin of the true label's logit")
    colours = colormaps["tab10"]
    for variant in study.later:
        if re.search(r"-n\d+$", variant):  # they would crowd it
            continue
        values = defaultdict(lambda: defaultdict(list))
        for record in (record for records in study.runs[variant].values() for record in records):
            if record["epoch"] > 0:
                for draw in record.get("drawn", ()):
                    for name in ("drawn_mean_p", "left_mean_p", "drawn_margin", "left_margin"):
                        values[name][record["epoch"]].append(draw.get(name, np.nan))
        curves = {name: np.array([np.mean(v) for v in by_epoch.values()]) for name, by_epoch in values.items()}
        if not curves:
            continue
        colour, epochs = colours(len(axes[1].lines) % 10), list(values["drawn_mean_p"])
        for panel, name in ((axes[0], "mean_p"), (axes[2], "margin")):
            panel.plot(epochs, curves[f"drawn_{name}"], ".-", color=colour, label=f"{variant}, drawn")
            panel.plot(epochs, curves[f"left_{name}"], ".--", color=colour, label=f"{variant}, left")
        axes[1].plot(epochs, curves["drawn_mean_p"] - curves["left_mean_p"], ".-", color=colour)
    save(figure, path)


def panels(number, **options):
    figure = Figure((5 * number, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots(1, number, squeeze=False, **options)[0]
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, axes


def save(figure, path):
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)
    print(f"wrote {path}")


def main(args):
    study = Study(args.folder)
    if not study.runs and not study.notes:
        raise UserError(f"found no VARIANT-seed<number>.txt in {args.folder}, expected the logs of a study")
    print(tables(study) + "\n")
    names = {name for runs in study.runs.values() for records in runs.values() for record in records for name in record}
    if study.later:
        draw_accuracy(study, args.folder / "accuracy.png")
    if KNN + "acc1" in names:
        draw_neighbours(study, args.folder / "knn.png")
    if "drawn" in names:
        draw_draws(study, args.folder / "draws.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    launch(main, parser)
