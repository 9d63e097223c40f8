"""Two processes over gloo against one, with the environment of torchrun, of SLURM, and under torchrun itself."""
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_process import Run, all_flags, at_step, differences
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError
from util.run.checkpoint import load_checkpoint
from util.run.processes import Processes

ROOT = Path(__file__).resolve().parents[1]


def pair(stage, folder, *flags, slurm=False, **settings):
    """Two processes of one run, the first first."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS") if slurm else (
        "RANK", "LOCAL_RANK", "WORLD_SIZE")
    return [Run(stage, folder, *flags, **settings, environment={
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK_OF_TEST": rank,
        **dict(zip(names, (rank, rank, "2"), strict=True))}) for rank in ("0", "1")]


def finish(*runs, code=0):
    """Run to the end, which must have this exit code; what each has printed."""
    for run in runs:
        assert run.end() == code, run.output()
    return [run.output() for run in runs]


# ---------------------------------------------------------------------------------------- the same figures


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of runs by one process and by two."""
    folder = tmp_path_factory.mktemp("trained")
    finish(Run("pretrain_bns", folder / "pretrain_bns-1", "--epochs", 1),
           *pair("finetune_ipdpp", folder / "finetune_ipdpp-2", "--epochs", 2))
    return folder


def final(folder):
    return folder / f"{folder.name[:-2]}_cifar10_if100.pth"


def figures(output):
    """All lines that tell the figures of the last evaluation."""
    return re.findall(r"^\* (?:kNN )?Acc@1.*(?:\n.*\n\* Many-Shot.*\n\* logit-adjusted.*)?", output, re.MULTILINE)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("run, slurm", [("pretrain_bns-1", False), ("finetune_ipdpp-2", True)])
def test_evaluation_is_the_same_by_one_process_by_two_and_in_training(run, slurm, trained, tmp_path):
    flags = [run[:-2], tmp_path / "eval", "--eval", final(trained / run)]
    one, two, silent = finish(Run(*flags), *pair(*flags, slurm=slurm))
    assert one == two and silent == "" and not (tmp_path / "eval").exists()
    console = trained / f"{run}.console{'0' if run.endswith('2') else ''}"
    assert figures(one) == figures(console.read_text())


# ---------------------------------------------------------------------------------------- the same training


# ---------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("launcher, visible, expected", [("slurm", 1, "cuda:0"), ("slurm", 2, "cuda:1"),
                                                         ("torchrun", 2, "cuda:1")])
def test_second_process_of_a_machine_takes_the_second_gpu_or_the_only_one_it_sees(
        launcher, visible, expected, monkeypatch):
    """SLURM can show each task its own GPU only, which is its device 0."""
    names = {"slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
             "torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    monkeypatch.setattr(os, "environ", dict(zip(names[launcher], ("1", "1", "2"), strict=True),
                                            MASTER_ADDR="localhost", MASTER_PORT="29500"))
    chosen = []
    for name, answer in {"cuda.is_available": True, "cuda.device_count": visible, "distributed.new_group": None,
                         "distributed.init_process_group": None, "distributed.get_world_size": 2,
                         "distributed.get_rank": 1}.items():
        monkeypatch.setattr(f"torch.{name}", lambda *args, answer=answer, **kwargs: answer)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    processes = Processes("auto")
    assert chosen == [str(processes.device)] == [expected] and (processes.rank, processes.world_size) == (1, 2)


@pytest.mark.parametrize("variables", [
    {"SLURM_NTASKS": "4"},  # the shell that salloc opens
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # the script that sbatch starts
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}])
def test_an_allocation_without_srun_is_one_process(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes = Processes("cpu")
    assert (processes.rank, processes.world_size) == (0, 1)


# ---------------------------------------------------------------------------------------- errors


def fail_in(rank, error):
    """For `prepare`: `error` is raised in one process, amid epoch 1."""
    def fail():
        raise error
    if os.environ["RANK_OF_TEST"] == str(rank):
        at_step(1, 1, fail)


def ended(*runs):
    """Exit codes, and the lines in which a script tells an error."""
    codes = [run.end() for run in runs]
    return codes, [line for run in runs for line in run.output().splitlines() if ".py: error: " in line]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_mistake_found_in_one_process_is_told_by_it_and_ends_all(rank, tmp_path):
    prepare = functools.partial(fail_in, rank, UserError("a file is not there"))
    codes, lines = ended(*pair("lineprob_bns", tmp_path, "--epochs", 3, "--save_freq", 50, prepare=prepare))
    assert codes[rank] == 2 and codes[1 - rank] != 0
    assert lines == ["main_cifar10_lineprob_bns.py: error: a file is not there"]
    assert load_checkpoint(tmp_path / "checkpoint-0.pth")["epoch"] == 0


@pytest.mark.slow
def test_killed_process_ends_the_others(tmp_path):
    first, second = pair("pretrain_bns", tmp_path, "--epochs", 1000)
    assert first.wait_until(lambda: first.says("epoch 1  train_loss"))
    assert second.kill() == -signal.SIGKILL
    assert first.end() != 0


@pytest.mark.slow
@pytest.mark.parametrize("flags, expected, found_by", [
    (["--lr", "1e38", "--warmup_epochs", 0, "--epochs", 3], "lower --lr or --blr", 2),
    (["--epochs", 3, "--batch_size", 64], "expected at most 127 together", 2),
    (["--epochs", 3], "holds another run", 1)])
def test_mistake_ends_all_processes(flags, expected, found_by, tmp_path):
    """One that the first process alone looks for is told once."""
    if expected == "holds another run":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.txt").touch()
    codes, lines = ended(*pair("pretrain_bns", tmp_path / "run", *flags))
    assert codes == [2, 2] and len(lines) == found_by and all(expected in line for line in lines)


def end_again_and_again(folder):
    start, rank = torch.distributed.init_process_group, int(os.environ["RANK_OF_TEST"])
    for number in range(30):
        torch.distributed.init_process_group = functools.partial(
            lambda file, backend, *_, **__: start(
                backend, init_method=f"file://{file}", world_size=2, rank=rank), folder / str(number))
        processes = Processes("cpu")
        network = DistributedDataParallel(torch.nn.Linear(4, 4))
        network(torch.ones(2, 4)).sum().backward()
        for _ in range(8):
            processes.mean(torch.ones(100))
        processes.end()
        del network
        del processes
    sys.exit(0)


@pytest.mark.slow
def test_end_does_not_hang(tmp_path):
    """Without its reference to the group, it does within a few rounds."""
    finish(*pair("pretrain_bns", tmp_path, prepare=functools.partial(end_again_and_again, tmp_path)))


# ---------------------------------------------------------------------------------------- torchrun


def torchrun(stage, folder, *flags):
    """`torchrun --nproc_per_node 2 main_cifar10_<stage>.py <flags>` on few images."""
    runner = Path(f"{folder}.py")
    runner.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      f"from run_process import run_script\n"
                      f"run_script({stage!r}, sys.argv[1:], {str(folder)!r} + '.console')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(runner)]
    return subprocess.Popen([*command, *all_flags(stage, folder, flags)], cwd=ROOT)


@pytest.mark.slow
def test_torchrun_stopped_and_resumed_ends_as_left_alone(tmp_path):
    flags = ["--epochs", 20, "--batch_size", 4, "--eval_freq", 20]
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
    assert "Traceback" not in console.read_text()
    finish(*pair("lineprob_bns", tmp_path / "stopped", *flags, "--resume", "auto"))
    assert differences(tmp_path / "stopped", tmp_path / "reference", "lineprob_bns") == []


# ---------------------------------------------------------------------------------------- memory
