"""README's first command, its Python block, what it says of data sets of one's own, and the weights it offers."""
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

from util import imbalanced_cifar
from util.imbalanced_cifar import long_tailed_counts
from util.run.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# Whose log each of the files in results/ is the end of, and by which figure of it that can be told.
OWN_LOG = {"pretrain_bns": ("bns-seed0.txt", "knn_acc1"), "lineprob_bns": ("bns-probe-seed42.txt", "test_acc1"),
           "finetune_ipdpp": ("bns-ipdpp-seed42.txt", "test_acc1")}


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_of_the_readme_run(block, monkeypatch):
    """Each leaves an `encoder` of the shapes that its comment promises, with the weights of the file."""
    monkeypatch.chdir(ROOT)
    names = {}
    exec(block, names)
    promised = re.search(r"features \(N, (\d+)\) of float images \(N, (.*?)\)", block)
    width, shape = int(promised[1]), [int(size) for size in promised[2].split(",")]
    features = names["encoder"].eval()(torch.rand(2, *shape))
    assert features.shape == (2, width)
    saved = load_checkpoint(ROOT / names["path"])["model"]
    for name, value in names["encoder"].state_dict().items():
        assert torch.equal(value, saved[f"enc.{name}"])


@pytest.mark.slow
def test_first_command_of_the_readme(tmp_path):
    """In a copy, with small images and one epoch a stage."""
    assert "&& bash demo.sh\n" in README
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".sh"):
            shutil.copy(path, tmp_path)
        elif path.name in ("util", "models"):
            shutil.copytree(path, tmp_path / path.name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    flags = ["--epochs", "1", "--input_size", "16", "--device", "cpu", "--amp", "none"]
    done = subprocess.run(["bash", str(tmp_path / "demo.sh"), *flags], cwd="/", text=True, capture_output=True,
                          env={**os.environ, "PATH": path, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "output_dir" / "demo"
    for name, title in (("cross_entropy", "plain cross-entropy"), ("finetune_ipdpp", "stages 1 and 2"),
                        ("lineprob_bns", "stage 1, linear layer on frozen features")):
        record, = (json.loads(line) for line in (folder / name / "log.txt").read_text().splitlines())
        row = re.search(rf"^{title} +([\d.]+|none) +([\d.]+|none) +([\d.]+|none) +([\d.]+)$", done.stdout, re.MULTILINE)
        assert float(row[4]) == pytest.approx(record["test_acc1"] / 100, abs=1e-3)
        assert row.groups()[:3] == tuple(f"{record[f'test_{shots}']:.3f}" for shots in ("many", "medium", "few"))


class Oblong:
    """A data set such as README asks for: 48 x 32 pixels, labels of int32, and no test images of its last class."""
    num_classes, shot_thresholds, classes = 4, (20, 8), ["north", "east", "south", "west"]

    @classmethod
    def fetch(cls, root):
        assert root == "here"

    def __init__(self, root, imbalanced_factor, train):
        counts = long_tailed_counts(4, 30, imbalanced_factor) if train else np.array([10, 10, 10, 0])
        self.class_counts = counts
        self.targets = np.repeat(np.arange(4, dtype=np.int32), counts)
        rng = np.random.default_rng(train)
        noise = rng.integers(0, 100, (len(self.targets), 48, 32, 3))
        self.data = (noise + 50 * self.targets[:, None, None, None]).astype(np.uint8)

    def __len__(self):
        return len(self.data)


def test_a_data_set_of_ones_own_passes_all_stages(tmp_path, monkeypatch):
    assert "name it in `DATASETS`" in README
    monkeypatch.setitem(imbalanced_cifar.DATASETS, "oblong", Oblong)

    def trained(stage, *flags):
        script = importlib.import_module(f"main_cifar10_{stage}")
        parser = script.get_args_parser()
        parser.set_defaults(dataset="oblong", num_classes=4, data_root="here")
        common = ["--model", "test_resnet", "--device", "cpu", "--amp", "none", "--imbalanced_factor", 10,
                  "--input_size", 16, "--output_dir", tmp_path / stage]
        if "--eval" not in flags:
            common += ["--epochs", 2, "--batch_size", 16, "--lr", 3e-3, "--warmup_epochs", 0]
        result = script.main(parser.parse_args([str(flag) for flag in (*common, *flags)]))
        return result, tmp_path / stage / f"{stage}_oblong_if10.pth"

    history, extractor = trained("pretrain_bns", "--eval_freq", 1)
    knn, _ = trained("pretrain_bns", "--eval", extractor)
    assert knn["knn_acc1"] == history[-1]["knn_acc1"]
    for stage in ("lineprob_bns", "finetune_ipdpp"):
        history, final = trained(stage, "--num_samples", 10, "--resume", extractor)
        figures, _ = trained(stage, "--eval", final)
        assert figures == {name: value for name, value in history[-1].items() if name.startswith("test_")}
        right = [share for share in figures["test_per_class"] if share is not None]
        assert len(right) == 3 and figures["test_per_class"][3] is None
        assert figures["test_acc1"] == pytest.approx(100 * sum(right) / 3)
        assert figures["test_few"] == right[2] and math.isfinite(figures["test_loss"])  # of 6 training images, not of 3
        assert [record["train_images"] for record in history] == [10 + 10 + 6 + 3] * 2


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/*_if*.pth")),
                         ids=lambda path: f"{path.parent.name}/{path.name}")
def test_weights_in_results_give_the_figures_of_their_own_log(path, cifar_root, capsys):
    stage, dataset = re.fullmatch(r"(\w+?)_(cifar\d+)_if100", path.stem).groups()
    log, name = OWN_LOG[stage]
    expected = json.loads((path.parent / log).read_text().splitlines()[-1])[name]
    script = importlib.import_module(f"main_{dataset}_{stage}")
    flags = ["--data_root", cifar_root, "--eval", str(path)]
    figures = script.main(script.get_args_parser().parse_args(flags))
    assert figures[name] == pytest.approx(expected, abs=0.2)  # what another processor's arithmetic may change
    if f"{path.parent.name}/{path.name}" in README:
        numbers, lines = re.compile(r"\d+\.\d+"), re.compile(r"\* .*Acc@1.*")
        printed = [list(map(float, numbers.findall(line))) for line in lines.findall(README)]
        for line in lines.findall(capsys.readouterr().out):
            assert pytest.approx(list(map(float, numbers.findall(line))), rel=3e-3) in printed
