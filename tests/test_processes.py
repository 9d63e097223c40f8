"""Two processes over gloo against one, with the environment of torchrun, of SLURM, and under torchrun itself."""
import functools
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from kill_resume import FLAGS, STAGE_FLAGS, Run, differences

import engine
from util.checkpoint import load_checkpoint
from util.processes import Processes

ROOT = Path(__file__).resolve().parent.parent
TWO = ["--epochs", 2, "--num_samples", 10]


def pair(stage, folder, *flags, slurm=False, prepare=dict):
    """Two processes of one run, the first first."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS") if slurm else ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return [Run(stage, folder, *flags, prepare=prepare, environment={
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": rank, **dict(zip(names, (rank, rank, "2")))})
        for rank in ("0", "1")]


def finish(*runs):
    for run in runs:
        assert run.end() == 0, run.console.read_text()
    return [run.console.read_text() for run in runs]


def evaluation(output):
    """All lines that tell the figures of the last evaluation."""
    return re.findall(r"^\* Acc@1.*\n.*\n\* Many-Shot.*", output, re.MULTILINE)[-1]


def files(folder):
    return sorted(re.sub(r"\.\d+\.[^.]+\.\d+\.", ".", path.name) for path in folder.iterdir())


def record_batches(folder):
    """Save what each process trains on, by epoch and process."""
    original = engine.epoch_batches

    def epoch_batches(subset, batch_size, steps, seed, epoch, processes):
        batches = original(subset, batch_size, steps, seed, epoch, processes)
        torch.save((subset, batches), folder / f"epoch{epoch}-{processes.rank}.pt")
        return batches
    engine.epoch_batches = epoch_batches


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """A folder with a run `one` by one process and a run `two` by two, both with the same global batch."""
    folder = tmp_path_factory.mktemp("finetuned")
    runs = []
    for name, batch_size in (("one", 16), ("two", 8)):
        (folder / f"{name}_batches").mkdir()
        flags = [*TWO, "--sampling_freq", 1, "--epochs", 3, "--batch_size", batch_size]
        prepare = functools.partial(record_batches, folder / f"{name}_batches")
        start = pair if name == "two" else lambda *args, **kwargs: [Run(*args, **kwargs)]
        runs += start("finetune_ipdpp", folder / name, *flags, prepare=prepare)
    finish(*runs)
    return folder


def final(folder):
    return folder / "finetune_ipdpp_cifar10_if100.pth"


@pytest.mark.parametrize("trained_by", ["one", "two"])
@pytest.mark.parametrize("slurm", [False, True])
def test_evaluation_is_the_same_by_one_process_and_by_two(trained_by, slurm, finetuned, tmp_path):
    flags = ["--eval", final(finetuned / trained_by)]
    one, two = finish(Run("finetune_ipdpp", tmp_path / "one", *flags),
                      *pair("finetune_ipdpp", tmp_path / "two", *flags, slurm=slurm))[:2]
    assert one == two and "per class" in one
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()


@pytest.mark.parametrize("trained_by", ["one", "two"])
def test_evaluation_in_training_is_that_of_the_checkpoint(trained_by, finetuned, tmp_path):
    run = Run("finetune_ipdpp", tmp_path / "eval", "--eval", final(finetuned / trained_by))
    trained = Path(f"{finetuned / trained_by}.console" + "0" * (trained_by == "two")).read_text()
    assert evaluation(finish(run)[0]) == evaluation(trained)


def test_each_process_trains_on_its_share_of_the_same_draw(finetuned):
    for epoch in range(3):
        subset, batches = torch.load(finetuned / "one_batches" / f"epoch{epoch}-0.pt")
        shares = [torch.load(finetuned / "two_batches" / f"epoch{epoch}-{rank}.pt") for rank in (0, 1)]
        assert torch.equal(shares[0][0], shares[1][0])  # the draw
        if epoch == 0:  # later draws come from weights that have seen other augmentations
            assert torch.equal(shares[0][0], subset)
            for whole, *parts in zip(batches[:-1], *(share for _, share in shares)):
                assert [len(part) for part in parts] == [8, 8]
                assert torch.equal(torch.cat(parts).sort().values, whole.sort().values)
        trained_on = torch.cat([batch for _, share in shares for batch in share]).unique()
        assert torch.equal(trained_on, shares[0][0])  # every image, none besides
        assert len({len(share) for _, share in shares}) == 1
    drawn = [load_checkpoint(final(finetuned / name))["subset"] for name in ("one", "two")]
    assert len(drawn[0]) == len(drawn[1]) and torch.equal(drawn[1], shares[0][0])


def test_files_are_written_by_the_first_process_only(finetuned):
    assert files(finetuned / "two") == files(finetuned / "one")
    assert "train_loss" in Path(f"{finetuned / 'two'}.console0").read_text()
    assert "train_loss" not in Path(f"{finetuned / 'two'}.console1").read_text()


def fail_in_the_second_process():
    original = engine.epoch_batches

    def epoch_batches(*args):
        if args[-1].rank == 1 and args[-2] == 1:
            raise RuntimeError("this process fails")
        return original(*args)
    engine.epoch_batches = epoch_batches


@pytest.mark.parametrize("stage", ["pretrain_bns", "lineprob_bns"])
def test_failing_process_ends_the_others(stage, tmp_path):
    first, second = pair(stage, tmp_path, "--epochs", 3, prepare=fail_in_the_second_process)
    assert second.end() == 1 and "this process fails" in second.console.read_text()
    assert first.end() == 1
    load_checkpoint(tmp_path / "checkpoint-latest.pth")


def test_mistake_is_told_once_and_ends_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("{}\n")
    first, second = pair("pretrain_bns", tmp_path / "run", "--epochs", 3)
    assert first.end() == second.end() == 2
    assert (first.console.read_text() + second.console.read_text()).count("holds another run") == 1


def end_again_and_again(folder):
    start, rank = torch.distributed.init_process_group, int(os.environ["RANK"])
    for number in range(30):
        torch.distributed.init_process_group = lambda backend, init_method: start(
            backend, init_method=f"file://{folder}/{number}", world_size=2, rank=rank)
        processes = Processes("cpu")
        network = DistributedDataParallel(torch.nn.Linear(4, 4))
        network(torch.ones(2, 4)).sum().backward()
        for _ in range(8):
            processes.sum(torch.ones(100))
        processes.end()
        del network
        del processes
    sys.exit(0)


def test_end_does_not_hang(tmp_path):
    """Without its reference to the group, it does within a few rounds."""
    finish(*pair("pretrain_bns", tmp_path, prepare=functools.partial(end_again_and_again, tmp_path)))


def torchrun(stage, folder, *flags):
    """`torchrun --nproc_per_node 2 main_cifar10_<stage>.py <flags>` on few images."""
    runner = Path(f"{folder}.py")
    runner.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      f"from kill_resume import run_script\n"
                      f"run_script({stage!r}, sys.argv[1:], {str(folder)!r} + '.console', 0.0, -1, {{}}, dict)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(runner)]
    flags = [*FLAGS, *STAGE_FLAGS[stage], "--output_dir", str(folder), *map(str, flags)]
    return subprocess.Popen([*command, *flags], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_torchrun_stopped_and_resumed_ends_as_left_alone(tmp_path):
    flags = ["--epochs", 3, "--batch_size", 4]
    finish(*pair("lineprob_bns", tmp_path / "reference", *flags))
    job = torchrun("lineprob_bns", tmp_path / "stopped", *flags)
    console = Path(f"{tmp_path / 'stopped'}.console")
    try:
        while not (console.exists() and "epoch 0  train_loss" in console.read_text()):
            assert job.poll() is None, console.read_text()
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) != 0
    finally:
        job.kill()
    assert console.read_text().count("; add --resume auto to the command") == 1
    assert load_checkpoint(tmp_path / "stopped" / "checkpoint-latest.pth")["partial"]
    finish(*pair("lineprob_bns", tmp_path / "stopped", *flags, "--resume", "auto"))
    assert differences(tmp_path / "stopped", tmp_path / "reference", "lineprob_bns") == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_not_faulted_in_again():
    program = """
import ctypes, resource
import engine, main_cifar10_pretrain_bns as script
engine.prepare(script.get_args_parser().parse_args(["--device", "cpu"]))
libc, size = ctypes.CDLL(None), 2**26
libc.malloc.restype = ctypes.c_void_p
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    block = ctypes.c_void_p(libc.malloc(size))
    ctypes.memset(block, 1, size)
    libc.free(block)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / size)
"""
    fresh = float(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT))
    assert fresh < 2, "all but the first of the 40 blocks are memory that an earlier one freed"
