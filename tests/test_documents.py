"""README's first command, its blocks of Python, and the weights in results/."""
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from util.imbalanced_cifar import DATASETS
from util.run.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BIRDS, NOTEBOOK = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # each has a test here
# Of the files in results/ that are named for their stage, the run that each is the end of.
OWN_RUN = {"pretrain_bns": "bns-seed0", "lineprob_bns": "bns-probe-seed42", "finetune_ipdpp": "bns-ipdpp-seed42"}


def test_readme_loads_the_encoder_of_a_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(NOTEBOOK, names)
    assert names["encoder"].eval()(torch.rand(2, 3, 32, 32)).shape == (2, 64)
    saved = load_checkpoint(names["path"])["model"]
    for name, value in names["encoder"].state_dict().items():
        assert torch.equal(value, saved[f"enc.{name}"])


@pytest.mark.slow
def test_first_command_of_the_readme(tmp_path):
    """In a copy, with small images and one epoch a stage."""
    assert "&& bash demo.sh\n" in README
    for path in (*ROOT.glob("*.py"), ROOT / "demo.sh"):
        shutil.copy(path, tmp_path)
    for folder in ("util", "models"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    flags = ["--epochs", "1", "--input_size", "16", "--device", "cpu", "--amp", "none"]
    done = subprocess.run(["bash", str(tmp_path / "demo.sh"), *flags], cwd="/", text=True, capture_output=True,
                          env={**os.environ, "PATH": path, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    for name, title in (("cross_entropy", "plain cross-entropy"), ("finetune_ipdpp", "stages 1 and 2"),
                        ("lineprob_bns", "stage 1, linear layer on frozen features")):
        record = json.loads((tmp_path / "output_dir" / "demo" / name / "log.txt").read_text())
        figures = [*(record[f"test_{shots}"] for shots in ("many", "medium", "few")), record["test_acc1"] / 100]
        row = " +".join([title, *(f"{figure:.3f}" for figure in figures)])
        assert re.search(f"^{row}$", done.stdout, re.MULTILINE), row


def test_readmes_own_data_set_passes_all_stages(tmp_path, monkeypatch):
    """Of images of 48 x 32 pixels with labels of int32, and without a test image of the last class."""
    monkeypatch.setitem(DATASETS, "birds", None)  # so that it is gone after the test
    exec(BIRDS, {})
    for part, counts in (("train", [110, 30, 12]), ("test", [10, 10, 0])):
        labels = np.repeat(np.arange(3, dtype=np.int32), counts)
        images = np.random.default_rng(0).integers(0, 256, (len(labels), 48, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{part}.npz", images=images, labels=labels)

    def run(stage, *flags):
        """What the stage's script returns."""
        script = importlib.import_module(f"main_cifar10_{stage}")
        parser = script.get_args_parser()
        parser.set_defaults(dataset="birds", num_classes=3, data_root=str(tmp_path))
        common = ["--model", "test_resnet", "--device", "cpu", "--amp", "none", "--imbalanced_factor", 10,
                  "--input_size", 16, "--output_dir", tmp_path / stage, "--epochs", 2, "--batch_size", 16]
        return script.main(parser.parse_args([str(flag) for flag in (*common, *flags)]))

    training = ["--lr", 3e-3, "--warmup_epochs", 0, "--eval_freq", 1]
    later = [*training, "--num_samples", 10, "--resume", tmp_path / "pretrain_bns" / "pretrain_bns_birds_if10.pth"]
    for stage, kind, flags in (("pretrain_bns", "knn_", training), ("lineprob_bns", "test_", later),
                               ("finetune_ipdpp", "test_", later)):
        last = run(stage, *flags)[-1]
        figures = run(stage, "--eval", tmp_path / stage / f"{stage}_birds_if10.pth")
        assert figures == {name: value for name, value in last.items() if name.startswith(kind)}
    many, medium, absent = figures["test_per_class"]
    assert absent is figures["test_few"] is None and math.isfinite(figures["test_loss"])
    assert figures["test_acc1"] == pytest.approx(100 * (many + medium) / 2) and last["train_images"] == 30


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/*_if*.pth")),
                         ids=lambda path: f"{path.parent.name}/{path.name}")
def test_weights_in_results_give_the_figures_of_their_own_log(path, cifar_root, capsys):
    """A file is named for its stage or for its variant. README prints what --eval of one of them says."""
    flags = load_checkpoint(path)["args"]
    name = path.stem.removesuffix(f"_{flags['dataset']}_if100")
    log = path.with_name(OWN_RUN.get(name, f"{name}-seed{flags['seed']}") + ".txt")
    script = importlib.import_module(f"main_{flags['dataset']}_{flags['stage']}")
    figures = script.main(script.get_args_parser().parse_args(["--data_root", cifar_root, "--eval", str(path)]))
    figure = "knn_acc1" if flags["stage"] == "pretrain_bns" else "test_acc1"
    expected = json.loads(log.read_text().splitlines()[-1])[figure]
    assert figures[figure] == pytest.approx(expected, abs=0.2)  # what another processor's arithmetic may change
    if f"--eval {path.relative_to(ROOT)}" in README:
        numbers, lines = re.compile(r"\d+\.\d+"), re.compile(r"\* .*Acc@1.*")
        printed = [list(map(float, numbers.findall(line))) for line in lines.findall(README)]
        for line in lines.findall(capsys.readouterr().out):
            assert pytest.approx(list(map(float, numbers.findall(line))), rel=3e-3) in printed
