"""Every kind of bad input ends the real command lines in one line, exit code 2, and with every file as it was."""
import pickle
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import TINY, Payload, command_line, contents, draw_few

import main_cifar10_pretrain_bns
from util.errors import UserError
from util.run.checkpoint import load_checkpoint
from util.run.folder import OutputFolder
from util.run.options import launch
from util.toy_data import ToyCIFAR

ROOT = Path(__file__).resolve().parent.parent
TOY = [*TINY, "--epochs", "2", "--batch_size", "60"]
PRETRAIN, LINEPROB, FINETUNE = (f"main_cifar10_{stage}" for stage in ("pretrain_bns", "lineprob_bns", "finetune_ipdpp"))
PRETRAIN100, LINEPROB100, FINETUNE100 = (name.replace("10", "100") for name in (PRETRAIN, LINEPROB, FINETUNE))


@pytest.fixture(scope="module", autouse=True)
def few_images_throughout():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyCIFAR, "__init__", draw_few)
        yield


@pytest.fixture(scope="module")
def bad(few_images_throughout, tmp_path_factory):
    """A folder with runs of all stages and files of all kinds that a user may hand over by mistake, or be handed."""
    folder = tmp_path_factory.mktemp("bad")
    for name in (PRETRAIN, LINEPROB, FINETUNE, FINETUNE100):
        draws = [] if name == PRETRAIN else ["--num_samples", 10]
        flags = ["--epochs", 1, "--save_freq", 1, "--output_dir", folder / name, *draws]
        assert command_line(name, *TOY, *flags) == 0
    checkpoint = folder / PRETRAIN / "checkpoint-0.pth"
    whole, pretrained = checkpoint.read_bytes(), load_checkpoint(checkpoint)
    finetuned = load_checkpoint(folder / FINETUNE / "checkpoint-0.pth")
    (folder / "empty.pth").touch()
    (folder / "truncated.pth").write_bytes(whole[:len(whole) // 2])
    (folder / "text.pth").write_text("<html>404</html>\n")
    torch.save(pretrained["model"], folder / "bare.pth")
    torch.save({**pretrained, "epoch": "last"}, folder / "epoch.pth")
    torch.save({**pretrained, "history": [{"loss": 1.0}]}, folder / "history.pth")
    torch.save({**pretrained, "subset": [1, 2]}, folder / "subset.pth")
    torch.save({**pretrained, "model": {5: torch.ones(1)}}, folder / "number.pth")
    torch.save({"model": finetuned["model"]}, folder / "weights.pth")
    layer = {name: value for name, value in finetuned["model"].items() if name.startswith("lin.")}
    torch.save({"model": layer}, folder / "layer.pth")
    huge = finetuned["model"] | {"lin.weight": torch.full_like(layer["lin.weight"], 3e38)}
    torch.save({**finetuned, "model": huge}, folder / "huge.pth")
    torch.save({"model": {}, "args": Payload(folder / "ran")}, folder / "foreign.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps({"model": {}, "args": Payload(folder / "ran")}))
    for name in ("tampered", "cut"):
        batches = folder / name / "cifar-10-batches-py"
        batches.mkdir(parents=True)
        (batches / "data_batch_1").write_bytes(pickle.dumps(Payload(folder / "ran")) if name == "tampered" else b"cut")
    (folder / "damaged").mkdir()
    for name in ("checkpoint-0.pth", "pretrain_bns_cifar10_if100.pth", "log.txt"):
        (folder / "damaged" / name).write_text("damaged")
    (folder / "moved").mkdir()  # a run whose folder was copied without its hidden files
    (folder / "moved" / "log.txt").write_text("")
    return folder


FLAGS = {  # each with what the line must name beside the flag
    PRETRAIN: {
        "--epochs 0": "at least 1", "--epochs -1": "at least 1", "--epochs 1.5": "whole number",
        "--batch_size 0": "at least 2", "--batch_size -4": "at least 2", "--batch_size 128": "at most 127",
        "--temperature 0": "above 0", "--temperature -1": "above 0", "--temperature 0.0119": "at least 0.0",
        "--lr 0": "above 0", "--lr -0.1": "above 0", "--lr nan": "above 0", "--lr inf": "above 0", "--blr 0": "above 0",
        "--min_lr -1": "at least 0", "--min_lr 0.1": "at most the learning rate",
        "--imbalanced_factor 0.5": "at least 1", "--imbalanced_factor 0": "at least 1",
        "--imbalanced_factor nan": "at least 1", "--imbalanced_factor 501": "500",
        "--input_size 1": "at least 2",
        "--jitter_strength -1": "from 0 to 2.5", "--jitter_strength 2.6": "from 0 to 2.5",
        "--save_freq 0": "at least 1", "--eval_freq 0": "at least 1", "--keep_checkpoints -1": "at least 0",
        "--accum_iter 0": "at least 1", "--embed_dim 0": "at least 1", "--num_extra_positives -1": "at least 0",
        "--warmup_epochs -1": "at least 0", "--start_epoch 2": "less than --epochs 2",
        "--seed -1": "from 0 to", f"--seed {2**63}": "from 0 to",
        "--num_classes 100": "expected 10", "--device cuda:x": "cuda:N", "--device tpu": "auto, cpu",
        "--model resnet1": "resnet18", "--model test_vit --input_size 17": "17",
        "--epoch 3": "unrecognized", "-d there": "unrecognized", "-drthere": "unrecognized", "-s 3": "unrecognized",
        "--bns_form eq13": "eq12", "--loss logit_adjusted": "unrecognized",
        "--logit_adjustment 1": "unrecognized",
    },
    FINETUNE: {
        "--num_samples 0": "at least 1", "--num_samples -5": "at least 1", "--sampling_freq 0": "at least 1",
        "--sampling_freq -1": "at least 1", "--eval_freq 0": "at least 1", "--mcmc_steps 0": "at least 1",
        "--batch_size 128": "at most 127", "--num_classes 11": "expected 10", "--ipdpp_sampler best": "exact",
        "--ipdpp_kernel best": "paper", "--loss focal": "logit_adjusted", "--logit_adjustment -1": "at least 0",
        "--logit_adjustment nan": "at least 0", "--logit_adjustment inf": "at least 0",
    },
    LINEPROB: {"--num_samples 0": "at least 1", "--batch_size 128": "at most 127", "--epochs 0": "at least 1",
               "--logit_adjustment none": "at least 0", "--loss logit_adjusted": "unrecognized"},
    PRETRAIN100: {"--num_classes 10": "expected 100", "--temperature 0": "above 0", "--imbalanced_factor 101": "100"},
    LINEPROB100: {"--num_classes 10": "expected 100", "--num_samples 0": "at least 1"},
    FINETUNE100: {"--num_classes 10": "expected 100", "--sampling_freq 0": "at least 1"},
}
P, L, F, F100 = (f"{{bad}}/{name}/checkpoint-0.pth" for name in (PRETRAIN, LINEPROB, FINETUNE, FINETUNE100))
FILES = {  # {bad} is the folder of the fixture, {out} a new one
    PRETRAIN: {
        "--resume {bad}/absent.pth": "empty.pth",  # what else is there
        "--resume {bad}/empty.pth": "empty",
        "--resume {bad}/truncated.pth": "truncated",
        "--resume {bad}/text.pth": "not written by PyTorch",
        "--resume {bad}/foreign.pth": "none of which was executed",
        "--resume {bad}/pickle.pth": "not written by PyTorch",
        "--resume {bad}/bare.pth": "no entry 'model'",
        "--resume {bad}/number.pth": "no entry 'model'",
        "--resume {bad}/epoch.pth": "an entry 'epoch' of type str, expected int",
        "--resume {bad}/subset.pth": "an entry 'subset' of type list, expected Tensor",
        "--resume {bad}/history.pth": "expected the lines of log.txt",
        "--resume {bad}/layer.pth": "no encoder",
        "--resume {bad}": "no file",
        f"--resume {P} --model test_vit": "--model test_resnet",
        f"--resume {P} --input_size 8": "--input_size 16",
        f"--resume {P} --imbalanced_factor 10": "--imbalanced_factor 100",
        f"--resume {P} --embed_dim 64": "--embed_dim 128",
        f"--resume {L} --model test_vit": "--model",
        "--resume {bad}/absent.pth auto": "auto FILE",
        "--resume auto auto": "auto FILE",
        "--resume {bad}/weights.pth {bad}/weights.pth": "auto FILE",
        "--resume auto {bad}/absent.pth": "no file",
        "--overwrite --resume auto": "--resume auto",
        "--start_epoch 0 --resume auto": "--resume auto",
        f"--overwrite --resume {P} --output_dir {{bad}}/{PRETRAIN}": "would delete checkpoint-0.pth",
        f"--output_dir {{bad}}/{LINEPROB} --resume auto": "stage lineprob_bns",
        f"--output_dir {{bad}}/{PRETRAIN}": "another run",
        f"--output_dir {{bad}}/{LINEPROB}": "another run",
        "--output_dir {bad}/moved": "another run (log.txt)",
        "--output_dir {bad}/empty.pth": "not a folder",
        "--output_dir {bad}/empty.pth/run": "not a folder",
        "--output_dir /proc/run": "/proc/run",
        "--resume auto --output_dir {bad}/damaged": "none of the checkpoints in",
        "--output_dir=": "empty name", "--resume=": "empty name", "--eval=": "empty name",
        "--log_dir {bad}/empty.pth": "not a folder",
        f"--log_dir {{bad}}/{PRETRAIN}": "curves of another run",
        "--eval {bad}/layer.pth": "no encoder",
        f"--eval {P} --model test_vit": "--model",
    },
    LINEPROB: {
        f"--resume {P} --model test_vit": "--model",
        f"--eval {F}": "expected one of lineprob_bns",
    },
    FINETUNE: {
        f"--resume {F100}": "--dataset cifar100",
        f"--resume {P} --model test_vit": "was trained with --model test_resnet, found --model test_vit",
        f"--resume {P} --output_dir {{bad}}/{FINETUNE}": "another run",
        "--eval {bad}/absent.pth": "no file",
        "--eval {bad}/empty.pth": "empty",
        "--eval {bad}/foreign.pth": "none of which was executed",
        "--eval {bad}/huge.pth": "not finite",
        f"--eval {P}": "expected one of finetune_ipdpp",
        f"--eval {F100}": "its script is main_cifar100_finetune_ipdpp.py",
        f"--eval {F} --model test_vit": "--model",
        f"--eval {F} --resume {P}": "--resume",
        f"--eval {F} --resume auto": "--resume",
        f"--eval {F} --overwrite": "--overwrite",
        f"--eval {F} --start_epoch 0": "--start_epoch",
        f"--num_classes 5 --eval {F}": "expected 10",
    },
    FINETUNE100: {f"--resume {F}": "--dataset cifar10,"},
}
CASES = [(name, flags, expected)
         for table in (FLAGS, FILES) for name in table for flags, expected in table[name].items()]


def refuse(name, flags, expected, bad, out, capsys):
    """Run a command line that must be refused, and return what it says."""
    words = flags.format(bad=bad, out=out).split()
    before = contents(bad)
    capsys.readouterr()
    code = command_line(name, *words)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(f"{name}.py: error: ") and expected in error
    assert contents(bad) == before and not (bad / "ran").exists()
    assert not list(out.iterdir()), "not even an empty folder is left"
    return error


@pytest.mark.parametrize("name, flags, expected", CASES, ids=[" ".join(case[:2]) for case in CASES])
def test_bad_flag_or_file(name, flags, expected, bad, tmp_path, capsys):
    error = refuse(name, f"{' '.join(TOY)} --output_dir {{out}}/new/run {flags}", expected, bad, tmp_path, capsys)
    words = [word.format(bad=bad, out=tmp_path) for word in flags.replace("=", " ").split()]
    assert any(word in error for word in words[:2])


def test_folder_in_use_by_another_run(bad, tmp_path, capsys):
    other = OutputFolder(bad / "used", bad / "used", "final.pth", 3)
    other.claim(None, continues=False, auto=False, overwrite=False)
    try:
        for flags in ("", "--overwrite", "--resume auto"):
            refuse(PRETRAIN, f"{' '.join(TOY)} --output_dir {{bad}}/used {flags}", "in use", bad, tmp_path, capsys)
    finally:
        other.release()


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [
    (PRETRAIN, f"--batch_size 127 --warmup_epochs 9 --seed {2**63 - 1}"),
    (LINEPROB, "--num_samples 999 --batch_size 127"),
    (FINETUNE, "--num_samples 999 --loss logit_adjusted --logit_adjustment 0 --resume {bad}/weights.pth")])
def test_unusual_but_good(name, flags, bad, tmp_path):
    assert command_line(name, *TOY, "--output_dir", tmp_path, *flags.format(bad=bad).split()) == 0
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device asked for")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_gpu(device, bad, tmp_path, capsys):
    flags = f"{' '.join(TOY)} --output_dir {{out}}/run --device {device}"
    refuse(PRETRAIN, flags, "0 CUDA devices", bad, tmp_path, capsys)


@pytest.mark.parametrize("root, expected", [
    ("{out}/new", "cifar-10-batches-py"), ("{out}/new/data", "cifar-10-batches-py"),
    ("{bad}/tampered/cifar-10-batches-py", "the folder that holds it, {bad}/tampered\n"),
    ("{bad}/tampered", "data_batch_1"), ("{bad}/cut", "data_batch_1"), ("{bad}/empty.pth", "empty.pth")])
@pytest.mark.parametrize("name", [PRETRAIN, FINETUNE])
def test_bad_cifar(name, root, expected, bad, tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    flags = f"--device cpu --output_dir {{out}}/run --data_root {root}"
    error = refuse(name, flags, expected.format(bad=bad), bad, tmp_path, capsys)
    assert "--data_root" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", [PRETRAIN, LINEPROB, FINETUNE])
def test_loss_that_is_not_finite(name, tmp_path, capsys):
    flags = [*TOY, "--output_dir", tmp_path, "--save_freq", 1]
    assert command_line(name, *flags, "--epochs", 1) == 0
    before = {path: data for path, data in contents(tmp_path).items() if path.suffix == ".pth"}
    capsys.readouterr()
    code = command_line(name, *flags, "--epochs", 5, "--lr", "1e38", "--warmup_epochs", 0, "--resume", "auto")
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1) and "lower --lr" in error
    after = {path: data for path, data in contents(tmp_path).items() if path.suffix == ".pth"}
    assert all(after[path] == data for path, data in before.items())
    for path in after:
        assert all(value.isfinite().all() for value in load_checkpoint(path)["model"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [
    (PRETRAIN, "--resume {bad}/foreign.pth"), (FINETUNE, "--eval {bad}/pickle.pth")])
def test_as_a_user_runs_it(name, flags, bad, tmp_path):
    flags = [*TOY, "--output_dir", str(tmp_path / "run"), *flags.format(bad=bad).split()]
    command = [sys.executable, f"{name}.py", *flags]
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (end.returncode, end.stderr.count("\n")) == (2, 1) and end.stderr.startswith(f"{name}.py: error: ")
    assert not (bad / "ran").exists() and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_eval_into_head(bad):
    """`--eval FILE | head -1`: the reader leaves before all is printed, and no traceback follows."""
    checkpoint = bad / FINETUNE / "checkpoint-0.pth"
    command = f"{sys.executable} {FINETUNE}.py --eval {checkpoint} --device cpu --amp none | head -1"
    end = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert end.stdout.startswith("from the checkpoint: toy_data True") and end.stdout.count("\n") == 1
    assert end.stderr == ""


def test_ctrl_c_before_the_training(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(SystemExit) as end:
        launch(interrupted, main_cifar10_pretrain_bns.get_args_parser())
    assert end.value.code == 130
    assert len(capsys.readouterr().err.splitlines()) == 2  # the terminal's ^C, then the line


@pytest.mark.parametrize("trust", ["torch", "pickle"])
def test_the_payload_does_run_where_it_is_trusted(trust, tmp_path):
    """Else the tests above would prove nothing."""
    if trust == "torch":
        torch.save(Payload(tmp_path / "ran"), tmp_path / "foreign.pth")
        torch.load(tmp_path / "foreign.pth", weights_only=False)
    else:
        pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_ends_in_one_line(error, capsys):
    def exhausted(args):
        raise error
    with pytest.raises(SystemExit, match="2"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{PRETRAIN}.py"])
        launch(exhausted, main_cifar10_pretrain_bns.get_args_parser())
    said = capsys.readouterr().err
    assert "out of memory: lower --batch_size" in said and said.count("\n") == 1


def test_other_errors_keep_their_traceback():
    def broken(args):
        raise RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="a fault of ours"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{PRETRAIN}.py"])
        launch(broken, main_cifar10_pretrain_bns.get_args_parser())


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")
    (tmp_path / "file.pth").touch()
    monkeypatch.setattr(torch, "load", denied)
    with pytest.raises(UserError, match="--eval: .*file.pth could not be read: Permission denied"):
        load_checkpoint(tmp_path / "file.pth", "--eval")


@pytest.mark.parametrize("flag", ["--output_dir", "--eval=x", "--overwrite", "--help", "--seed"])
def test_demo_refuses_what_its_scripts_cannot_share(flag):
    done = subprocess.run(["bash", str(ROOT / "demo.sh"), flag], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and f"demo.sh: found {flag}, expected" in done.stderr
