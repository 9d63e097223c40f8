"""A study's folder, read: a log of each run, VARIANT-seed<number>.txt, and in `commands` what each part of a run cost.

A variant's name says where its network comes from, and what is done then:

    bns               no hyphen: a stage 1
    scratch-strong    from a random encoder
    bns-ipdpp         from the encoder of the variant `bns`
    bns_strong-ipdpp  from that of `bns-strong`: as an encoder's name, it has underscores
    strong-ipdpp      from that of `scratch-strong`: as an encoder's name, it has no `scratch`
"""
import json
import re
from collections import Counter, defaultdict

import numpy as np

PLAIN, ADJUSTED, KNN = "test_", "test_adjusted_", "knn_"  # what the names of a log's accuracies begin with
PART = re.compile(r"(\S+): (.*) \((\d+) s on (\d+) (.+), commit ([^,]*?)(, stopped)?\)")


def is_stage1(variant):
    return "-" not in variant


def encoder_of(variant, variants):
    """The one of `variants` whose encoder `variant` starts from, or None. Raises KeyError if it is not among them."""
    encoder = variant.split("-")[0]
    if is_stage1(variant) or encoder == "scratch":
        return None
    return {name.replace("-", "_").removeprefix("scratch_"): name for name in variants}[encoder]


def traits(variant):
    """What its name says of a variant of a later stage, a dict: `encoder`, `recipe`, and more where the name has more.

    `images` are those that it trains on, if not simply all.
    """
    encoder, *parts = variant.split("-")
    found = {"encoder": encoder, "recipe": "strong" if "strong" in encoder else "cross_entropy"}
    for part in parts:
        if part in ("cross_entropy", "crop", "strong"):
            found["recipe"] = part
        elif part in ("ipdpp", "uniform", "all", "no_sampling", "probe"):
            found["images"] = part.replace("no_sampling", "all")
        else:  # such as n100, lr0.01, e90
            found[re.sub(r"[\d.]+", "", part)] = part
    return found


def accuracy(record, group, kind):
    """Percent, or nan where the epoch has none: not evaluated, not adjusted, or no class in the group."""
    if group == "overall":
        return record.get(kind + "acc1", np.nan)
    fraction = record.get(kind + group)
    return np.nan if fraction is None else 100 * fraction


def read_commands(folder):
    """The parts of the runs of a folder, a list of matches of PART."""
    path = folder / "commands"
    return [PART.fullmatch(line) for line in path.read_text().splitlines()] if path.exists() else []


class Study:
    """The runs of a folder.

    Attributes:
        runs: dict from variant to dict from seed to the list of its epochs' records (dicts, as in log.txt).
        stages1, later: the variants that are a stage 1; the others, by falling accuracy.
        parts: dict from a run's name to its parts: matches of PART.
    """

    def __init__(self, folder):
        self.folder, self.runs, self.parts = folder, defaultdict(dict), defaultdict(list)
        for path in sorted(folder.glob("*-seed*.txt")):
            variant, _, seed = path.stem.rpartition("-seed")
            self.runs[variant][int(seed)] = [json.loads(line) for line in path.read_text().splitlines()]
        for part in read_commands(folder):
            self.parts[part[1]].append(part)
        self.stages1 = [variant for variant in self.runs if is_stage1(variant)]
        self.later = sorted((variant for variant in self.runs if not is_stage1(variant)),
                            key=lambda variant: -self.curves(variant, "overall")[:, -1].mean())

    def records_with(self, name):
        """The records of all runs that have an entry `name`, a list."""
        return [record for runs in self.runs.values() for records in runs.values() for record in records
                if name in record]

    def curves(self, variant, group, kind=PLAIN):
        """Percent after each epoch, float (runs, epochs), runs in the order of `runs`; nan where there is no figure."""
        runs = self.runs[variant].values()
        return np.array([[accuracy(record, group, kind) for record in records] for records in runs])

    def images(self, variant):
        """Images seen by the end of each epoch, mean of the runs, float (epochs,). Both views of stage 1 count."""
        views = 2 if is_stage1(variant) else 1
        per_epoch = [[record["train_images"] for record in records] for records in self.runs[variant].values()]
        return views * np.mean(np.cumsum(per_epoch, axis=1), axis=0)

    def images_in_all(self, variant):
        """Images seen by the end, those of its encoder included."""
        encoder = encoder_of(variant, self.runs)
        return self.images(variant)[-1] + (self.images_in_all(encoder) if encoder else 0)

    def hours(self, name):
        """Hours of a run alone, a Counter by hardware: "core" for those of a CPU core."""
        total = Counter()
        for _, _, seconds, number, hardware, *_ in (part.groups() for part in self.parts[name]):
            total[hardware] += int(seconds) * int(number) / 3600
        return total

    def cost(self, variant):
        """Mean hours of a run, a Counter by hardware, those of its encoder included.

        Where some of its runs had CPU cores and some a GPU, it is the mean of those on cores.
        """
        encoder = encoder_of(variant, self.runs)
        total = self.cost(encoder) if encoder else Counter()
        runs = [self.hours(f"{variant}-seed{seed}") for seed in self.runs[variant]]
        runs = [run for run in runs if set(run) == {"core"}] or runs
        for run in runs:
            for hardware, hours in run.items():
                total[hardware] += hours / len(runs)
        return total
