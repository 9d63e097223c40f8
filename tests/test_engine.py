"""Training and draws of whole runs against plainly written ones, and the loops of engine.py alone."""
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import final_file, one_of, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_cifar10_finetune_ipdpp as finetune
import main_cifar10_lineprob_bns as lineprob
import main_cifar10_pretrain_bns as pretrain
from engine import predict
from models import BNSNetwork, Classifier, create_encoder
from util.augment import SimCLRAugment
from util.batches import DeviceLoader, EpochBatches, to_device
from util.bns_loss import BNSLoss
from util.ip_dpp import KERNELS, draw_subset
from util.run.checkpoint import load_checkpoint, load_weights
from util.run.log import Progress
from util.run.processes import amp_dtype
from util.toy_data import ToyCIFAR

pytestmark = pytest.mark.usefixtures("few_images", "no_pictures")
WEIGHT_DECAY = 1.0  # strong enough to show in two epochs
CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------- training, written plainly


def plain_lr(t, lr, min_lr, warmup_epochs, epochs):
    """Learning rate t epochs (fractional) after the start."""
    if t < warmup_epochs:
        return lr * t / warmup_epochs
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (t - warmup_epochs) / (epochs - warmup_epochs))) / 2


def plain_bns_loss(emb_i, emb_j, labels):
    z, labels = F.normalize(torch.cat((emb_i, emb_j)).double()), labels.repeat(2)
    s = torch.exp(z @ z.T / 0.5)
    loss = 0
    for a, label in enumerate(labels):
        positive = labels == label
        negative = ~positive
        positive[a] = False
        loss -= F.logsigmoid(s[a, positive].mean()) + F.logsigmoid(-s[a, negative].sum() / len(z))
    return loss / len(z)


