"""What a user may give by mistake ends the real command line with exit code 2, in one line that names it."""
import pickle
import urllib.error
import urllib.request

import pytest
import torch
from conftest import FINETUNE, PRETRAIN, TINY, Payload, command_line, contents, draw_few

from util.run.checkpoint import load_checkpoint
from util.toy_data import ToyCIFAR

pytestmark = pytest.mark.usefixtures("few_images")
TOY = [*TINY, "--epochs", "2", "--batch_size", "60"]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with runs, and with files of all kinds that a user may hand over by mistake, or be handed."""
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyCIFAR, "__init__", draw_few)
        for name in (PRETRAIN, FINETUNE):
            assert command_line(name, *TOY, "--epochs", 1, "--output_dir", folder / name) == 0
    checkpoint = folder / PRETRAIN / "checkpoint-0.pth"
    whole = checkpoint.read_bytes()
    (folder / "truncated.pth").write_bytes(whole[:len(whole) // 2])
    (folder / "text.pth").write_text("<html>404</html>\n")
    torch.save(load_checkpoint(checkpoint)["model"], folder / "bare.pth")
    torch.save({"model": {}, "args": Payload(folder / "ran")}, folder / "foreign.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps({"model": {}, "args": Payload(folder / "ran")}))
    return folder


P = f"{{bad}}/{PRETRAIN}/checkpoint-0.pth"
CASES = [  # script, flags, what the line names
    (PRETRAIN, "--batch_size 128", "--batch_size"), (PRETRAIN, "--lr nan", "--lr"),
    (PRETRAIN, "--imbalanced_factor 501", "--imbalanced_factor"), (PRETRAIN, "--num_classes 100", "--num_classes"),
    (PRETRAIN, "--model test_vit", "--model"), (PRETRAIN, "--epoch 3", "--epoch"),
    (PRETRAIN, "--device cuda:9", "--device"),
    # files
    *((PRETRAIN, f"--resume {{bad}}/{name}.pth", f"{name}.pth")
      for name in ("absent", "truncated", "text", "bare", "foreign")),
    (FINETUNE, "--eval {bad}/pickle.pth", "pickle.pth"), (FINETUNE, f"--eval {P}", "--eval"),
    (PRETRAIN, f"--resume {P} --imbalanced_factor 10", "--imbalanced_factor"),
    (PRETRAIN, f"--resume {P} --opt sgd", "--opt"),
    (FINETUNE, f"--encoder {P} --model cifar_resnet20", "--model"),
    # folders
    (FINETUNE, f"--output_dir {{bad}}/{PRETRAIN}", "--output_dir"),
    (FINETUNE, f"--output_dir {{bad}}/{PRETRAIN} --resume auto", "pretrain_bns"),
    (PRETRAIN, f"--output_dir {{bad}}/{PRETRAIN} --overwrite --resume {P}", "--overwrite"),
    (PRETRAIN, "--output_dir {bad}/text.pth", "text.pth"),
]


@pytest.mark.parametrize("name, flags, expected", CASES, ids=[" ".join(case[:2]) for case in CASES])
def test_bad_flag_or_file(name, flags, expected, bad, tmp_path, capsys):
    before = contents(bad)
    code = command_line(name, *TOY, "--output_dir", tmp_path / "run", *flags.format(bad=bad).split())
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1) and error.startswith(f"{name}.py: error: ") and expected in error
    assert contents(bad) == before and not (bad / "ran").exists()


def test_cifar_that_is_not_there(tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    assert command_line(PRETRAIN, "--device", "cpu", "--data_root", tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert "error: --data_root" in error and error.count("\n") == 1


def test_a_loss_that_is_not_finite_leaves_the_checkpoints_as_they_are(tmp_path, capsys):
    flags = [*TOY, "--output_dir", tmp_path, "--save_freq", 1]
    assert command_line(FINETUNE, *flags, "--epochs", 1) == 0
    before = contents(tmp_path)
    code = command_line(FINETUNE, *flags, "--epochs", 5, "--lr", "1e38", "--warmup_epochs", 0, "--resume", "auto")
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1) and "--lr" in error
    after = contents(tmp_path)
    assert {name: after[name] for name in before if "tfevents" not in name} == {
        name: data for name, data in before.items() if "tfevents" not in name}
    assert not [name for name in after if name not in before and name.endswith(".pth")]
