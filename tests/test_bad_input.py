"""Every kind of bad input ends the real command lines in one line, exit code 2, and with every file as it was."""
import functools
import importlib
import os
import pickle
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from kill_resume import FewImages

import engine
from util.checkpoint import load_checkpoint
from util.options import launch

ROOT = Path(__file__).resolve().parent.parent
TOY = ["--toy_data", "--model", "test_resnet", "--input_size", "16", "--device", "cpu", "--amp", "none",
       "--epochs", "2", "--batch_size", "60"]
PRETRAIN, LINEPROB, FINETUNE = (f"main_cifar10_{stage}" for stage in ("pretrain_bns", "lineprob_bns", "finetune_ipdpp"))
PRETRAIN100, LINEPROB100, FINETUNE100 = (name.replace("10", "100") for name in (PRETRAIN, LINEPROB, FINETUNE))


@pytest.fixture(scope="module", autouse=True)
def quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ToyCIFAR", functools.cache(FewImages))
        yield
    torch.set_num_threads(threads)


def run(name, *flags):
    """Run the command line in this process; the code it exits with."""
    script, before = importlib.import_module(name), sys.argv
    sys.argv = [f"{name}.py", *map(str, flags)]
    try:
        launch(script.main, script.get_args_parser())
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Payload:
    """Unpickled by anything but weights_only=True, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def bad(quick, tmp_path_factory):
    """A folder with runs of all stages and files of all kinds that a user may hand over by mistake, or be handed."""
    folder = tmp_path_factory.mktemp("bad")
    for name in (PRETRAIN, LINEPROB, FINETUNE, FINETUNE100):
        flags = [*TOY, "--epochs", 1, "--save_freq", 1, "--output_dir", folder / name]
        assert run(name, *flags, *["--num_samples", 10][:2 * (name != PRETRAIN)]) == 0
    whole = (folder / PRETRAIN / "checkpoint-0.pth").read_bytes()
    (folder / "empty.pth").touch()
    (folder / "truncated.pth").write_bytes(whole[:len(whole) // 2])
    (folder / "text.pth").write_text("<html>404</html>\n")
    torch.save(load_checkpoint(folder / PRETRAIN / "checkpoint-0.pth")["model"], folder / "bare.pth")
    torch.save({"model": load_checkpoint(folder / FINETUNE / "checkpoint-0.pth")["model"]}, folder / "weights.pth")
    torch.save({"model": {}, "args": Payload(folder / "ran")}, folder / "foreign.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps({"model": {}, "args": Payload(folder / "ran")}))
    for name in ("tampered", "cut"):
        batches = folder / name / "cifar-10-batches-py"
        batches.mkdir(parents=True)
        (batches / "data_batch_1").write_bytes(pickle.dumps(Payload(folder / "ran")) if name == "tampered" else b"cut")
    return folder


FLAGS = {  # each with what the line must name beside the flag
    PRETRAIN: {
        "--epochs 0": "at least 1", "--epochs -1": "at least 1", "--epochs 1.5": "whole number",
        "--batch_size 0": "at least 1", "--batch_size -4": "at least 1", "--batch_size 249": "at most 248",
        "--temperature 0": "above 0",
        "--temperature -1": "above 0", "--lr 0": "above 0", "--lr -0.1": "above 0", "--lr nan": "above 0",
        "--lr inf": "above 0", "--blr 0": "above 0",
        "--imbalanced_factor 0.5": "at least 1", "--imbalanced_factor 0": "at least 1", "--imbalanced_factor nan": "at least 1", "--imbalanced_factor 501": "500", "--save_freq 0": "at least 1",
        "--accum_iter 0": "at least 1", "--embed_dim 0": "at least 1", "--warmup_epochs 2": "fewer than --epochs 2",
        "--warmup_epochs 9": "fewer than --epochs 2", "--start_epoch 2": "less than --epochs 2",
        "--num_classes 100": "expected 10", "--device cuda:x": "cuda:N",
        "--device tpu": "auto, cpu", "--model resnet1": "resnet18", "--model test_vit --input_size 17": "17",
        "--keep_checkpoints -1": "at least 0", "--epoch 3": "unrecognized", "--bns_form eq13": "eq12",
    },
    FINETUNE: {
        "--num_samples 0": "at least 1", "--num_samples -5": "at least 1", "--sampling_freq 0": "at least 1",
        "--sampling_freq -1": "at least 1", "--eval_freq 0": "at least 1", "--mcmc_steps 0": "at least 1",
        "--batch_size 249": "at most 248", "--num_classes 11": "expected 10", "--ipdpp_sampler best": "exact",
    },
    LINEPROB: {"--num_samples 0": "at least 1", "--batch_size 249": "at most 248", "--epochs 0": "at least 1"},
    PRETRAIN100: {"--num_classes 10": "expected 100", "--temperature 0": "above 0", "--imbalanced_factor 101": "100"},
    LINEPROB100: {"--num_classes 10": "expected 100", "--num_samples 0": "at least 1"},
    FINETUNE100: {"--num_classes 10": "expected 100", "--sampling_freq 0": "at least 1"},
}
# {bad} is the folder of the fixture, {out} a new one
FILES = {
    PRETRAIN: {
        "--resume {bad}/absent.pth": "empty.pth",  # what else is there
        "--resume {bad}/empty.pth": "empty",
        "--resume {bad}/truncated.pth": "truncated",
        "--resume {bad}/text.pth": "not written by PyTorch",
        "--resume {bad}/foreign.pth": "none of which was executed",
        "--resume {bad}/pickle.pth": "not written by PyTorch",
        "--resume {bad}/bare.pth": "no entry 'model'",
        "--resume {bad}": "no file",
        "--resume {bad}/%s/checkpoint-0.pth" % LINEPROB: "expected one of pretrain_bns",
        "--resume {bad}/%s/checkpoint-0.pth --model test_vit" % PRETRAIN: "--model test_resnet",
        "--resume {bad}/%s/checkpoint-0.pth --input_size 8" % PRETRAIN: "--input_size 16",
        "--resume {bad}/%s/checkpoint-0.pth --imbalanced_factor 10" % PRETRAIN: "--imbalanced_factor 100",
        "--resume {bad}/%s/checkpoint-0.pth --embed_dim 64" % PRETRAIN: "--embed_dim 128",
        "--resume {bad}/absent.pth auto": "auto FILE",
        "--resume auto {bad}/absent.pth": "no file",
        "--output_dir {bad}/%s --resume auto" % LINEPROB: "stage lineprob_bns",
        "--output_dir {bad}/%s" % PRETRAIN: "another run",
        "--output_dir {bad}/%s" % LINEPROB: "another run",
        "--output_dir {bad}/empty.pth": "not a folder",
        "--output_dir {bad}/empty.pth/run": "not a folder",
        "--output_dir /proc/run": "not a folder",
        "--log_dir {bad}/empty.pth --output_dir {out}": "not a folder",
    },
    LINEPROB: {
        "--resume {bad}/%s/checkpoint-0.pth" % FINETUNE: "expected one of pretrain_bns or lineprob_bns",
        "--resume {bad}/%s/checkpoint-0.pth --model test_vit" % PRETRAIN: "--model",
        "--eval {bad}/%s/checkpoint-0.pth" % FINETUNE: "expected one of lineprob_bns",
    },
    FINETUNE: {
        "--resume {bad}/%s/checkpoint-0.pth" % LINEPROB: "expected one of pretrain_bns or finetune_ipdpp",
        "--resume {bad}/%s/checkpoint-0.pth" % FINETUNE100: "--dataset cifar100",
        "--resume {bad}/%s/checkpoint-0.pth --model test_vit" % PRETRAIN: "--model",
        "--resume {bad}/%s/checkpoint-0.pth --output_dir {bad}/%s" % (PRETRAIN, FINETUNE): "another run",
        "--eval {bad}/absent.pth": "no file",
        "--eval {bad}/empty.pth": "empty",
        "--eval {bad}/foreign.pth": "none of which was executed",
        "--eval {bad}/%s/checkpoint-0.pth" % PRETRAIN: "expected one of finetune_ipdpp",
        "--eval {bad}/%s/checkpoint-0.pth" % FINETUNE100: "(100, 96)",
        "--eval {bad}/%s/checkpoint-0.pth --model test_vit" % FINETUNE: "--model",
    },
    FINETUNE100: {"--resume {bad}/%s/checkpoint-0.pth" % FINETUNE: "--dataset cifar10,"},
}
CASES = [(name, flags, expected)
         for table in (FLAGS, FILES) for name in table for flags, expected in table[name].items()]


def refuse(name, flags, expected, bad, out, capsys):
    """Run a command line that must be refused, and return what it says."""
    words = flags.format(bad=bad, out=out).split()
    before = contents(bad)
    capsys.readouterr()
    code = run(name, *words)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(f"{name}.py: error: ") and expected in error
    assert contents(bad) == before and not (bad / "ran").exists() and not contents(out)
    return error


@pytest.mark.parametrize("name, flags, expected", CASES, ids=[" ".join(case[:2]) for case in CASES])
def test_bad_flag_or_file(name, flags, expected, bad, tmp_path, capsys):
    error = refuse(name, f"{' '.join(TOY)} --output_dir {{out}}/run {flags}", expected, bad, tmp_path, capsys)
    assert flags.split()[0] in error or flags.split()[1].format(bad=bad, out=tmp_path) in error


@pytest.mark.parametrize("name, flags", [
    (PRETRAIN, "--batch_size 248"), (LINEPROB, "--num_samples 999 --batch_size 248"), (FINETUNE, "--num_samples 999"),
    (FINETUNE, "--resume {bad}/weights.pth")])
def test_unusual_but_good(name, flags, bad, tmp_path):
    assert run(name, *TOY, "--output_dir", tmp_path, *flags.format(bad=bad).split()) == 0
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device asked for")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_gpu(device, bad, tmp_path, capsys):
    flags = f"{' '.join(TOY)} --output_dir {{out}}/run --device {device}"
    refuse(PRETRAIN, flags, "0 CUDA devices", bad, tmp_path, capsys)


@pytest.mark.parametrize("root, expected", [
    ("{bad}/nothing", "cifar-10-batches-py"), ("{bad}/tampered", "data_batch_1"), ("{bad}/cut", "data_batch_1"),
    ("{bad}/empty.pth", "empty.pth")])
@pytest.mark.parametrize("name", [PRETRAIN, FINETUNE])
def test_bad_cifar(name, root, expected, bad, tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    error = refuse(name, f"--device cpu --output_dir {{out}}/run --data_root {root}", expected, bad, tmp_path, capsys)
    assert "--data_root" in error


@pytest.mark.parametrize("name", [PRETRAIN, LINEPROB, FINETUNE])
def test_loss_that_is_not_finite(name, tmp_path, capsys):
    flags = [*TOY, "--output_dir", tmp_path, "--save_freq", 1]
    assert run(name, *flags, "--epochs", 1) == 0
    before = {path: data for path, data in contents(tmp_path).items() if path.suffix == ".pth"}
    capsys.readouterr()
    code = run(name, *flags, "--epochs", 5, "--lr", "1e38", "--warmup_epochs", 0, "--resume", "auto")
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1) and "lower --lr" in error
    after = {path: data for path, data in contents(tmp_path).items() if path.suffix == ".pth"}
    assert all(after[path] == data for path, data in before.items())
    for path in after:
        assert all(value.isfinite().all() for value in load_checkpoint(path)["model"].values())


@pytest.mark.parametrize("name, flags", [
    (PRETRAIN, "--resume {bad}/foreign.pth"), (FINETUNE, "--eval {bad}/pickle.pth")])
def test_as_a_user_runs_it(name, flags, bad, tmp_path):
    flags = [*TOY, "--output_dir", str(tmp_path / "run"), *flags.format(bad=bad).split()]
    command = [sys.executable, f"{name}.py", *flags]
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (end.returncode, end.stderr.count("\n")) == (2, 1) and end.stderr.startswith(f"{name}.py: error: ")
    assert not (bad / "ran").exists() and not contents(tmp_path)


def test_ctrl_c_before_the_training(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(engine, "create_encoder", interrupted)
    assert run(PRETRAIN, *TOY, "--output_dir", tmp_path / "run") == 130
    assert len(capsys.readouterr().err.splitlines()) == 2 and not contents(tmp_path)  # the terminal's ^C, then the line


@pytest.mark.parametrize("trust", ["torch", "pickle"])
def test_the_payload_does_run_where_it_is_trusted(trust, bad, tmp_path):
    """Else the tests above would prove nothing."""
    if trust == "torch":
        torch.save(Payload(tmp_path / "ran"), tmp_path / "foreign.pth")
        torch.load(tmp_path / "foreign.pth", weights_only=False)
    else:
        pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()