def plain_training(model, epochs, loss_of, lr, accum_iter):
    """Mean loss of each epoch; `epochs` holds for each a list of (views, labels)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    means = []
    for epoch, batches in enumerate(epochs):
        updates = [batches[i:i + accum_iter] for i in range(0, len(batches), accum_iter)]
        losses = []
        for i, update in enumerate(updates):
            for group in optimizer.param_groups:
                group["lr"] = plain_lr(epoch + i / len(updates), lr, 0, 1, len(epochs))
            optimizer.zero_grad()
            for views, labels in update:
                losses.append(loss_of(views, labels))
                (losses[-1] / len(update)).backward()
            optimizer.step()
        means.append(torch.stack(losses).mean().item())
    return means


@pytest.mark.slow
@pytest.mark.parametrize("script, accum_iter, flags", [
    (pretrain, 1, []), (pretrain, 2, []), (finetune, 1, ["--ipdpp_sampler", "none"]),
    (finetune, 1, ["--num_samples", 10, "--loss", "logit_adjusted"]), (lineprob, 2, ["--num_samples", 10])])
def test_training_equals_a_plainly_written_loop(script, accum_iter, flags, tmp_path):
    history = run(script, tmp_path, "--epochs", 2, "--warmup_epochs", 1, "--batch_size", 32, "--blr", 1e-3,
                  "--accum_iter", accum_iter, "--weight_decay", WEIGHT_DECAY, *flags)
    trained = load_checkpoint(final_file(script, tmp_path))

    train_set, stage_1 = ToyCIFAR(10), script is pretrain
    subset = torch.arange(len(train_set)) if stage_1 else trained["subset"]
    loader = DeviceLoader(to_device(train_set, CPU), SimCLRAugment(16, trained["args"]["jitter_strength"]), one_of(1),
                          32, trained["args"]["seed"], views_per_image=2 if stage_1 else 1, drop_last=stage_1)
    epochs = [list(loader.epoch(epoch, subset)) for epoch in range(2)]
    images = sum(len(labels) for _, labels in epochs[0])
    assert images == {"pretrain_bns": 96, "lineprob_bns": len(subset), "finetune_ipdpp": len(subset)}[
        trained["args"]["stage"]]

    torch.manual_seed(trained["args"]["seed"])
    encoder = create_encoder("test_resnet", 16)
    model = BNSNetwork(encoder) if stage_1 else Classifier(encoder, 10, frozen=script is lineprob)
    # The same kernels, since Adam makes a whole step of a gradient that is nothing but rounding.
    model = model.train().to(memory_format=torch.channels_last)
    counts = torch.bincount(torch.tensor(train_set.targets)[subset])
    prior = torch.log(counts / counts.sum()) if "logit_adjusted" in flags else torch.zeros(10)

    def loss_of(views, labels):
        if not stage_1:
            return F.cross_entropy(model(*views) + prior, labels)
        projections = model(*views)
        loss = BNSLoss()(*projections, labels)
        assert loss.item() == pytest.approx(plain_bns_loss(*projections, labels).item(), abs=1e-5)
        return loss

    losses = plain_training(model, epochs, loss_of, 1e-3 * min(32 * accum_iter, images) / 256, accum_iter)
    assert [record["train_loss"] for record in history] == pytest.approx(losses, abs=1e-5)
    assert [record["train_images"] for record in history] == [images] * 2
    for name, value in model.state_dict().items():
        off = (trained["model"][name] - value).abs() > 1e-5  # the few whose gradient is nothing but rounding
        assert off.double().mean() < 1e-4, name


def rates(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars("lr")]


@pytest.mark.parametrize("accum_iter", [1, 3])
def test_learning_rate_at_every_update(accum_iter, tmp_path):
    history = run(lineprob, tmp_path, "--epochs", 6, "--warmup_epochs", 2, "--batch_size", 10, "--num_samples", 10,
                  "--lr", 0.3, "--min_lr", 0.01, "--accum_iter", accum_iter)
    updates = math.ceil(math.ceil(58 / 10) / accum_iter)  # 58 images: 10 of each of 4 classes, 18 of the others
    expected = [plain_lr(i / updates, 0.3, 0.01, 2, 6) for i in range(6 * updates)]
    assert rates(tmp_path) == pytest.approx(expected, rel=1e-5)
    assert [record["train_lr"] for record in history] == pytest.approx(expected[updates - 1::updates], rel=1e-6)


# --------------------------------------------------------------------------------------- predictions


def small_run():
    """As much of a Run as `predict` needs."""
    return SimpleNamespace(autocast=nullcontext, args=SimpleNamespace(input_size=16))


@pytest.mark.parametrize("height, width", [(32, 32), (48, 32), (32, 16)])
def test_predict_equals_a_direct_forward(height, width):
    """Of square images of --input_size, whatever the images are."""
    model = Classifier(create_encoder("test_resnet", 16), 10).train()
    images = torch.randint(256, (20, 3, height, width), dtype=torch.uint8)
    outputs = predict(model, images, small_run(), batch_size=8)
    small = F.interpolate(images / 255, size=(16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = model.eval()(small)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    features = torch.rand(20, 96)
    torch.testing.assert_close(predict(model.lin, features, small_run()), model.lin(features).detach())


# --------------------------------------------------------------------------------------- drawn subsets


def checkpoints(folder, epochs):
    return [load_checkpoint(folder / f"checkpoint-{epoch}.pth") for epoch in range(epochs)]


@pytest.mark.slow
@pytest.mark.parametrize("sampler, kernel", [("exact", "paper"), ("exact", "published"), ("uniform", "paper")])
def test_draws_see_the_current_model_on_clean_images(sampler, kernel, tmp_path):
    history = run(finetune, tmp_path, "--epochs", 4, "--sampling_freq", 2, "--num_samples", 15, "--batch_size", 20,
                  "--blr", 0.2, "--warmup_epochs", 0, "--save_freq", 1, "--keep_checkpoints", 0,
                  "--ipdpp_sampler", sampler, "--ipdpp_kernel", kernel)
    saved = checkpoints(tmp_path, 4)
    assert [record["epoch"] for record in history if "drawn" in record] == [0, 1]
    train_set, targets = ToyCIFAR(10), torch.tensor(ToyCIFAR(10).targets)
    images = torch.from_numpy(train_set.data).permute(0, 3, 1, 2) / 255
    images = F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    torch.manual_seed(42)
    model, seen = Classifier(create_encoder("test_resnet", 16), 10), []
    for epoch in (0, 1):
        if epoch:
            load_weights(model, saved[epoch - 1]["model"], "the checkpoint before the draw")
        with torch.no_grad():
            logits = model.eval()(images)
        log_p = F.log_softmax(logits.double(), 1)[torch.arange(len(targets)), targets]
        subset = draw_subset(log_p.numpy(), targets, 15, (42, epoch), sampler, kernel)
        assert torch.equal(saved[epoch]["subset"], subset)
        if sampler == "exact" and epoch == 1:  # at first, all p are about 0.1
            other = draw_subset(log_p.numpy(), targets, 15, (42, epoch), sampler, KERNELS[kernel == "paper"])
            assert not torch.equal(subset, other), "or the other kernel would pass too"
        margins = torch.stack([row[c] - torch.cat((row[:c], row[c + 1:])).max()
                               for row, c in zip(logits, targets, strict=True)])
        is_drawn = torch.isin(torch.arange(len(targets)), subset)
        for figures in history[epoch]["drawn"]:
            members = targets == figures["class"]
            for name, part in (("drawn_margin", members & is_drawn), ("left_margin", members & ~is_drawn)):
                assert figures[name] == pytest.approx(margins[part].mean().item(), abs=1e-4)
            assert ("changed" in figures) == (epoch == 1) and ("max_inclusion" in figures) == (sampler == "exact")
        seen.append(log_p)
    assert (seen[0] - seen[1]).abs().max() > 0.01, "or an old model's draw would pass too"


# --------------------------------------------------------------------------------------- records and refusals


@pytest.mark.parametrize("script, flags, evaluated, drawn", [
    (pretrain, ["--eval_freq", 2], [1, 2], []), (lineprob, ["--eval_freq", 2], [1, 2], []),
    (finetune, ["--num_samples", 5, "--sampling_freq", 1], [0, 1, 2], [0, 1])])
def test_log_holds_one_object_per_epoch(script, flags, evaluated, drawn, tmp_path):
    figures = {f"test_{name}" for name in ("acc1", "acc5", "loss", "many", "medium", "few", "per_class")}
    figures |= {f"test_adjusted_{name}" for name in ("acc1", "many", "medium", "few")}
    if script is pretrain:
        figures = {f"knn_{name}" for name in ("acc1", "many", "medium", "few")}
    history = run(script, tmp_path, "--epochs", 3, "--batch_size", 60, *flags)
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert records == history
    for epoch, record in enumerate(records):
        expected = {"epoch", "train_loss", "train_lr", "train_images"}
        expected |= (figures if epoch in evaluated else set()) | ({"drawn"} if epoch in drawn else set())
        assert set(record) == expected and record["epoch"] == epoch


def test_amp_auto_is_bfloat16_where_the_cpu_has_it(monkeypatch):
    for capabilities, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16),
                                   ({"avx2": True}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert amp_dtype("auto", CPU) is expected
    assert [amp_dtype(name, CPU) for name in ("bfloat16", "float16", "none")] == [torch.bfloat16, torch.float16, None]


# --------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bfloat16", "float16", "none"])
def test_training_and_evaluation_on_cuda(amp, tmp_path):
    flags = ["--device", "cuda", "--amp", amp, "--batch_size", 32]
    run(pretrain, tmp_path / "p", "--epochs", 2, *flags)
    history = run(finetune, tmp_path / "f", "--epochs", 2, "--resume", final_file(pretrain, tmp_path / "p"), *flags)
    metrics = run(finetune, tmp_path / "f", "--eval", final_file(finetune, tmp_path / "f"), *flags)
    assert math.isfinite(history[-1]["train_loss"]) and metrics["test_acc1"] == history[-1]["test_acc1"]


@pytest.mark.gpu
@pytest.mark.parametrize("script", [pretrain, lineprob, finetune])
def test_steps_do_not_wait_for_the_gpu(script, tmp_path, monkeypatch):
    iterate = EpochBatches.__iter__

    def watched(batches):
        if batches.epoch:  # libraries that load in the first epoch may wait
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield from iterate(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(EpochBatches, "__iter__", watched)
    monkeypatch.setattr(Progress, "due", lambda self: False)  # a line about the loss waits for it
    run(script, tmp_path, "--epochs", 2, "--batch_size", 32, "--device", "cuda", "--amp", "bfloat16")
