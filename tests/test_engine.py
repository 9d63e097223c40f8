import itertools
import json
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engine
import main_cifar10_finetune_ipdpp as finetune
import main_cifar10_lineprob_bns as lineprob
import main_cifar10_pretrain_bns as pretrain
from models import BNSNetwork, Classifier, create_encoder
from util.bns_loss import BNSLoss
from util.checkpoint import load_checkpoint, load_weights
from util.errors import UserError
from util.toy_data import ToyCIFAR


WEIGHT_DECAY = 1.0  # strong enough to show in two epochs


class FewImages(ToyCIFAR):
    """A tenth of each class of the toy data: 128 images for training and 100 for testing."""

    shot_thresholds = property(lambda self: (20, 4), lambda self, value: None)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        targets = np.array(self.targets)
        kept = np.concatenate([np.flatnonzero(targets == c)[::10] for c in range(10)])
        self.data, self.targets = self.data[kept], targets[kept].tolist()
        self.class_counts = np.bincount(self.targets)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads would cost models this small more than they save, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(engine, "ToyCIFAR", FewImages)


def arguments(script, output_dir, *flags):
    shared = ["--toy_data", "--model", "test_resnet", "--input_size", "16", "--device", "cpu", "--amp", "none"]
    return script.get_args_parser().parse_args([*shared, "--output_dir", str(output_dir), *map(str, flags)])


def run(script, output_dir, *flags):
    return script.main(arguments(script, output_dir, *flags))


def final_file(script, output_dir):
    return output_dir / f"{script.get_args_parser().get_default('stage')}_cifar10_if100.pth"


def spy(monkeypatch, name):
    """Record a function of the engine: a list of (its arguments, its result)."""
    original, calls = getattr(engine, name), []

    def recorded(*args):
        result = original(*args)
        calls.append((args, result))
        return result
    monkeypatch.setattr(engine, name, recorded)
    return calls


def one_of(world_size, rank=0):
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"), sum=lambda tensor: tensor)


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
    """Mean loss of each epoch; `epochs` holds a list of batches for each."""
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
            for batch in update:
                losses.append(loss_of(batch))
                (losses[-1] / len(update)).backward()
            optimizer.step()
        means.append(torch.stack(losses).mean().item())
    return means


@pytest.mark.parametrize("script, accum_iter, flags", [
    (pretrain, 1, []), (pretrain, 2, []), (finetune, 1, ["--ipdpp_sampler", "none"]),
    (lineprob, 2, ["--num_samples", "20"])])
