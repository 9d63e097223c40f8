"""One measurement of gpu_check.sh, written to a file of JSON that gpu_table.py reads.

    python benchmarks/gpu_check.py rates FILE [--device cpu]
    python benchmarks/gpu_check.py plain FILE --batch_size 1024 [--device cpu]
    python benchmarks/gpu_check.py stage1 FILE --batch_size 1024 --amp bfloat16 [--compile] [flags of the script]
    python benchmarks/gpu_check.py stage2 FILE --batch_size 64 ...

`rates` is what the device reaches in a matrix product and in a copy. `plain` is the plain pipeline of
bench_pretrain.py. The stages are whole steps on toy images, augmentation included: time, memory, and time by kind of
kernel. Without --compile they are counted too: operations, and bytes that kernels would move one by one.
"""

import argparse
import json
import tempfile
from pathlib import Path

import bench_pretrain
import torch
from kernels import count_work, measure_rates, profile
from training_steps import VIEWS, Meter, prepare


def describe(device):
    """The device and the libraries, as one line."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def measure_plain(options, flags):
    flags = ["--device", options.device, "--steps", str(options.steps), "--blocks", str(options.blocks),
             "--batch_size", str(options.batch_size), *flags]
    seconds, peak = bench_pretrain.plain(bench_pretrain.get_args_parser().parse_args(flags))
    yield {"seconds": seconds, "peak_bytes": peak, "views_per_second": 2 * options.batch_size / seconds}


def measure_steps(options, flags):
    """Yields what is known of the steps as it becomes known, dicts: a profile that fails leaves the time."""
    stage = int(options.what[-1])
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--toy_data", "--device", options.device, "--output_dir", folder,
                 "--batch_size", str(options.batch_size), "--amp", options.amp, *flags]
        meter = Meter(options.device, options.steps, options.blocks)
        train = prepare(stage, [*flags, "--compile"] if options.compile else flags, options.steps)
        seconds, peak = meter.measure(train)
        yield {"amp": options.amp, "seconds": seconds, "peak_bytes": peak,
               "views_per_second": VIEWS[stage] * options.batch_size / seconds}
        kinds, kernels = profile(train, options.steps, options.device)
        yield {"kinds": kinds, "kernels": kernels}
        if not options.compile:
            yield count_work(train)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=("rates", "plain", "stage1", "stage2"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--amp", choices=("bfloat16", "float16", "none"), default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=7, help="blocks whose median is taken")
    options, flags = parser.parse_known_args()
    if options.what == "rates":
        findings = [{"device": describe(options.device), **measure_rates(options.device)}]
    elif options.what == "plain":
        findings = measure_plain(options, flags)
    else:
        findings = measure_steps(options, flags)
    record = {}
    for finding in findings:
        record |= finding
        options.file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
