"""The runs of a study, read from the logs that benchmarks/study/run.py keeps, and what their differences say.

A study's folder holds a log of each finished run, VARIANT-seed<number>.txt, and in `commands` the time that each took.
A variant without a hyphen, such as `bns`, is a stage 1, and `bns-...` starts from its encoder; `scratch-...` starts
from a random one.
"""
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from scipy import stats  # dppy brings it

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.errors import UserError  # noqa: E402

PLAIN, ADJUSTED, KNN = "test_", "test_adjusted_", "knn_"  # what the names of a log's accuracies begin with
PART = re.compile(r"(\S+): .*\((\d+) s on (\d+) (.+), commit ([^,]*?)(, stopped)?\)")
MOST_SEEDS = 1000


def accuracy(record, group, kind):
    """Percent, or nan where a record has none: not evaluated, not adjusted, or no class in the group."""
    if group == "overall":
        return record.get(kind + "acc1", np.nan)
    fraction = record.get(kind + group)
    return np.nan if fraction is None else 100 * fraction


def read_log(path):
    """The records of a run's log.txt, a list of dicts. Raises UserError for a line that is none."""
    records = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not (isinstance(record, dict) and {"epoch", "train_images"} <= record.keys()):
            raise UserError(f"{path}, line {number}: found '{line[:40]}', expected an epoch as a run's log.txt has it")
        records.append(record)
    return records


class Study:
    """The finished runs of a folder.

    Attributes: `runs`, dict from variant to dict from seed to the list of its epochs' records, all of one length;
    `stages1`, the variants that are a stage 1; `later`, the others, by falling accuracy; `notes`, what is left out.
    Raises UserError for a file that is no log.
    """

    def __init__(self, folder):
        self.runs, self.notes = {}, []
        self.hours = defaultdict(Counter)  # of a run, by hardware
        self.commits = set()
        stopped = self._read_commands(folder / "commands")
        found = defaultdict(dict)
        for path in sorted(folder.glob("*-seed*.txt")):
            name = re.fullmatch(r"(.+)-seed(\d+)", path.stem)
            if not name:
                raise UserError(f"found {path}, expected VARIANT-seed<number>.txt")
            variant, seed = name.groups()
            records = read_log(path)
            last = records[-1] if records else {}
            unfinished = path.stem in stopped or ("test_acc1" if "-" in variant else "train_loss") not in last
            if unfinished:
                self.notes.append(f"Unfinished, so left out: {path.stem}, {len(records)} epochs.")
            else:
                found[variant][int(seed)] = records
        for variant, runs in found.items():
            longest = max(map(len, runs.values()))
            self.runs[variant] = {seed: records for seed, records in runs.items() if len(records) == longest}
            self.notes += [f"Shorter, so left out: {variant}-seed{seed}, {len(records)} of {longest} epochs."
                           for seed, records in runs.items() if len(records) < longest]
        self.stages1 = [variant for variant in self.runs if "-" not in variant]
        self.later = sorted((variant for variant in self.runs if "-" in variant),
                            key=lambda variant: -self.last(variant, "overall").mean())
        self.notes += [f"No finished stage 1 `{encoder}`: what it costs is missing in the rows of `{encoder}-...`."
                       for encoder in sorted({variant.split("-")[0] for variant in self.later})
                       if encoder not in ("scratch", *self.stages1)]
        names = [f"{variant}-seed{seed}" for variant, runs in self.runs.items() for seed in runs]
        self.notes += [f"No hours in `commands`, so left out of the mean: {name}."
                       for name in names if name not in self.hours]
        if len(self.commits) > 1:
            self.notes.append(f"Parts of the runs were trained at several commits: {', '.join(sorted(self.commits))}.")

    def _read_commands(self, path):
        """Add up the hours of each run's parts. Returns the names of the runs whose last part was stopped."""
        stopped = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            part = PART.fullmatch(line)
            if not part:
                self.notes.append(f"Not understood, so its hours are missing, in `commands`: {line}")
                continue
            name, seconds, number, hardware, commit, end = part.groups()
            self.commits.add(commit)
            self.hours[name][hardware] += int(seconds) * int(number) / 3600
            stopped[name] = end is not None
        return {name for name in stopped if stopped[name]}

    def curves(self, variant, group, kind=PLAIN):
        """Percent after each epoch, float (runs, epochs), runs in the order of `runs`; nan where there is no figure."""
        runs = self.runs[variant].values()
        return np.array([[accuracy(record, group, kind) for record in records] for records in runs])

    def last(self, variant, group, kind=PLAIN):
        return self.curves(variant, group, kind)[:, -1]

    def images(self, variant):
        """Images seen by the end of each epoch, mean of the runs, float (epochs,); without an earlier stage's."""
        views = 1 if "-" in variant else 2
        per_epoch = [[record["train_images"] for record in records] for records in self.runs[variant].values()]
        return views * np.mean(np.cumsum(per_epoch, axis=1), axis=0)

    def before(self, variant):
        """The stage 1 that a variant starts from, or None."""
        encoder = variant.split("-")[0]
        return encoder if encoder != variant and encoder in self.stages1 else None

    def images_before(self, variant):
        return self.images(self.before(variant))[-1] if self.before(variant) else 0

    def cost(self, variant):
        """Mean hours of a run, by hardware, its stage 1 included."""
        total = self.cost(self.before(variant)) if self.before(variant) else Counter()
        known = [name for name in (f"{variant}-seed{seed}" for seed in self.runs[variant]) if name in self.hours]
        for name in known:
            for hardware, hours in self.hours[name].items():
                total[hardware] += hours / len(known)
        return total


def standard_error(variances, sizes):
    """Of a difference of independent means, or of one mean, and its degrees of freedom (Welch and Satterthwaite)."""
    parts = np.divide(variances, sizes)
    return np.sqrt(parts.sum()), parts.sum() ** 2 / (parts ** 2 / np.subtract(sizes, 1)).sum()


def compare(ours, theirs, paired):
    """Mean difference of two samples: (difference, half width of its 95 % interval, seeds that would tell).

    The interval is Student's of the pairs or Welch's. The seeds are the fewest pairs, or runs of each sample, with
    which it would leave out 0 in 4 studies of 5, were difference and deviation as observed; inf beyond MOST_SEEDS.
    Both are nan where there are too few runs, or all differ by the same: no deviation can be estimated then.
    """
    difference = np.mean(ours) - np.mean(theirs)
    samples = [np.subtract(ours, theirs)] if paired else [ours, theirs]
    if min(map(len, samples)) < 2:
        return difference, np.nan, np.nan
    variances = [np.var(sample, ddof=1) for sample in samples]
    if np.allclose(variances, 0):
        return difference, np.nan, np.nan
    error, freedom = standard_error(variances, [len(sample) for sample in samples])
    half = stats.t.ppf(0.975, freedom) * error
    for seeds in range(2, MOST_SEEDS + 1):
        error, freedom = standard_error(variances, [seeds] * len(samples))
        if stats.t.ppf([0.975, 0.8], freedom).sum() * error < abs(difference):
            return difference, half, seeds
    return difference, half, np.inf
