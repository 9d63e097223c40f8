"""What a user may give by mistake ends the real command line with exit code 2, in one line that names it."""
import pickle
import urllib.error
import urllib.request

import pytest
import torch
from conftest import TINY, Payload, command_line, contents, draw_few

from util.run.checkpoint import load_checkpoint
from util.toy_data import ToyCIFAR

TOY = [*TINY, "--epochs", "2", "--batch_size", "60"]
PRETRAIN, LINEPROB, FINETUNE = (f"main_cifar10_{stage}" for stage in ("pretrain_bns", "lineprob_bns", "finetune_ipdpp"))


@pytest.fixture(scope="module", autouse=True)
def few_images_throughout():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyCIFAR, "__init__", draw_few)
        yield


@pytest.fixture(scope="module")
def bad(few_images_throughout, tmp_path_factory):
    """A folder with runs, and with files of all kinds that a user may hand over by mistake, or be handed."""
    folder = tmp_path_factory.mktemp("bad")
    for name in (PRETRAIN, FINETUNE):
        flags = ["--epochs", 1, "--output_dir", folder / name]
        assert command_line(name, *TOY, *flags) == 0
    checkpoint = folder / PRETRAIN / "checkpoint-0.pth"
    whole, pretrained = checkpoint.read_bytes(), load_checkpoint(checkpoint)
    (folder / "truncated.pth").write_bytes(whole[:len(whole) // 2])
    (folder / "text.pth").write_text("<html>404</html>\n")
    torch.save(pretrained["model"], folder / "bare.pth")
    torch.save({"model": {}, "args": Payload(folder / "ran")}, folder / "foreign.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps({"model": {}, "args": Payload(folder / "ran")}))
    return folder


P, F = (f"{{bad}}/{name}/checkpoint-0.pth" for name in (PRETRAIN, FINETUNE))
CASES = [  # script, flags, what the line names
    (PRETRAIN, "--epochs 1.5", "--epochs"), (PRETRAIN, "--batch_size 128", "--batch_size"),
    (PRETRAIN, "--lr nan", "--lr"), (PRETRAIN, "--imbalanced_factor 501", "--imbalanced_factor"),
    (PRETRAIN, "--num_classes 100", "--num_classes"), (PRETRAIN, "--model test_vit --input_size 17", "--model"),
    (PRETRAIN, "--epoch 3", "--epoch"), (FINETUNE, "--ipdpp_sampler best", "--ipdpp_sampler"),
    # files
    (PRETRAIN, "--resume {bad}/absent.pth", "absent.pth"), (PRETRAIN, "--resume {bad}/truncated.pth", "truncated.pth"),
    (PRETRAIN, "--resume {bad}/text.pth", "text.pth"), (PRETRAIN, "--resume {bad}/bare.pth", "bare.pth"),
    (PRETRAIN, "--resume {bad}/foreign.pth", "foreign.pth"), (FINETUNE, "--eval {bad}/pickle.pth", "pickle.pth"),
    (PRETRAIN, f"--resume {P} --imbalanced_factor 10", "--imbalanced_factor"),
    (FINETUNE, f"--encoder {P} --model test_vit", "--model"), (FINETUNE, f"--eval {P}", "--eval"),
    # folders
    (FINETUNE, f"--output_dir {{bad}}/{PRETRAIN}", "--output_dir"),
    (FINETUNE, f"--output_dir {{bad}}/{PRETRAIN} --resume auto", "pretrain_bns"),
    (PRETRAIN, f"--output_dir {{bad}}/{PRETRAIN} --overwrite --resume {P}", "--overwrite"),
    (PRETRAIN, "--output_dir {bad}/text.pth", "text.pth"),
]


@pytest.mark.parametrize("name, flags, expected", CASES, ids=[" ".join(case[:2]) for case in CASES])
def test_bad_flag_or_file(name, flags, expected, bad, tmp_path, capsys):
    before = {path: data for path, data in contents(bad).items() if path.name != ".lock"}
    code = command_line(name, *TOY, "--output_dir", tmp_path / "run", *flags.format(bad=bad).split())
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(f"{name}.py: error: ") and expected.format(bad=bad) in error
    assert {path: data for path, data in contents(bad).items() if path.name != ".lock"} == before
    assert not (bad / "ran").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device asked for")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_gpu(device, tmp_path, capsys):
    assert command_line(PRETRAIN, *TOY, "--output_dir", tmp_path, "--device", device) == 2
    assert "0 CUDA devices" in capsys.readouterr().err


@pytest.mark.parametrize("root", ["{tmp}/new", "{bad}/text.pth"])
def test_cifar_that_is_not_there(root, bad, tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    assert command_line(PRETRAIN, "--device", "cpu", "--data_root", root.format(tmp=tmp_path, bad=bad)) == 2
    error = capsys.readouterr().err
    assert "error: --data_root" in error and error.count("\n") == 1


@pytest.mark.slow
def test_loss_that_is_not_finite(tmp_path, capsys):
    flags = [*TOY, "--output_dir", tmp_path, "--save_freq", 1]
    assert command_line(FINETUNE, *flags, "--epochs", 1) == 0
    before = {path: data for path, data in contents(tmp_path).items() if path.suffix == ".pth"}
    capsys.readouterr()
    code = command_line(FINETUNE, *flags, "--epochs", 5, "--lr", "1e38", "--warmup_epochs", 0, "--resume", "auto")
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1) and "lower --lr" in error
    assert {path: data for path, data in contents(tmp_path).items() if path.suffix == ".pth"} == before
