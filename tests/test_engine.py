"""Training and draws of whole runs against plainly written ones, and the loops of engine.py alone."""
import functools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FINETUNE, LINEPROB, PRETRAIN, final_file, one_of, run

import engine
from engine import predict, warm_up_then_cosine
from models import BNSNetwork, Classifier, create_encoder
from util.augment import SimCLRAugment
from util.batches import DeviceLoader, to_device
from util.bns_loss import BNSLoss
from util.ip_dpp import draw_subset
from util.run.checkpoint import load_checkpoint, load_weights
from util.run.processes import amp_dtype
from util.toy_data import ToyCIFAR

pytestmark = pytest.mark.usefixtures("few_images")
WEIGHT_DECAY = 1.0  # strong enough to show in two epochs
MIN_LR = 1e-5
CPU = torch.device("cpu")


def plain_lr(t, lr, epochs):
    """Learning rate t epochs (fractional) after the start, with one epoch of warm-up."""
    return lr * t if t < 1 else MIN_LR + (lr - MIN_LR) * (1 + math.cos(math.pi * (t - 1) / (epochs - 1))) / 2


def plain_training(model, epochs, loss_of, lr, sgd):
    """Mean loss and last learning rate of each epoch; `epochs` holds for each a list of batches for `loss_of`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    if sgd:
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    means, rates = [], []
    for epoch, batches in enumerate(epochs):
        losses = []
        for i, batch in enumerate(batches):
            rate = plain_lr(epoch + i / len(batches), lr, len(epochs))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            losses.append(loss_of(*batch))
            losses[-1].backward()
            optimizer.step()
        means.append(torch.stack(losses).mean().item())
        rates.append(rate)
    return means, rates


def test_the_warm_up_of_a_short_run_takes_a_fifth_of_it():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    scheduler = warm_up_then_cosine(optimizer, 10, 20, min_lr=0.1, steps=4)
    rates = []
    for update in range(40):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    cosine = [0.3 + 0.2 * math.cos(math.pi * update / 32) for update in range(32)]
    assert rates == pytest.approx([0.5 * update / 8 for update in range(8)] + cosine)


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [
    (PRETRAIN, []), (FINETUNE, ["--ipdpp_sampler", "none"]),
    (FINETUNE, ["--num_samples", 10, "--loss", "logit_adjusted"]), (LINEPROB, ["--num_samples", 10]),
    (LINEPROB, ["--num_samples", 10, "--opt", "sgd"])])
def test_training_equals_a_plainly_written_loop(script, flags, tmp_path):
    history = run(script, tmp_path, "--epochs", 2, "--warmup_epochs", 1, "--batch_size", 32, "--blr", 1e-3,
                  "--min_lr", MIN_LR, "--weight_decay", WEIGHT_DECAY, *flags)
    trained = load_checkpoint(final_file(script, tmp_path))

    train_set, stage_1 = ToyCIFAR(10), script == PRETRAIN
    subset = torch.arange(len(train_set)) if stage_1 else trained["subset"]
    loader = DeviceLoader(to_device(train_set, CPU), SimCLRAugment(16, trained["args"]["jitter_strength"]), one_of(1),
                          32, trained["args"]["seed"], views_per_image=2 if stage_1 else 1, drop_last=stage_1)
    epochs = [list(loader.epoch(epoch, subset)) for epoch in range(2)]
    images = 96 if stage_1 else len(subset)

    torch.manual_seed(trained["args"]["seed"])
    encoder = create_encoder("test_resnet")
    model = BNSNetwork(encoder) if stage_1 else Classifier(encoder, 10, frozen=script == LINEPROB)
    # The same kernels, since Adam makes a whole step of a gradient that is nothing but rounding.
    model = model.train().to(memory_format=torch.channels_last)
    counts = torch.bincount(torch.tensor(train_set.targets)[subset])
    prior = torch.log(counts / counts.sum()) if "logit_adjusted" in flags else torch.zeros(10)

    def loss_of(views, labels):
        return BNSLoss()(*model(*views), labels) if stage_1 else F.cross_entropy(model(*views) + prior, labels)

    lr = 1e-3 * 32 / 256
    losses, rates = plain_training(model, epochs, loss_of, lr, sgd="sgd" in flags)
    assert [record["train_loss"] for record in history] == pytest.approx(losses, abs=1e-5)
    assert [record["train_lr"] for record in history] == pytest.approx(rates, rel=1e-6)
    assert [record["train_images"] for record in history] == [images] * 2
    for name, value in model.state_dict().items():
        off = (trained["model"][name] - value).abs() > 1e-5  # the few whose gradient is nothing but rounding
        assert off.double().mean() < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("script", [PRETRAIN, FINETUNE])
def test_compile_trains_as_without_it(script, tmp_path, monkeypatch):
    """By a backend that compiles nothing."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    flags = ["--epochs", 2, "--batch_size", 25]
    plain = run(script, tmp_path / "plain", *flags)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    compiled = run(script, tmp_path / "compiled", *flags, "--compile")
    losses = [[record["train_loss"] for record in history] for history in (plain, compiled)]
    assert graphs and losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_predict_equals_a_direct_forward():
    """Of images made square, whatever they were."""
    some_run = SimpleNamespace(autocast=nullcontext, args=SimpleNamespace(input_size=16))
    model = Classifier(create_encoder("test_resnet"), 10).train()
    images = torch.randint(256, (20, 3, 48, 32), dtype=torch.uint8)
    outputs = predict(model, images, some_run, batch_size=8)
    small = F.interpolate(images / 255, size=(16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(outputs, model.eval()(small), atol=1e-5, rtol=1e-5)
    features = torch.rand(20, 96)
    torch.testing.assert_close(predict(model.lin, features, some_run), model.lin(features).detach())


@pytest.mark.slow
def test_draws_see_the_current_model_on_clean_images(tmp_path):
    history = run(FINETUNE, tmp_path, "--epochs", 4, "--sampling_freq", 2, "--num_samples", 15, "--batch_size", 20,
                  "--blr", 0.2, "--warmup_epochs", 0, "--save_freq", 1, "--keep_checkpoints", 0)
    assert [record["epoch"] for record in history if "drawn" in record] == [0, 1]
    train_set, targets = ToyCIFAR(10), torch.tensor(ToyCIFAR(10).targets)
    images = torch.from_numpy(train_set.data).permute(0, 3, 1, 2) / 255
    images = F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    torch.manual_seed(42)
    model, seen = Classifier(create_encoder("test_resnet"), 10), []
    for epoch in (0, 1):
        if epoch:
            load_weights(model, load_checkpoint(tmp_path / "checkpoint-0.pth")["model"], "checkpoint-0.pth")
        with torch.no_grad():
            logits = model.eval()(images)
        seen.append(F.log_softmax(logits.double(), 1)[torch.arange(len(targets)), targets])
        subset = draw_subset(seen[-1].numpy(), targets, 15, (42, epoch), "exact", "paper")
        assert torch.equal(load_checkpoint(tmp_path / f"checkpoint-{epoch}.pth")["subset"], subset)
        margins = torch.stack([row[c] - torch.cat((row[:c], row[c + 1:])).max()
                               for row, c in zip(logits, targets, strict=True)])
        is_drawn = torch.isin(torch.arange(len(targets)), subset)
        for figures in history[epoch]["drawn"]:
            members = targets == figures["class"]
            for name, part in (("drawn_margin", members & is_drawn), ("left_margin", members & ~is_drawn)):
                assert figures[name] == pytest.approx(margins[part].mean().item(), abs=1e-4)
    assert (seen[0] - seen[1]).abs().max() > 0.01, "or an old model's draw would pass too"


def test_amp_auto_is_bfloat16_where_the_cpu_has_it(monkeypatch):
    for capabilities, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert amp_dtype("auto", CPU) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bfloat16", "float16", "none"])
def test_training_and_evaluation_on_cuda(amp, tmp_path):
    flags = ["--device", "cuda", "--amp", amp, "--batch_size", 32]
    run(PRETRAIN, tmp_path / "p", "--epochs", 2, *flags)
    history = run(FINETUNE, tmp_path / "f", "--epochs", 2, "--resume", final_file(PRETRAIN, tmp_path / "p"), *flags)
    metrics = run(FINETUNE, tmp_path / "f", "--eval", final_file(FINETUNE, tmp_path / "f"), *flags)
    assert math.isfinite(history[-1]["train_loss"]) and metrics["test_acc1"] == history[-1]["test_acc1"]


@pytest.mark.gpu
@pytest.mark.parametrize("script", [PRETRAIN, LINEPROB, FINETUNE])
def test_steps_do_not_wait_for_the_gpu(script, tmp_path, monkeypatch):
    original = DeviceLoader.epoch

    def watched(loader, epoch, subset):
        if epoch:  # libraries that load in the first epoch may wait
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield from original(loader, epoch, subset)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(DeviceLoader, "epoch", watched)
    monkeypatch.setattr(engine, "SHOW_EVERY", math.inf)  # a line about the loss waits for it
    run(script, tmp_path, "--epochs", 2, "--batch_size", 32, "--device", "cuda", "--amp", "bfloat16")
