import argparse
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import main_cifar10_finetune_ipdpp
import main_cifar10_lineprob_bns
import main_cifar10_pretrain_bns
from models import BNSNetwork, Classifier, create_encoder
from util.checkpoint import load_checkpoint, load_weights, save_checkpoint, stage_of
from util.errors import UserError
from util.toy_data import ToyCIFAR

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
HEADS = {"pretrain_bns": {"projector.0": (2048, 512), "projector.2": (128, 2048)},
         "lineprob_bns": {"lin": (10, 512)}, "finetune_ipdpp": {"lin": (10, 512)}}


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


def write_published(path, weights, stage):
    """A file as the published code writes it: AdamW over what that stage trains, and a Namespace."""
    trained = [torch.nn.Parameter(value.clone()) for name, value in weights.items()
               if "running" not in name and "batches" not in name
               and (stage != "lineprob_bns" or name.startswith("lin."))]
    optimizer = torch.optim.AdamW([{"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
                                   {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05}], lr=1e-3)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "epoch": 999, "scaler": {"scale": 65536.0},
                "args": argparse.Namespace(batch_size=1024, blr=1e-3, num_views=2, device="cuda", lr=None)}, path)
    return path


def run(script, *flags):
    shared = ["--toy_data", "--input_size", "8", "--device", "cpu", "--amp", "none"]
    return script.main(script.get_args_parser().parse_args([*shared, *map(str, flags)]))


@pytest.mark.parametrize("name, stage", [("resnet18", "pretrain_bns"), ("resnet18", "lineprob_bns"),
                                         ("resnet34", "finetune_ipdpp")])
def test_published_checkpoint_gives_the_same_outputs(name, stage, tmp_path):
    depths, head = DEPTHS[name], HEADS[stage]
    weights = published_weights(depths, head)
    checkpoint = load_checkpoint(write_published(tmp_path / "published.pth", weights, stage))
    assert stage_of(checkpoint) == stage
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


@pytest.mark.parametrize("script, stage", [(main_cifar10_lineprob_bns, "lineprob_bns"),
                                           (main_cifar10_finetune_ipdpp, "finetune_ipdpp")])
def test_eval_of_a_published_checkpoint(script, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    depths, head = DEPTHS["resnet18"], HEADS[stage]
    weights = published_weights(depths, head)
    path = write_published(tmp_path / "published.pth", weights, stage)
    metrics = run(script, "--eval", path)
    assert stage_of(load_checkpoint(path)) == stage

    test_set = ToyCIFAR(10, train=False)
    images = torch.from_numpy(test_set.data).permute(0, 3, 1, 2) / 255
    images = F.interpolate(images, size=(8, 8), mode="bilinear", antialias=True)
    logits = published_forward(weights, images, depths, head).double()
    labels = torch.tensor(test_set.targets)
    assert metrics["acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["published.pth"]


def test_published_extractor_starts_a_later_stage(tmp_path):
    weights = published_weights(DEPTHS["resnet18"], HEADS["pretrain_bns"])
    path = write_published(tmp_path / "published.pth", weights, "pretrain_bns")
    out = tmp_path / "probe"
    run(main_cifar10_lineprob_bns, "--resume", path, "--epochs", 1, "--num_samples", 5, "--output_dir", out)
    probed = load_checkpoint(out / "lineprob_bns_cifar10_if100.pth")["model"]
    for name, value in weights.items():
        if name.startswith("enc."):
            assert torch.equal(probed[name.replace("shortcut", "downsample")], value), name
    run(main_cifar10_lineprob_bns, "--eval", out / "lineprob_bns_cifar10_if100.pth")  # own files, in the same call


def test_published_pretraining_goes_on_from_its_epoch(tmp_path, capsys):
    weights = published_weights(DEPTHS["resnet18"], HEADS["pretrain_bns"])
    path = write_published(tmp_path / "published.pth", weights, "pretrain_bns")
    history = run(main_cifar10_pretrain_bns, "--resume", path, "--epochs", 1001, "--batch_size", 1236, "--blr", 1e-9,
                  "--output_dir", tmp_path / "out")
    assert [record["epoch"] for record in history] == [1000]
    assert "starts afresh" not in capsys.readouterr().out
    after = load_checkpoint(tmp_path / "out" / "pretrain_bns_cifar10_if100.pth")["model"]
    torch.testing.assert_close(after["projector.0.weight"], weights["projector.0.weight"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(prefix, tmp_path):
    model = Classifier(create_encoder("test_resnet"), 10)
    save_checkpoint({"model": {prefix + name: value for name, value in model.state_dict().items()}}, tmp_path / "w.pth")
    other = Classifier(create_encoder("test_resnet"), 10)
    load_weights(other, load_checkpoint(tmp_path / "w.pth")["model"], "w.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_foreign_pickle_is_refused_and_not_run(save, tmp_path):
    save({"model": {}, "payload": Payload(tmp_path / "ran")}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="--eval: .*foreign.pth"):
        load_checkpoint(tmp_path / "foreign.pth", "--eval")
    assert not (tmp_path / "ran").exists()
