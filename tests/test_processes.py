"""Two processes over gloo: devices, evaluation, errors, and torchrun itself."""
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_process import Run, all_flags, at_step, differences, outputs, pair, signal_self
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError
from util.run.checkpoint import load_checkpoint
from util.run.processes import Processes

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_evaluation_is_the_same_by_one_process_by_two_and_in_training(tmp_path):
    trained = outputs(*pair("finetune_ipdpp", tmp_path / "run", "--epochs", 2))
    flags = ["finetune_ipdpp", tmp_path / "eval", "--eval", tmp_path / "run" / "finetune_ipdpp_cifar10_if100.pth"]
    one, two, silent = outputs(Run(*flags), *pair(*flags))
    assert one == two and silent == trained[1] == "" and not (tmp_path / "eval").exists()
    assert re.findall(r"^\* .*", one, re.MULTILINE) == re.findall(r"^\* .*", trained[0], re.MULTILINE)[-3:]


def test_second_process_of_a_machine_takes_the_second_gpu(monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    chosen = []
    for name, answer in {"cuda.is_available": True, "cuda.device_count": 2, "distributed.new_group": None,
                         "distributed.init_process_group": None}.items():
        monkeypatch.setattr(f"torch.{name}", lambda *args, answer=answer, **kwargs: answer)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    processes = Processes("auto")
    assert chosen == [str(processes.device)] == ["cuda:1"] and (processes.rank, processes.world_size) == (3, 4)


def only_in(rank, action):
    """For `prepare`: `action` is called in one process, amid epoch 1."""
    if os.environ["RANK"] == str(rank):
        at_step(1, 1, action)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(tmp_path):
    prepare = functools.partial(only_in, 1, functools.partial(signal_self, signal.SIGTERM))
    outputs(*pair("lineprob_bns", tmp_path, "--epochs", 9, prepare=prepare), code=128 + signal.SIGTERM)
    assert (tmp_path / "checkpoint-1.pth").exists()


def raise_error():
    raise UserError("a file is not there")


def ended(*runs):
    """Exit codes, and the lines in which a script tells an error."""
    codes = [run.end() for run in runs]
    return codes, [line for run in runs for line in run.output().splitlines() if ".py: error: " in line]


@pytest.mark.slow
@pytest.mark.parametrize("rank, action, code", [
    (0, raise_error, 2), (1, raise_error, 2), (1, functools.partial(signal_self, signal.SIGKILL), -signal.SIGKILL)])
def test_failure_of_one_process_is_told_by_it_and_ends_all(rank, action, code, tmp_path):
    prepare = functools.partial(only_in, rank, action)
    codes, lines = ended(*pair("lineprob_bns", tmp_path, "--epochs", 3, "--save_freq", 50, prepare=prepare))
    assert codes[rank] == code and codes[1 - rank] != 0
    assert lines == ["main_cifar10_lineprob_bns.py: error: a file is not there"] * (code == 2)
    assert load_checkpoint(tmp_path / "checkpoint-0.pth")["epoch"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags, expected, found_by", [(["--batch_size", 64], "--batch_size", 2),
                                                       ([], "--output_dir", 1)])
def test_mistake_ends_all_processes(flags, expected, found_by, tmp_path):
    """One that the first process alone looks for, here another run in the folder, is told once."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").touch()
    codes, lines = ended(*pair("pretrain_bns", tmp_path / "run", *flags))
    assert codes == [2, 2] and len(lines) == found_by and all(expected in line for line in lines)


def end_again_and_again(folder):
    start, rank = torch.distributed.init_process_group, int(os.environ["RANK"])
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
    outputs(*pair("pretrain_bns", tmp_path, prepare=functools.partial(end_again_and_again, tmp_path)))


@pytest.mark.slow
def test_torchrun_stopped_and_resumed_ends_as_left_alone(tmp_path):
    flags = ["--epochs", 20, "--batch_size", 4, "--eval_freq", 20]
    outputs(*pair("lineprob_bns", tmp_path / "reference", *flags))
    runner, console = tmp_path / "runner.py", tmp_path / "stopped.console"
    runner.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      f"from run_process import run_script\n"
                      f"run_script('lineprob_bns', sys.argv[1:], {str(console)!r})\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(runner)]
    job = subprocess.Popen([*command, *all_flags("lineprob_bns", tmp_path / "stopped", flags)], cwd=ROOT)
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
    outputs(*pair("lineprob_bns", tmp_path / "stopped", *flags, "--resume", "auto"))
    assert differences(tmp_path / "stopped", tmp_path / "reference", "lineprob_bns") == []
