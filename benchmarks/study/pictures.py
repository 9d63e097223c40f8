"""The pictures of a study: accuracy against cost, kNN along stage 1, what IP-DPP draws."""
import re
from collections import Counter, defaultdict

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study.logs import ADJUSTED, KNN, PLAIN, traits

# ResNet-32 at imbalance factor 100, on CIFAR-10-LT and CIFAR-100-LT: figures of these papers, not of this project.
FIELD = {
    "cross-entropy, Cao et al. 2019": (70.4, 38.3),
    "LDAM-DRW, Cao et al. 2019": (77.0, 42.0),
    "BCL, Zhu et al. 2022": (84.3, 51.9),
    "ProCo, Du et al. 2024": (85.9, 52.8),
}
SHAPES = {"cross_entropy": "o", "crop": "s", "strong": "^"}  # of a recipe


def draw_cost(study):
    """Accuracy at the last epoch over hours, encoders included, of the runs on the hardware of most variants.

    Colours say which encoder a run starts from, and shapes its recipe. The best of each colour and shape is named.
    """
    hardware, _ = Counter(tuple(study.cost(variant)) for variant in study.later).most_common(1)[0]
    figure, (panel,) = panels(1, width=9)
    panel.set(xlabel=f"{' + '.join(hardware)}-hours", ylabel="overall test accuracy, %",
              title="last epoch: plain (small), adjusted by logits or by the loss (large)")
    points = defaultdict(list)
    for variant in study.later:
        plain, adjusted = (study.curves(variant, "overall", kind)[:, -1].mean() for kind in (PLAIN, ADJUSTED))
        cost, names = study.cost(variant), traits(variant)
        if "adjusted_loss" in names:  # there is nothing left to adjust
            plain, adjusted = np.nan, plain
        if tuple(cost) == hardware:
            points[names["encoder"], names["recipe"]].append((adjusted, plain, sum(cost.values()), variant))
    encoders = sorted({encoder for encoder, _ in points})
    for (encoder, recipe), group in sorted(points.items()):
        colour, shape = f"C{encoders.index(encoder)}", SHAPES[recipe]
        for adjusted, plain, hours, _ in group:
            panel.plot([hours, hours], [plain, adjusted], shape + ":", color=colour, markersize=3)
            panel.plot(hours, adjusted, shape, color=colour, label=f"{encoder}-..., {recipe}: best {max(group)[-1]}")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    dataset = re.search(r"(cifar\d+)_if100_resnet32", study.folder.name)
    for name, figures in FIELD.items() if dataset else ():
        published = figures[dataset[1] == "cifar100"]
        panel.axhline(published, color="grey", linewidth=1, linestyle="--")
        panel.annotate(f"{name}: {published}", (1.01, published), xycoords=("axes fraction", "data"), fontsize=7,
                       color="grey", va="center")
    panel.margins(y=0.08)
    save(figure, study.folder / "cost.png", columns=2)


def draw_neighbours(study):
    figure, (panel,) = panels(1)
    panel.set(xlabel="epochs of stage 1", ylabel="kNN accuracy, %")
    for number, variant in enumerate(study.stages1):
        for colour, group in enumerate(("many", "medium", "few", "overall")):
            curve = study.curves(variant, group, KNN)[0]
            shown = ~np.isnan(curve)
            panel.plot(1 + np.flatnonzero(shown), curve[shown], ("o-", "^--", "s:")[number % 3], markersize=3,
                       color=f"C{colour}", label=f"{variant}, {group}")
    save(figure, study.folder / "knn.png")


def draw_draws(study):
    """Mean p and margin of the images that IP-DPP drew, and of the others: over the seeds and the largest classes.

    The first draw is left out: its classifier is untrained, and its margins would hide all others.
    """
    figure, axes = panels(3, subplot_kw={"xlabel": "epoch of the draw"})
    axes[0].set(ylabel="p of the true label, five largest classes")
    axes[1].set(ylabel="p: drawn minus not drawn")
    axes[2].set(ylabel="margin of the true label's logit")
    for variant in study.later:
        values = defaultdict(list)
        for record in (record for records in study.runs[variant].values() for record in records):
            for draw in record.get("drawn", ()) if record["epoch"] > 0 else ():
                names = ("drawn_mean_p", "left_mean_p", "drawn_margin", "left_margin")
                values[record["epoch"]].append([draw.get(name, np.nan) for name in names])
        if not values or re.search(r"-uniform|-n\d+|-adjusted_loss", variant):  # those would crowd it
            continue
        epochs, colour = list(values), f"C{len(axes[1].lines)}"
        drawn_p, left_p, drawn_margin, left_margin = np.array([np.mean(rows, axis=0) for rows in values.values()]).T
        for panel, drawn, left in (axes[0], drawn_p, left_p), (axes[2], drawn_margin, left_margin):
            panel.plot(epochs, drawn, ".-", color=colour, label=f"{variant}, drawn")
            panel.plot(epochs, left, ".--", color=colour, label=f"{variant}, not drawn")
        axes[1].plot(epochs, drawn_p - left_p, ".-", color=colour)
    save(figure, study.folder / "draws.png")


def panels(number, width=5, **options):
    figure = Figure((width * number, 5), dpi=110, layout="constrained")
    axes = figure.subplots(1, number, squeeze=False, **options)[0]
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, axes


def save(figure, path, columns=4):
    handles, labels = figure.axes[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))  # each label once
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    figure.savefig(path)
