"""benchmarks/gpu_check.sh and what it measures with, as far as that can be seen without a GPU."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_check
import gpu_table
import pytest
import torch
import torch.nn.functional as F
from kernels import ALL_KINDS, by_kind, count_work, kind_of

ROOT = Path(__file__).resolve().parents[1]
# Stands in for python in gpu_check.sh: each part leaves a record of its kind, or fails where BREAK names it.
STUB = """#!/usr/bin/env bash
[[ $1 == *gpu_table.py ]] && exec "$PYTHON" "$@"
echo "$*" >> "$CALLS"
[[ "$*" == *$BREAK* ]] && { echo "no | luck" >&2; exit 3; }
[[ $1 == *gpu_check.py ]] || exit 0
[[ $2 == rates ]] && echo '{"device": "a card", "bfloat16": 8e14, "float16": 4e14, "copy": 3e12}' > "$3"
[[ "$*" == *float16* && "$*" != *bfloat16* ]] && type=float16 seconds=0.02 || type=bfloat16 seconds=0.04
[[ $2 == stage* ]] && sed "s/TYPE/$type/; s/SECONDS/$seconds/" > "$3" <<END
{"amp": "TYPE", "seconds": SECONDS, "peak_bytes": 1073741824, "views_per_second": 51200, "kernels": 1185,
 "flop": 8e12, "product_bytes": 2e10, "other_bytes": 3e10, "kinds": {"convolution": 10, "batch norm": 5,
 "elementwise": 2, "augmentation": 1, "optimiser": 1, "copies": 1, "other": 0}}
END
exit 0
"""


@pytest.fixture
def check(tmp_path):
    """A function that calls gpu_check.sh with the stub for python: (exit status, cells by part, commands)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)

    def call(**variables):
        (tmp_path / "calls").write_text("")
        env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": sys.executable, "BREAK": "nothing",
               "CALLS": f"{tmp_path}/calls", **variables}
        done = subprocess.run(["bash", "benchmarks/gpu_check.sh", tmp_path / "out"], env=env, cwd=ROOT, text=True,
                              capture_output=True)
        table = [line for line in done.stdout.splitlines() if line.startswith("|")]
        assert len({len(line) for line in table}) == 1 and done.stdout.endswith((tmp_path / "out/table.md").read_text())
        columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
        cells = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
        return done.returncode, cells, (tmp_path / "calls").read_text().splitlines()
    return call


def test_every_part_is_in_the_table(check):
    status, cells, calls = check()
    assert status == 0
    steps = [f"stage{part}{end}" for part in ("1-1024-", "1-512-", "2-64-") for end in (
        "bfloat16", "float16", "bfloat16-compile", "float16-compile")]
    scripts = [path.stem.replace("main_", "epoch-") for path in ROOT.glob("main_*.py")]
    assert {*steps, *scripts, "tests", "plain-1024"} <= set(cells) and len(scripts) == 6
    assert all(cells[part]["result"].startswith("ok") for part in (*steps, *scripts))
    # 8e12 FLOP at 8e14 a second and 3e10 bytes at 3e12 are 20 ms, half of the 40 ms that the step took.
    compiled = cells["stage1-1024-bfloat16-compile"]
    assert re.fullmatch(r"ok, \d+ s", compiled.pop("result")) and compiled == {
        "part": "stage1-1024-bfloat16-compile", "ms": "40.0", "views/s": "51,200",
        "bound": "102,400", "TFLOP/s": "200", "TB/s": "1.2", "GiB": "1.00", "busy": "50", "kernels": "1,185",
        "conv": "50", "norm": "25", "elem": "10", "augm": "5", "optim": "5", "copy": "5", "other": "0"}
    assert cells["stage1-1024-float16"]["bound"] == f"{51200 * 0.02 / 0.03:,.0f}"
    assert cells["bfloat16 / float16"]["ms"] == "x 2.00"
    assert cells["large float16 product"]["TFLOP/s"] == "400"
    assert cells["compile1-1024-bfloat16"]["ms"] == "" and set(gpu_table.KINDS.values()) == set(ALL_KINDS)
    assert check()[2] == []  # all is done


def test_a_part_that_fails_is_named_and_done_again(check, tmp_path):
    status, cells, calls = check(BREAK="--compile")
    failed = {part for part in cells if cells[part]["result"].startswith("FAILED (3): no / luck")}
    assert status == 1 and len(failed) == 12 and "stage1-1024-bfloat16-compile" in failed
    assert cells["stage1-1024-bfloat16"]["ms"] == "40.0" and "epoch-cifar100_finetune_ipdpp" in cells
    status, cells, calls = check(PARTS="stage1-*")
    assert len(calls) == 4 and not cells["stage1-512-float16-compile"]["result"].startswith("FAILED") and status == 1


def test_parts_without_time_are_named(check):
    status, cells, calls = check(MINUTES="0", PARTS="rates tests")
    assert (status, calls) == (1, []) and [cells[part]["result"] for part in cells] == ["LEFT OUT: no time"] * 2


@pytest.mark.parametrize("arguments, variables, named", [
    (["--help"], {}, "--help"), (["a", "b"], {}, "a b"), (["a"], {"PARTS": "stage9"}, "PARTS"),
    (["a"], {"MINUTES": "ten"}, "MINUTES"), (["a"], {"DEVICE": "tpu"}, "DEVICE")])
def test_wrong_arguments_end_in_one_line(arguments, variables, named, tmp_path):
    done = subprocess.run(["bash", ROOT / "benchmarks" / "gpu_check.sh", *arguments], cwd=tmp_path, text=True,
                          env=os.environ | variables, capture_output=True)
    assert done.returncode == 2 and done.stdout == "" and named in done.stderr and done.stderr.count("\n") == 1


