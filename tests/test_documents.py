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
# Of the files in results/ that are named for their stage, the log that each is the end of.
OWN_LOG = {"pretrain_bns": "bns-seed0.txt", "lineprob_bns": "bns-probe-seed42.txt",
           "finetune_ipdpp": "bns-ipdpp-seed42.txt"}


def python_block(content, monkeypatch):
    """The names that README's Python block with this content leaves."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2, "each has a test here"
    block, = (block for block in blocks if content in block)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(block, names)
    return names


def test_readme_loads_the_encoder_of_a_file(monkeypatch):
    names = python_block("load_encoder(", monkeypatch)
    assert names["encoder"].eval()(torch.rand(2, 3, 32, 32)).shape == (2, 64)
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


def test_readmes_own_data_set_passes_all_stages(tmp_path, monkeypatch):
    """Of images of 48 x 32 pixels with labels of int32, and without a test image of the last class."""
    monkeypatch.setitem(DATASETS, "birds", None)  # so that it is gone after the test
    python_block("class Birds", monkeypatch)
    for part, counts in (("train", [110, 30, 12]), ("test", [10, 10, 0])):
        labels = np.repeat(np.arange(3, dtype=np.int32), counts)
        noise = np.random.default_rng(len(labels)).integers(0, 100, (len(labels), 48, 32, 3))
        images = (noise + 50 * labels[:, None, None, None]).astype(np.uint8)
        np.savez(tmp_path / f"{part}.npz", images=images, labels=labels)

    def trained(stage, *flags):
        script = importlib.import_module(f"main_cifar10_{stage}")
        parser = script.get_args_parser()
        parser.set_defaults(dataset="birds", num_classes=3, data_root=str(tmp_path))
        common = ["--model", "test_resnet", "--device", "cpu", "--amp", "none", "--imbalanced_factor", 10,
                  "--input_size", 16, "--output_dir", tmp_path / stage]
        if "--eval" not in flags:
            common += ["--epochs", 2, "--batch_size", 16, "--lr", 3e-3, "--warmup_epochs", 0]
        result = script.main(parser.parse_args([str(flag) for flag in (*common, *flags)]))
        return result, tmp_path / stage / f"{stage}_birds_if10.pth"

    history, extractor = trained("pretrain_bns", "--eval_freq", 1)
    knn, _ = trained("pretrain_bns", "--eval", extractor)
    assert knn["knn_acc1"] == history[-1]["knn_acc1"]
    for stage in ("lineprob_bns", "finetune_ipdpp"):
        history, final = trained(stage, "--num_samples", 10, "--resume", extractor)
        figures, _ = trained(stage, "--eval", final)
        assert figures == {name: value for name, value in history[-1].items() if name.startswith("test_")}
        assert list(final.parent.glob("*/test_features/sprite.png")), "the pictures of the last epoch"
        many, medium, absent = figures["test_per_class"]
        assert absent is figures["test_few"] is None and math.isfinite(figures["test_loss"])
        assert figures["test_acc1"] == pytest.approx(100 * (many + medium) / 2)
        assert [record["train_images"] for record in history] == [30] * 2


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/*_if*.pth")),
                         ids=lambda path: f"{path.parent.name}/{path.name}")
def test_weights_in_results_give_the_figures_of_their_own_log(path, cifar_root, capsys):
    """A file is named for its stage, or for the run that wrote it. README prints what --eval of one of them says."""
    trained = load_checkpoint(path)["args"]
    run, dataset = re.fullmatch(r"(\S+)_(cifar\d+)_if100", path.stem).groups()
    assert dataset == trained["dataset"] and (run == trained["stage"] or run not in OWN_LOG)
    log = OWN_LOG[run] if run in OWN_LOG else f"{run}-seed{trained['seed']}.txt"
    name = "knn_acc1" if trained["stage"] == "pretrain_bns" else "test_acc1"
    script = importlib.import_module(f"main_{dataset}_{trained['stage']}")
    figures = script.main(script.get_args_parser().parse_args(["--data_root", cifar_root, "--eval", str(path)]))
    expected = json.loads((path.parent / log).read_text().splitlines()[-1])[name]
    assert figures[name] == pytest.approx(expected, abs=0.2)  # what another processor's arithmetic may change
    if f"--eval {path.relative_to(ROOT)}" in README:
        numbers, lines = re.compile(r"\d+\.\d+"), re.compile(r"\* .*Acc@1.*")
        printed = [list(map(float, numbers.findall(line))) for line in lines.findall(README)]
        for line in lines.findall(capsys.readouterr().out):
            assert pytest.approx(list(map(float, numbers.findall(line))), rel=3e-3) in printed