def test_training_equals_a_plainly_written_loop(script, accum_iter, flags, tmp_path, monkeypatch):
    views = []

    class Recorded(engine.SimCLRAugment):
        def __call__(self, images, generator):
            result = super().__call__(images, generator)
            if generator is torch.default_generator:  # the others are pictures for TensorBoard
                views.append(result.clone())
            return result

    monkeypatch.setattr(engine, "SimCLRAugment", Recorded)
    epoch_batches = spy(monkeypatch, "epoch_batches")
    args = arguments(script, tmp_path, "--epochs", 2, "--warmup_epochs", 1, "--batch_size", 32, "--blr", 1e-3,
                     "--accum_iter", accum_iter, "--weight_decay", WEIGHT_DECAY, *flags)
    history = script.main(args)

    torch.manual_seed(args.seed)
    encoder, labels = create_encoder("test_resnet", 16), torch.tensor(FewImages(10).targets)
    model = BNSNetwork(encoder) if script is pretrain else Classifier(encoder, 10, frozen=script is lineprob)
    # The same kernels, since Adam makes a whole step of a gradient that is nothing but rounding.
    model = model.train().to(memory_format=torch.channels_last)
    views = iter([view.contiguous(memory_format=torch.channels_last) for view in views])

    def loss_of(batch):
        if script is not pretrain:
            return F.cross_entropy(model(next(views)), labels[batch])
        projections = model(next(views), next(views))
        loss = BNSLoss()(*projections, labels[batch])
        assert loss.item() == pytest.approx(plain_bns_loss(*projections, labels[batch]).item(), abs=1e-5)
        return loss

    epochs = [batches for _, batches in epoch_batches[-2:]]
    losses = plain_training(model, epochs, loss_of, 1e-3 * 32 * accum_iter / 256, accum_iter)
    assert next(views, None) is None
    assert [record["train_loss"] for record in history] == pytest.approx(losses, abs=1e-5)
    ours = load_checkpoint(final_file(script, tmp_path))["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("accum_iter", [1, 3])
def test_learning_rate_at_every_update(accum_iter, tmp_path, monkeypatch):
    log_epoch = spy(monkeypatch, "log_epoch")
    run(lineprob, tmp_path, "--epochs", 6, "--warmup_epochs", 2, "--batch_size", 10, "--num_samples", 10,
        "--lr", 0.3, "--min_lr", 0.01, "--accum_iter", accum_iter)
    rates = [rate.item() for (_, _, curves, *_), _ in log_epoch for rate in curves["lr"]]
    updates = math.ceil(math.ceil(55 / 10) / accum_iter)  # 55 images: 10 of each of 4 classes, 15 of the others
    assert len(rates) == 6 * updates
    assert rates == pytest.approx([plain_lr(i / updates, 0.3, 0.01, 2, 6) for i in range(6 * updates)], rel=1e-5)


# --------------------------------------------------------------------------------------- batches and predictions


def test_epoch_batches_are_a_permutation():
    subset = torch.arange(1000, 1103)
    batches = engine.epoch_batches(subset, 10, 11, 0, 0, one_of(1))
    assert [len(batch) for batch in batches] == [10] * 10 + [3]
    assert sorted(torch.cat(batches).tolist()) == subset.tolist() != torch.cat(batches).tolist()
    dropped = engine.epoch_batches(subset, 10, 10, 0, 0, one_of(1))
    assert [len(batch) for batch in dropped] == [10] * 10 and len(torch.cat(dropped).unique()) == 100


def test_epoch_batches_repeat_by_seed_and_epoch():
    def order(seed, epoch):
        return torch.cat(engine.epoch_batches(torch.arange(50), 8, 7, seed, epoch, one_of(1))).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("images", [103, 120])
def test_processes_share_an_epoch(images):
    shares = [engine.epoch_batches(torch.arange(images), 10, 6, 0, 0, one_of(2, rank)) for rank in range(2)]
    sizes = [[len(batch) for batch in share] for share in shares]
    assert sizes[0] == sizes[1] and sizes[0][:5] == [10] * 5
    assert len(torch.cat(sum(shares, []))) == images + images % 2
    assert torch.cat(sum(shares, [])).unique().tolist() == list(range(images))
    together = engine.epoch_batches(torch.arange(images), 20, 6, 0, 0, one_of(1))
    for step in range(5):
        assert set(together[step].tolist()) == set(torch.cat([share[step] for share in shares]).tolist())


def test_streams_differ_in_every_part():
    keys = itertools.product(range(3), repeat=4)
    seeds = {engine.stream(*key) for key in keys} | {engine.stream(0, 1), engine.stream(1, 0)}
    assert len(seeds) == 83 and all(0 <= seed < 2 ** 63 for seed in seeds)
    assert engine.stream(5, 6, 7) == engine.stream(5, 6, 7)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_predict_equals_a_direct_forward(world_size, monkeypatch):
    monkeypatch.setattr(engine, "EVAL_BATCH", 8)
    model = Classifier(create_encoder("test_resnet", 16), 10).train()
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    shares = [engine.predict(model, images, one_of(world_size, rank), nullcontext, 16) for rank in range(world_size)]
    small = F.interpolate(images / 255, size=(16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = model.eval()(small)
    torch.testing.assert_close(sum(shares), expected, atol=1e-5, rtol=1e-5)
    features = torch.rand(20, 96)
    logits = engine.predict(model.lin, features, one_of(1), nullcontext, 16)
    torch.testing.assert_close(logits, model.lin(features).detach())


def test_true_label_log_probabilities_keep_the_digits_of_confident_predictions():
    logits, labels = torch.tensor([[30.0, 0.0], [1.0, 3.0], [0.0, 0.0]]), torch.tensor([0, 0, 1])
    expected = [-math.log1p(math.exp(-30)), -math.log1p(math.exp(2)), -math.log(2)]
    assert engine.true_label_log_probabilities(logits, labels).tolist() == pytest.approx(expected, rel=1e-2, abs=0)


# --------------------------------------------------------------------------------------- drawn subsets


@pytest.mark.parametrize("sampler", ["exact", "mcmc", "uniform"])
def test_draw_balanced(sampler):
    targets = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [40, 10, 11, 3]))
    log_p = np.log(np.random.default_rng(1).random(64))

    def drawn(seed, epoch):
        return engine.draw_balanced(log_p, targets, 10, seed, epoch, sampler, "paper", 50)

    chosen = drawn(0, 0)
    assert chosen.dtype == np.int64 and len(set(chosen)) == len(chosen)
    assert np.bincount(targets[chosen]).tolist() == [10, 10, 10, 3]
    assert set(np.flatnonzero((targets == 1) | (targets == 3))) <= set(chosen)
    assert np.array_equal(chosen, drawn(0, 0))
    assert not np.array_equal(chosen, drawn(0, 1)) and not np.array_equal(chosen, drawn(1, 0))


@pytest.mark.parametrize("epochs, sampling_freq, expected", [
    (5, 2, [0, 1, 3]), (6, 3, [0, 2]), (4, 1, [0, 1, 2]), (1, 10, [0]), (3, 10, [0])])
def test_redraw_schedule(epochs, sampling_freq, expected, tmp_path, monkeypatch):
    draws, used = spy(monkeypatch, "draw_balanced"), spy(monkeypatch, "epoch_batches")
    run(finetune, tmp_path, "--epochs", epochs, "--sampling_freq", sampling_freq, "--num_samples", 5)
    assert [args[4] for args, _ in draws] == expected
    current = None
    for epoch, ((subset, *_), _) in enumerate(used):
        current = dict(zip(expected, (drawn for _, drawn in draws))).get(epoch, current)
        assert subset.tolist() == current.tolist()


def test_draws_see_the_current_model_on_clean_images(tmp_path, monkeypatch):
    draws = spy(monkeypatch, "draw_balanced")
    run(finetune, tmp_path, "--epochs", 4, "--sampling_freq", 2, "--num_samples", 5, "--batch_size", 20, "--blr", 0.1,
        "--warmup_epochs", 0, "--save_freq", 1, "--keep_checkpoints", 0)
    train_set, targets = FewImages(10), torch.tensor(FewImages(10).targets)
    images = F.interpolate(torch.from_numpy(train_set.data).permute(0, 3, 1, 2) / 255, size=(16, 16), mode="bilinear",
                           antialias=True)
    torch.manual_seed(42)
    model = Classifier(create_encoder("test_resnet", 16), 10).eval()
    cut = (train_set.class_counts > 5)[targets]
    for args, _ in draws:
        if args[4] == 1:
            load_weights(model, load_checkpoint(tmp_path / "checkpoint-0.pth")["model"], "checkpoint-0.pth")
        with torch.no_grad():
            log_p = F.log_softmax(model(images), 1)[torch.arange(len(targets)), targets].numpy()
        np.testing.assert_allclose(args[0][cut], log_p[cut], atol=1e-4)
        assert args[5:7] == ("exact", "paper")
    assert np.abs(draws[0][0][0] - draws[1][0][0]).max() > 0.01


def test_probing_subset_is_seeded_balanced_and_stays(tmp_path, monkeypatch):
    used = spy(monkeypatch, "epoch_batches")
    for i, seed in enumerate((0, 0, 1)):
        run(lineprob, tmp_path / str(i), "--epochs", 3, "--num_samples", 5, "--seed", seed)
    subsets = [subset for (subset, *_), _ in used]
    first, again, other = subsets[:3], subsets[3:6], subsets[6:]
    assert all(torch.equal(subset, first[0]) for subset in first + again)
    assert all(torch.equal(subset, other[0]) for subset in other) and not torch.equal(first[0], other[0])
    counts = FewImages(10).class_counts
    assert np.bincount(np.array(FewImages(10).targets)[first[0]]).tolist() == np.minimum(counts, 5).tolist()


# --------------------------------------------------------------------------------------- reports


@pytest.mark.parametrize("script", [lineprob, finetune])
@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_eval_repeats_the_last_epoch_exactly(script, amp, tmp_path, capsys):
    flags = ["--amp", amp, "--blr", 0.05, "--batch_size", 20]
    before, last = run(script, tmp_path, "--epochs", 2, "--num_samples", 10, *flags)
    trained = capsys.readouterr().out
    metrics = run(script, tmp_path, "--eval", final_file(script, tmp_path), *flags)
    taken, *evaluated = capsys.readouterr().out.splitlines()
    assert taken == "from the checkpoint: num_samples 10"
    assert {name: value for name, value in last.items() if name.startswith("test_")} == {
        f"test_{name}": value for name, value in metrics.items()}
    assert last["test_loss"] != before["test_loss"]
    lines = [line for line in trained.splitlines() if re.match(r"\* |Accuracy of the network", line)]
    assert len(lines) == 8 and lines[-4:] == evaluated[:4]
    percent, fraction = r"\d+\.\d{3}", r"[01]\.\d{3}"
    assert re.fullmatch(rf"\* Acc@1 {percent} Acc@5 {percent} loss {percent}", lines[0])
    assert re.fullmatch(r"Accuracy of the network on the 100 test images: \d+\.\d%", lines[1])
    shots = " ".join(rf"{name}-Shot Acc@1 {fraction}" for name in ("Many", "Medium", "Few"))
    assert re.fullmatch(rf"\* {shots}", lines[2])
    shots = " ".join(rf"{name}-Shot {fraction}" for name in ("Many", "Medium", "Few"))
    assert re.fullmatch(rf"\* logit-adjusted \(tau 1\): Acc@1 {percent} {shots}", lines[3])
    best = max(before["test_acc1"], last["test_acc1"])
    assert re.findall(r"^Max accuracy: (.*)$", trained, re.M) == [f"{before['test_acc1']:.2f}%", f"{best:.2f}%"]


def test_log_holds_one_object_per_epoch(tmp_path):
    always = {"epoch", "train_loss", "train_lr", "train_images"}
    tested = {f"test_{name}" for name in ("acc1", "acc5", "loss", "many", "medium", "few", "per_class")}
    tested |= {f"test_adjusted_{name}" for name in ("acc1", "many", "medium", "few")}
    knn = {f"knn_{name}" for name in ("acc1", "many", "medium", "few")}
    for script, flags, expected in (
            (pretrain, ["--eval_freq", 2], [always, always | knn, always | knn]),
            (lineprob, ["--eval_freq", 2], [always, always | tested, always | tested]),
            (finetune, ["--num_samples", 5, "--sampling_freq", 1],
             [always | tested | {"drawn"}, always | tested | {"drawn"}, always | tested])):
        history = run(script, tmp_path / script.__name__, "--epochs", 3, "--batch_size", 60, *flags)
        records = [json.loads(line) for line in (tmp_path / script.__name__ / "log.txt").read_text().splitlines()]
        assert records == history
        assert [set(record) for record in records] == expected
        assert [record["epoch"] for record in records] == [0, 1, 2]


def test_not_finite_losses_and_weights_are_refused():
    model = torch.nn.Linear(2, 2)
    engine.check_finite(1.0, 3, model)
    for loss in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match=f"loss became {loss} in epoch 3"):
            engine.check_finite(loss, 3)
    model.weight.data[0, 1] = math.nan
    with pytest.raises(UserError, match="weight stopped being finite in epoch 3"):
        engine.check_finite(1.0, 3, model)


