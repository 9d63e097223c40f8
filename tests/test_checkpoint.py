"""Checkpoints, the published ones above all: read, evaluated by each script, started from; never executed."""
import argparse
import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import final_file

import main_cifar10_pretrain_bns
from models import BNSNetwork, Classifier, create_encoder
from util.run.checkpoint import load_checkpoint, load_weights, save_checkpoint, stage_of

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
NETWORKS = {10: "resnet18", 100: "resnet34"}
def layers_after_encoder(stage, classes=10):
    """(outputs, inputs) by name."""
    if stage == "pretrain_bns":
        return {"projector.0": (2048, 512), "projector.2": (128, 2048)}
    return {"lin": (classes, 512)}


def published_weights(depths, head, seed=0):
    """Random weights and batch-norm statistics under the names of the published code."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}

    def conv(name, outputs, inputs, size):
        scale = math.sqrt(2 / (inputs * size * size))
        weights[f"{name}.weight"] = scale * torch.randn(outputs, inputs, size, size, generator=rng)

    def norm(name, channels):
        weights[f"{name}.weight"] = 0.5 + torch.rand(channels, generator=rng)
        weights[f"{name}.bias"] = 0.2 * torch.randn(channels, generator=rng)
        weights[f"{name}.running_mean"] = 0.2 * torch.randn(channels, generator=rng)
        weights[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=rng)
        weights[f"{name}.num_batches_tracked"] = torch.tensor(1234)

    conv("enc.conv1", 64, 3, 3)
    norm("enc.bn1", 64)
    inputs = 64
    for layer, depth in enumerate(depths, 1):
        for block in (f"enc.layer{layer}.{b}" for b in range(depth)):
            width = 32 * 2 ** layer
            conv(f"{block}.conv1", width, inputs, 3)
            norm(f"{block}.bn1", width)
            conv(f"{block}.conv2", width, width, 3)
            norm(f"{block}.bn2", width)
            if inputs != width:
                conv(f"{block}.shortcut.0", width, inputs, 1)
                norm(f"{block}.shortcut.1", width)
            inputs = width
    for name, (outputs, inputs) in head.items():
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, generator=rng) / math.sqrt(inputs)
        weights[f"{name}.bias"] = torch.randn(outputs, generator=rng)
    return weights


def published_forward(weights, images, depths, head):
    """Projections or logits of images (N, 3, H, W) by torch.nn.functional alone."""
    def norm(x, name):
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(weights[f"{name}.{part}"] for part in parts))

    x = F.relu(norm(F.conv2d(images, weights["enc.conv1.weight"], padding=1), "enc.bn1"))
    for layer, depth in enumerate(depths, 1):
        for b in range(depth):
            block, stride = f"enc.layer{layer}.{b}", 2 if layer > 1 and b == 0 else 1
            y = F.relu(norm(F.conv2d(x, weights[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn1"))
            y = norm(F.conv2d(y, weights[f"{block}.conv2.weight"], padding=1), f"{block}.bn2")
            if stride == 2:
                x = norm(F.conv2d(x, weights[f"{block}.shortcut.0.weight"], stride=2), f"{block}.shortcut.1")
            x = F.relu(x + y)
    x = x.mean((2, 3))
    for i, name in enumerate(head):
        x = F.linear(F.relu(x) if i else x, weights[f"{name}.weight"], weights[f"{name}.bias"])
    return x


def write_published(path, weights, stage, **flags):
    """A file as the published code writes it: AdamW over what that stage trains, and a Namespace, here with `flags`."""
    trained = [torch.nn.Parameter(value.clone()) for name, value in weights.items()
               if "running" not in name and "batches" not in name
               and (stage != "lineprob_bns" or name.startswith("lin."))]
    optimizer = torch.optim.AdamW([{"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
                                   {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05}], lr=1e-3)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    args = argparse.Namespace(batch_size=1024, blr=1e-3, num_views=2, device="cuda", lr=None, **flags)
    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "epoch": 999, "scaler": {"scale": 65536.0},
                "args": args}, path)
    return path


def run(script, *flags):
    """As conftest's `run`, of the script's own model."""
    shared = ["--toy_data", "--input_size", "8", "--device", "cpu", "--amp", "none"]
    return script.main(script.get_args_parser().parse_args([*shared, *map(str, flags)]))


@pytest.mark.parametrize("name, stage", [("resnet18", "pretrain_bns"), ("resnet18", "lineprob_bns"),
                                         pytest.param("resnet34", "finetune_ipdpp", marks=pytest.mark.slow)])
def test_published_checkpoint_gives_the_same_outputs(name, stage, tmp_path):
    depths, head = DEPTHS[name], layers_after_encoder(stage)
    weights = published_weights(depths, head)
    checkpoint = load_checkpoint(write_published(tmp_path / "published.pth", weights, stage))
    assert stage_of(checkpoint) == ("pretrain_bns" if stage == "pretrain_bns" else None)  # the others do not say
    assert checkpoint["args"]["num_views"] == 2 and checkpoint["epoch"] == 999

    encoder = create_encoder(name)
    model = BNSNetwork(encoder, 128) if stage == "pretrain_bns" else Classifier(encoder, 10)
    load_weights(model, checkpoint["model"], "published.pth")
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.eval()(images)
    expected = published_forward(weights, images, depths, head)
    torch.testing.assert_close(ours[0] if stage == "pretrain_bns" else ours, expected, atol=1e-5, rtol=1e-5)
    assert expected.std(0).min() > 0.01, "the outputs must depend on the images"


@pytest.mark.slow
@pytest.mark.parametrize("classes, stage", [(10, "pretrain_bns"), (10, "lineprob_bns"), (100, "finetune_ipdpp")])
def test_eval_of_a_published_checkpoint_is_that_of_the_same_weights(classes, stage, few_images, tmp_path):
    """The file calls its network by a name of its own, and does not say of which stage and data set it is."""
    weights = published_weights(DEPTHS[NETWORKS[classes]], layers_after_encoder(stage, classes))
    own, published = tmp_path / "own.pth", tmp_path / "published.pth"
    write_published(published, weights, stage, model="bns_resnet")
    args = {"stage": stage, "dataset": f"cifar{classes}", "model": NETWORKS[classes]}
    save_checkpoint({"model": load_checkpoint(published)["model"], "epoch": 999, "args": args}, own)
    script = importlib.import_module(f"main_cifar{classes}_{stage}")
    figures = run(script, "--eval", published)
    assert figures == run(script, "--eval", own)
    assert figures["knn_acc1" if stage == "pretrain_bns" else "test_acc1"] > 0


@pytest.mark.slow
def test_published_pretraining_goes_on_from_its_epoch(few_images, tmp_path, capsys):
    weights = published_weights(DEPTHS["resnet18"], layers_after_encoder("pretrain_bns"))
    path = write_published(tmp_path / "published.pth", weights, "pretrain_bns")
    history = run(main_cifar10_pretrain_bns, "--resume", path, "--epochs", 1001, "--batch_size", 127, "--blr", 1e-9,
                  "--output_dir", tmp_path / "out")
    assert [record["epoch"] for record in history] == [1000]
    assert "starts afresh" not in capsys.readouterr().out
    after = load_checkpoint(final_file(main_cifar10_pretrain_bns, tmp_path / "out"))["model"]
    torch.testing.assert_close(after["projector.0.weight"], weights["projector.0.weight"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(prefix, tmp_path):
    model = Classifier(create_encoder("test_resnet"), 10)
    save_checkpoint({"model": {prefix + name: value for name, value in model.state_dict().items()}}, tmp_path / "w.pth")
    other = Classifier(create_encoder("test_resnet"), 10)
    load_weights(other, load_checkpoint(tmp_path / "w.pth")["model"], "w.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("number", [np.float64(1.5), np.float32(2), np.int64(3), np.bool_(True)])
def test_numbers_of_numpy_are_plain_values(number, tmp_path):
    torch.save({"model": {}, "best": number}, tmp_path / "numpy.pth")
    assert load_checkpoint(tmp_path / "numpy.pth")["best"] == number