def test_failed_tests_are_named(check, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tests.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>'
        '<testcase name="c"><failure/></testcase></testsuite></testsuites>')
    assert check(BREAK="pytest", PARTS="tests")[1]["tests"]["result"] == "1 passed, 1 skipped, 1 failed, c"


def span(category, name, start, duration, thread=1, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread, "args": args}


def test_kernels_of_a_trace_by_kind():
    events = [
        span("user_annotation", "augmentation", 0, 100), span("user_annotation", "Optimizer.step#AdamW.step", 500, 100),
        span("gpu_user_annotation", "augmentation", 0, 9999, 7), {"ph": "M", "name": "process_name"}]
    for number, (start, thread, op, kernel, micros) in enumerate([
            (50, 1, "aten::mul", "vectorized_elementwise_kernel", 1),  # the augmentation's
            (50, 2, "aten::mul", "vectorized_elementwise_kernel", 2),  # of another thread
            (510, 1, "aten::_fused_adamw_", "multi_tensor_apply_kernel", 4),
            (520, 1, "aten::fill_", "vectorized_elementwise_kernel", 8),  # the optimiser's
            (200, 1, "aten::cudnn_convolution", "nvjet_128x256", 16),
            (210, 1, "aten::cudnn_batch_norm", "cudnn::bn_fw_tr_1C11_kernel_NHWC", 32),
            (220, 1, "CompiledFunction", "triton_red_fused__native_batch_norm_legit_relu_3", 64),
            (230, 1, "aten::copy_", "unrolled_elementwise_kernel<direct_copy_kernel_cuda>", 128),
            (240, 1, "aten::sum", "reduce_kernel", 256)]):
        events += [span("cpu_op", op, start, 5, thread, **{"External id": number}),
                   span("cuda_runtime", "cudaLaunchKernel", start + 1, 1, thread, correlation=number),
                   span("kernel", kernel, 1000 + start, micros, 7, **{"External id": number, "correlation": number})]
    events.append(span("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 3000, 512, 7))
    micros, kernels = by_kind(events)
    assert kernels == 10 and micros == {"augmentation": 1, "elementwise": 2, "optimiser": 12, "convolution": 16,
                                        "batch norm": 96, "copies": 640, "other": 256}
    assert set(micros) == set(ALL_KINDS)


@pytest.mark.parametrize("name, kind", [
    ("aten::native_batch_norm void at::native::batch_norm_collect_statistics_channels_last_kernel", "batch norm"),
    ("aten::convolution_backward sm90_xmma_wgrad_implicit_gemm_indexed_bf16", "convolution"),
    ("aten::convolution_backward void cudnn::ops::nchwToNhwcKernel", "convolution"),
    ("aten::clamp_min_ void at::native::vectorized_elementwise_kernel", "elementwise"),
    ("aten::_amp_foreach_non_finite_check_and_unscale_ multi_tensor_apply_kernel", "optimiser"),
    ("aten::addmm nvjet_hsh_128x256", "other")])
def test_kinds_by_name(name, kind):
    assert kind_of(name) == kind


def test_time_on_the_cpu_is_that_of_operations_without_those_that_they_call():
    micros, _ = by_kind([span("cpu_op", "aten::conv2d", 0, 100), span("cpu_op", "aten::copy_", 10, 30),
                         span("cpu_op", "aten::relu", 20, 5), span("cpu_op", "aten::copy_", 100, 7, 2)])
    assert micros == {"convolution": 70, "copies": 32, "elementwise": 5}


def test_counts_of_a_step():
    images, weights = torch.ones(16, 8), torch.ones(8, 4, requires_grad=True)

    def train(steps):
        assert steps == 1
        F.batch_norm((images @ weights).relu(), None, None, training=True).detach()

    with torch.no_grad():
        work = count_work(train)
    matrix = 16 * 4 * 4  # bytes of the product
    assert work["flop"] == 2 * 16 * 8 * 4 and work["product_bytes"] == 16 * 8 * 4 + 8 * 4 * 4 + matrix
    assert work["other_bytes"] == 2 * matrix + 3 * matrix + 2 * 4 * 4  # relu; batch norm and its statistics


@pytest.mark.slow
@pytest.mark.parametrize("what", ["rates", "stage1"])
def test_measurements_in_a_small_form(what, tmp_path, monkeypatch):
    flags = ["--device", "cpu", "--steps", "1", "--blocks", "1"]
    if what == "stage1":
        flags += ["--batch_size", "4", "--model", "test_resnet", "--input_size", "16"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", what, str(tmp_path / "file"), *flags])
    gpu_check.main()
    record = json.loads((tmp_path / "file").read_text())
    if what == "rates":
        assert min(record["bfloat16"], record["float16"], record["copy"]) > 0 and record["device"].startswith("CPU")
    else:
        assert set(record["kinds"]) == set(ALL_KINDS) and record["flop"] > 0
        assert min(record["kinds"][kind] for kind in ("convolution", "batch norm", "augmentation", "optimiser")) > 0
        assert record["views_per_second"] * record["seconds"] == pytest.approx(8)


@pytest.mark.slow
def test_a_part_of_the_command_itself(tmp_path):
    env = os.environ | {"DEVICE": "cpu", "PARTS": "stage2-4-bfloat16",
                        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "benchmarks/gpu_check.sh", tmp_path], env=env, cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("| stage2-4-bfloat16"))
    assert all(cell.strip() for cell in row.split("|")[3:5])  # ms and views/s
    assert "Counted in a step of stage2-4-bfloat16: " in done.stdout