def test_a_diverged_run_stops_before_its_checkpoint(tmp_path):
    with pytest.raises(UserError, match="in epoch 1"):
        run(finetune, tmp_path, "--epochs", 3, "--warmup_epochs", 1, "--lr", 1e36, "--num_samples", 50)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["checkpoint-0.pth"]


def test_amp_auto_is_bfloat16_where_the_cpu_has_it(monkeypatch):
    cpu = torch.device("cpu")
    for capabilities, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16),
                                   ({"avx2": True}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        assert engine.amp_dtype("auto", cpu) is expected
    assert [engine.amp_dtype(name, cpu) for name in ("bfloat16", "float16", "none")] == [
        torch.bfloat16, torch.float16, None]


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bfloat16", "float16", "none"])
def test_training_and_evaluation_on_cuda(amp, tmp_path):
    flags = ["--device", "cuda", "--amp", amp, "--batch_size", 32]
    run(pretrain, tmp_path / "p", "--epochs", 2, *flags)
    history = run(finetune, tmp_path / "f", "--epochs", 2, "--resume", final_file(pretrain, tmp_path / "p"), *flags)
    metrics = run(finetune, tmp_path / "f", "--eval", final_file(finetune, tmp_path / "f"), *flags)
    assert math.isfinite(history[-1]["train_loss"]) and metrics["acc1"] == history[-1]["test_acc1"]


@pytest.mark.gpu
@pytest.mark.parametrize("script", [pretrain, lineprob, finetune])
def test_steps_do_not_wait_for_the_gpu(script, tmp_path, monkeypatch):
    train_one_epoch = engine.train_one_epoch

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return train_one_epoch(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine, "train_one_epoch", watched)
    run(script, tmp_path, "--epochs", 2, "--batch_size", 32, "--device", "cuda", "--amp", "bfloat16")
