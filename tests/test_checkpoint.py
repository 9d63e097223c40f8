"""Checkpoints as the paper's authors publish them: read, evaluated, continued; and what a full disk leaves."""
import argparse
import errno
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PRETRAIN, contents, final_file, load
from torch import nn

from models import BNSNetwork, Classifier, create_encoder
from util.run.checkpoint import load_checkpoint, load_weights, save_checkpoint, stage_of
from util.toy_data import ToyCIFAR

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
NUMBERS = [np.float64(1.5), np.float32(2), np.int64(3), np.bool_(True)]


class Block(nn.Module):
    """A block of the published code's ResNets, which is that of the field's CIFAR code."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Encoder(nn.Module):
    def __init__(self, depths):
        super().__init__()
        self.conv1, self.bn1, inputs = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), 64
        for layer, depth in enumerate(depths, 1):
            width, stride = 32 * 2 ** layer, 1 if layer == 1 else 2
            blocks = [Block(inputs, width, stride), *(Block(width, width, 1) for _ in range(depth - 1))]
            setattr(self, f"layer{layer}", nn.Sequential(*blocks))
            inputs = width

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


class Published(nn.Module):
    """The published code's network of a stage, with its names, in eval mode, with random weights and statistics."""

    def __init__(self, stage, name, classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.enc = Encoder(DEPTHS[name])
        if stage == "pretrain_bns":
            self.projector = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 128))
        else:
            self.lin = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                for values in (module.weight, module.running_var):
                    nn.init.uniform_(values, 0.5, 1.5)
                for values in (module.bias, module.running_mean):
                    nn.init.normal_(values, std=0.2)
        self.eval()

    @torch.no_grad()
    def forward(self, x):
        return (self.projector if hasattr(self, "projector") else self.lin)(self.enc(x))


def write_published(path, network, prefix=""):
    """A file as the published code writes it: AdamW after a step, and a Namespace that tells no stage or data set."""
    trained = [nn.Parameter(parameter.clone()) for parameter in network.parameters()]
    optimizer = torch.optim.AdamW([{"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
                                   {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05}], lr=1e-3)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    args = argparse.Namespace(batch_size=1024, blr=1e-3, num_views=2, device="cuda", lr=None, model="bns_resnet")
    torch.save({"model": {prefix + name: value for name, value in network.state_dict().items()}, "args": args,
                "optimizer": optimizer.state_dict(), "epoch": 999, "scaler": {"scale": 65536.0}, "best": NUMBERS}, path)
    return path


def run(script, *flags):
    """As conftest's `run`, of the script's own model."""
    flags = ["--toy_data", "--input_size", 8, "--device", "cpu", "--amp", "none", *flags]
    return load(script).main(load(script).get_args_parser().parse_args([str(flag) for flag in flags]))


@pytest.mark.parametrize("stage, name, prefix", [("pretrain_bns", "resnet18", ""),
                                                 ("finetune_ipdpp", "resnet34", "module.")])
def test_published_checkpoint_gives_the_same_outputs(stage, name, prefix, tmp_path):
    network, images = Published(stage, name), torch.rand(4, 3, 32, 32)
    checkpoint = load_checkpoint(write_published(tmp_path / "published.pth", network, prefix))
    assert stage_of(checkpoint) == ("pretrain_bns" if stage == "pretrain_bns" else None)  # the others do not say
    assert checkpoint["args"]["num_views"] == 2 and (checkpoint["epoch"], checkpoint["best"]) == (999, NUMBERS)

    encoder = create_encoder(name)
    model = BNSNetwork(encoder, 128) if stage == "pretrain_bns" else Classifier(encoder, 10)
    load_weights(model, checkpoint["model"], "published.pth")
    with torch.no_grad():
        outputs = model.eval()(images)
    expected = network(images)
    torch.testing.assert_close(outputs[0] if stage == "pretrain_bns" else outputs, expected, atol=1e-5, rtol=1e-5)
    assert expected.std(0).min() > 0.01, "the outputs must depend on the images"


@pytest.mark.slow
@pytest.mark.parametrize("classes, name, stage", [(10, "resnet18", "lineprob_bns"),
                                                  (100, "resnet34", "finetune_ipdpp")])
def test_published_checkpoint_is_evaluated(classes, name, stage, few_images, tmp_path):
    network, toy = Published(stage, name, classes), ToyCIFAR(classes, train=False)
    images = torch.from_numpy(toy.data).permute(0, 3, 1, 2) / 255
    logits = network(F.interpolate(images, size=(8, 8), mode="bilinear", antialias=True))
    path = write_published(tmp_path / "published.pth", network)
    figures = run(f"main_cifar{classes}_{stage}", "--eval", path)
    targets = torch.tensor(toy.targets)
    assert figures["test_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-4)
    assert figures["test_acc1"] == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())


@pytest.mark.slow
def test_published_pretraining_goes_on_from_its_epoch(few_images, tmp_path):
    network = Published("pretrain_bns", "resnet18")
    path = write_published(tmp_path / "published.pth", network)
    history = run(PRETRAIN, "--resume", path, "--epochs", 1001, "--batch_size", 127, "--blr", 1e-9,
                  "--output_dir", tmp_path / "out")
    assert [record["epoch"] for record in history] == [1000]
    after = load_checkpoint(final_file(PRETRAIN, tmp_path / "out"))
    assert {moments["step"].item() for moments in after["optimizer"]["state"].values()} == {2}
    for name, value in network.projector.state_dict().items():
        torch.testing.assert_close(after["model"][f"projector.{name}"], value, atol=1e-6, rtol=0)


def test_a_file_that_cannot_be_flushed_to_the_disk_stays_as_it_was(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_checkpoint({"model": {}}, tmp_path / "last.pth")
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="last.pth"):
        save_checkpoint({"model": {"weight": torch.ones(2)}}, tmp_path / "last.pth")
    assert contents(tmp_path) == before
