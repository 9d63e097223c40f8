"""The table of gpu_check.sh, in Markdown, from the files that its parts left in a folder.

    python benchmarks/gpu_table.py FOLDER
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

KINDS = {"conv": "convolution", "norm": "batch norm", "elem": "elementwise", "augm": "augmentation",
         "optim": "optimiser", "copy": "copies", "other": "other"}
COLUMNS = ("part", "result", "ms", "views/s", "bound", "TFLOP/s", "TB/s", "GiB", "busy", "kernels", *KINDS)
EXPLANATION = """
Parts: stage, batch and type; compile is the first compilation, beside other work. ms: of a whole step, data and
augmentation included. views/s: stage 1 has two views of an image, stage 2 one. bound: what they would be if
convolutions and matrix products ran at the rate of a large matrix product, and everything else, unfused, at that of a
large copy. TFLOP/s and TB/s: achieved ones, of what was counted without --compile. GiB: peak memory. busy: time in
kernels, in % of a step. kernels: launches a step. Then the kinds of kernels, in % of the time in kernels: convolution,
batch norm, elementwise, augmentation, optimiser, copies, other. Batch norm in bfloat16 runs on PyTorch's kernels, in
float16 and float32 on cuDNN's.

Estimated before for an H100 (798 TFLOP/s, 3.0 TB/s), stage 1 at batch 1024: 6.84 TFLOP and 58 GB a step, so 91,000
views/s unfused and 120,000 with batch norm, ReLU and addition fused. The goal is 80,000.
"""


class Part:
    """What a part of the check left: `name`, `code`, `seconds`, `began`, and `record`, a dict of what it measured."""

    def __init__(self, code_file):
        self.name = code_file.stem
        self.code, *times = code_file.read_text().split()
        self.seconds, self.began = map(int, times)
        self.log, self.figures, self.tests = (code_file.with_suffix(end) for end in (".log", ".json", ".xml"))
        self.record = json.loads(self.figures.read_text()) if self.figures.exists() else {}

    @property
    def order(self):
        """Steps before the rest, larger batches before smaller ones, types side by side."""
        if not self.name.startswith("stage"):
            return 1, self.began
        stage, batch, *_ = self.name.split("-")
        return 0, stage, -int(batch), self.name.endswith("-compile"), self.name

    @property
    def result(self):
        if self.code == "-":
            return "LEFT OUT: no time"
        if self.code == "137":
            return f"FAILED: killed after {self.seconds} s"
        if self.tests.exists():
            return test_result(self.tests)
        if self.code != "0":
            lines = self.log.read_text(errors="replace").strip().splitlines() or [""]
            return f"FAILED ({self.code}): {lines[-1][:80]}".replace("|", "/")
        return f"ok, {self.seconds} s"


def test_result(path):
    cases = list(ElementTree.parse(path).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [case.get("name") for case in cases if {child.tag for child in case} & {"failure", "error"}]
    passed = len(cases) - len(skipped) - len(failed)
    names = [*failed[:3], "..."] if len(failed) > 3 else failed
    return ", ".join([f"{passed} passed, {len(skipped)} skipped, {len(failed)} failed", *names])


def step_cells(record, work, rates):
    """Cells of a row, by column, of a training step.

    Args:
        record: of gpu_check.py.
        work: the record that holds the counts of such a step; may be empty.
        rates: of the device; may be empty.
    """
    seconds, views = record["seconds"], record["views_per_second"] * record["seconds"]
    cells = {"ms": f"{seconds * 1e3:,.1f}", "views/s": f"{views / seconds:,.0f}",
             "GiB": f"{record['peak_bytes'] / 2**30:.2f}"}
    if "flop" in work:
        cells["TFLOP/s"] = f"{work['flop'] / seconds / 1e12:.3g}"
        cells["TB/s"] = f"{(work['product_bytes'] + work['other_bytes']) / seconds / 1e12:.2g}"
        if record["amp"] in rates:
            least = work["flop"] / rates[record["amp"]] + work["other_bytes"] / rates["copy"]
            cells["bound"] = f"{views / least:,.0f}"
    if "kinds" in record:
        in_kernels = sum(record["kinds"].values())
        cells |= {"busy": f"{in_kernels / seconds / 10:.0f}", "kernels": f"{record['kernels']:,.0f}"}
        cells |= {column: f"{100 * record['kinds'][kind] / in_kernels:.0f}" for column, kind in KINDS.items()}
    return cells


def comparison(brain, half):
    """The row that compares the records of a step in bfloat16 and float16."""
    norms = [f"{record['kinds']['batch norm']:.2f}" if "kinds" in record else "?" for record in (brain, half)]
    return {"part": "  bfloat16 / float16", "result": f"batch norm {norms[0]} / {norms[1]} ms",
            "ms": f"x {brain['seconds'] / half['seconds']:.2f}"}


def table_rows(parts):
    records = {part.name: part.record for part in parts}
    rates = records.get("rates", {})
    for name, unit in (("bfloat16", "TFLOP/s"), ("float16", "TFLOP/s"), ("copy", "TB/s")):
        if name in rates:
            yield {"part": f"large {name}{'' if name == 'copy' else ' product'}", "result": "rate of this device",
                   unit: f"{rates[name] / 1e12:.3g}"}
    for part in sorted(parts, key=lambda part: part.order):
        row = {"part": part.name, "result": part.result}
        if "seconds" in part.record and not part.name.startswith("compile"):  # timed beside other work
            row |= step_cells(part.record, records.get(part.name.removesuffix("-compile"), {}), rates)
        yield row
        brain = records.get(part.name.replace("-float16", "-bfloat16"), {})
        if "-float16" in part.name and part.name.startswith("stage") and "seconds" in part.record and brain:
            yield comparison(brain, part.record)


def markdown(rows):
    lines = [COLUMNS, *([row.get(column, "") for column in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = widths[:2]
    lines.insert(1, ["-" * width for width in texts] + ["-" * (width - 1) + ":" for width in widths[2:]])
    for line in lines:
        left = [cell.ljust(width) for cell, width in zip(line, texts, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        yield f"| {' | '.join(left + right)} |"


def main():
    parts = [Part(path) for path in Path(sys.argv[1]).glob("*.code")]
    device = [part.record["device"] for part in parts if "device" in part.record]
    print(*device, "", *markdown(table_rows(parts)), sep="\n")
    print(EXPLANATION.rstrip())
    for part in sorted(parts, key=lambda part: part.order):
        if "flop" in part.record:
            moved = part.record["product_bytes"] + part.record["other_bytes"]
            print(f"Counted in a step of {part.name}: {part.record['flop'] / 1e12:.3g} TFLOP, {moved / 1e9:.3g} GB.")


if __name__ == "__main__":
    main()
