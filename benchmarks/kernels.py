"""What a training step asks of a device and where its time goes: operations, bytes, time by kind of kernel, rates."""

import json
import re
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from training_steps import wait

# The first kind whose pattern is found in the names of the operation and of the kernel. A kernel that torch.compile
# fused is named after all that it does, and batch norm is most of that where it is named.
KINDS = {
    "batch norm": r"batch_?norm|bn_(fw|bw)|bnadd",
    "convolution": r"convol|conv\dd|conv_|fprop|dgrad|wgrad",
    "optimiser": r"adam|foreach|multi_tensor|_amp_",
    "copies": r"memcpy|memset|copy|clone|contiguous|aten::(to|cat|stack)\b",
    "elementwise": r"elementwise|relu|threshold|clamp|triton_poi|fill|"
                   r"aten::(add|addcmul|addcdiv|sub|mul|div|exp|log|neg|where)_?\b",
}
OTHER = "other"
RANGES = {"augmentation": "augmentation", "Optimizer.step": "optimiser"}  # marked in the profile; all within counts
ALL_KINDS = ("convolution", "batch norm", "elementwise", "augmentation", "optimiser", "copies", OTHER)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write if each is a kernel of its own.

    Attributes: `products`, of convolutions and matrix products; `others`, of all else. Batch norm reads its inputs
    twice: for the statistics, and to normalise.
    """

    def __init__(self):
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if not func.is_view and "empty" not in name:
            read = size_of((args, kwargs)) * (2 if "batch_norm" in name else 1)
            if re.search(r"convolution|aten::(add|b)?mm", name):
                self.products += read + size_of(result)
            else:
                self.others += read + size_of(result)
        return result


def size_of(tree):
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def count_work(train):
    """What one step does, a dict: `flop`, `product_bytes` and `other_bytes` (see Traffic)."""
    with Traffic() as traffic, FlopCounterMode(display=False) as counter:
        train(1)
    return {"flop": counter.get_total_flops(), "product_bytes": traffic.products, "other_bytes": traffic.others}


def profile(train, steps, device):
    """Milliseconds of a step by kind of kernel (on the CPU: of operation), and how many there are."""
    with torch.profiler.profile(acc_events=True) as profiler:
        train(steps)
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        micros, kernels = by_kind(json.loads(path.read_text())["traceEvents"])
    return {kind: micros[kind] / 1e3 / steps for kind in ALL_KINDS}, kernels / steps


def by_kind(events):
    """(Counter of microseconds by kind, number of kernels) of the events of a trace in Chrome's format."""
    spans = [event for event in events if event.get("ph") == "X"]
    of = {name: [span for span in spans if span.get("cat") in categories] for name, categories in {
        "ranges": ["user_annotation"], "ops": ["cpu_op"], "launches": ["cuda_runtime", "cuda_driver"],
        "kernels": ["kernel", "gpu_memcpy", "gpu_memset"]}.items()}
    marked = [(range_, kind) for range_ in of["ranges"] for name, kind in RANGES.items()
              if range_["name"].startswith(name)]
    ops = {op["args"].get("External id"): op["name"] for op in of["ops"]}
    launches = {launch["args"].get("correlation"): launch for launch in of["launches"]}
    if of["kernels"]:
        timed = [(f"{ops.get(kernel['args'].get('External id'), '')} {kernel['name']}", kernel["dur"],
                  launches.get(kernel["args"].get("correlation"))) for kernel in of["kernels"]]
    else:
        timed = [(op["name"], micros, op) for op, micros in self_times(of["ops"])]
    micros = Counter()
    for name, duration, launch in timed:
        within = [kind for range_, kind in marked if launch and contains(range_, launch)]
        micros[within[0] if within else kind_of(name)] += duration
    return micros, len(timed)


def kind_of(name):
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def contains(outer, inner):
    """Whether a span began within another of the same thread."""
    return outer["tid"] == inner["tid"] and outer["ts"] <= inner["ts"] <= outer["ts"] + outer["dur"]


def self_times(ops):
    """Pairs of an operation and its microseconds without those of the operations that it called."""
    own, open_ops = [op["dur"] for op in ops], {}
    for i in sorted(range(len(ops)), key=lambda i: (ops[i]["ts"], -ops[i]["dur"])):
        callers = open_ops.setdefault(ops[i]["tid"], [])
        while callers and not contains(ops[callers[-1]], ops[i]):
            callers.pop()
        if callers:
            own[callers[-1]] -= ops[i]["dur"]
        callers.append(i)
    return zip(ops, own, strict=True)


def measure_rates(device):
    """What the device reaches, a dict: FLOP/s of a large matrix product by type, bytes/s of a large copy."""
    side, length, repeats = (8192, 2**31, 20) if device == "cuda" else (128, 2**20, 2)
    rates = {}
    for dtype in (torch.bfloat16, torch.float16):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = median_seconds(partial(torch.matmul, left, right), repeats, device)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates["copy"] = 2 * length / median_seconds(partial(target.copy_, source), repeats, device)
    return rates


def median_seconds(function, repeats, device):
    """Median over five rounds of `repeats` calls each, after one to warm up."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        wait(device)
        seconds.append((time.perf_counter() - start) / repeats)
    return median(seconds[1:])
