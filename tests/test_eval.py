"""Evaluation: the figures of a run and of --eval, recomputed plainly, and what --eval takes from the checkpoint."""
import argparse
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, draw_few, final_file, run

import main_cifar10_finetune_ipdpp as finetune
import main_cifar10_lineprob_bns as lineprob
import main_cifar10_pretrain_bns as pretrain
from models import Classifier, create_encoder
from util.errors import UserError
from util.knn import KNNClassifier
from util.run.checkpoint import load_checkpoint
from util.toy_data import ToyCIFAR

pytestmark = pytest.mark.usefixtures("few_images", "no_pictures")
PERCENT, FRACTION = r"\d+\.\d{3}", r"[01]\.\d{3}"
GROUPS = ("many", "medium", "few")


def evaluate(script, path, *flags):
    """What `main` returns for `--eval path flags` and nothing else."""
    flags = ["--device", "cpu", "--amp", "none", "--eval", path, *flags]
    return script.main(script.get_args_parser().parse_args([str(flag) for flag in flags]))


def figures_of(record):
    return {name: value for name, value in record.items() if name.startswith(("test_", "knn_"))}


def small(images, size=16):
    return F.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, size=(size, size), mode="bilinear",
                         antialias=True)


def encoder_of(checkpoint):
    encoder = create_encoder("test_resnet", 16)
    encoder.load_state_dict({name[4:]: value for name, value in checkpoint["model"].items()
                             if name.startswith("enc.")})
    return encoder.eval()


def logits_of(checkpoint, images):
    model = Classifier(create_encoder("test_resnet", 16), 10).eval()
    model.load_state_dict(checkpoint["model"])
    with torch.no_grad():
        return model(small(images))


def accuracies(predicted, factor=100):
    """In percent and, of the shots, as fractions; written plainly."""
    counts, right = ToyCIFAR(10, factor).class_counts, {"all": [], "many": [], "medium": [], "few": []}
    for c, answer in zip(ToyCIFAR(10, train=False).targets, predicted.tolist(), strict=True):
        group = "many" if counts[c] > 5 else "few" if counts[c] < 2 else "medium"
        for name in ("all", group):
            right[name].append(c == answer)
    fractions = {name: sum(hits) / len(hits) if hits else None for name, hits in right.items()}
    return {"acc1": 100 * fractions.pop("all"), **fractions}


def adjusted_accuracies(checkpoint, tau=1.0):
    """By the logits of a checkpoint and the images that its last draw holds."""
    drawn = torch.bincount(torch.tensor(ToyCIFAR(10).targets)[checkpoint["subset"]], minlength=10)
    adjusted = logits_of(checkpoint, ToyCIFAR(10, train=False).data) - tau * torch.log(drawn / drawn.sum())
    return {f"test_adjusted_{name}": value for name, value in accuracies(adjusted.argmax(1)).items()}


# --------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("script", [lineprob, finetune])
@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_eval_repeats_the_last_epoch_exactly(script, amp, tmp_path, capsys):
    before, last = run(script, tmp_path, "--epochs", 2, "--num_samples", 10, "--amp", amp, "--blr", 0.05,
                       "--batch_size", 20)
    trained = capsys.readouterr().out
    files = sorted(tmp_path.iterdir())
    metrics = evaluate(script, final_file(script, tmp_path), "--amp", amp)
    _, *evaluated = capsys.readouterr().out.splitlines()
    assert metrics == figures_of(last) and last["test_loss"] != before["test_loss"]
    assert sorted(tmp_path.iterdir()) == files, "--eval writes nothing"
    lines = [line for line in trained.splitlines() if re.match(r"\* |Accuracy of the network", line)]
    assert len(lines) == 8 and lines[-4:] == evaluated[:4] and evaluated[4].startswith("accuracy per class")
    assert re.fullmatch(rf"\* Acc@1 {PERCENT} Acc@5 {PERCENT} loss {PERCENT}", lines[0])
    assert re.fullmatch(r"Accuracy of the network on the 100 test images: \d+\.\d%", lines[1])
    shots = " ".join(rf"{name}-Shot Acc@1 {FRACTION}" for name in ("Many", "Medium", "Few"))
    assert re.fullmatch(rf"\* {shots}", lines[2])
    best = max(before["test_acc1"], last["test_acc1"])
    assert re.findall(r"^Max accuracy: (.*)$", trained, re.M) == [f"{before['test_acc1']:.2f}%", f"{best:.2f}%"]


@pytest.mark.slow
# Learning rates at which the logits tell classes apart after three epochs.
@pytest.mark.parametrize("script, blr, flags", [
    (lineprob, 1, ["--num_samples", 4]), (finetune, 0.02, ["--num_samples", 4, "--sampling_freq", 1]),
    (finetune, 0.2, ["--num_samples", 10, "--ipdpp_sampler", "uniform"]),
    (finetune, 0.05, ["--ipdpp_sampler", "none", "--num_samples", 4])])
def test_adjusted_figures_take_out_the_prior_of_the_images_drawn(script, blr, flags, tmp_path, capsys):
    last = run(script, tmp_path, "--epochs", 3, "--warmup_epochs", 0, "--batch_size", 10, "--blr", blr, *flags)[-1]
    said = capsys.readouterr().out
    checkpoint = load_checkpoint(final_file(script, tmp_path))
    adjusted = adjusted_accuracies(checkpoint)
    assert {name: last[name] for name in adjusted} == pytest.approx(adjusted)
    plain = accuracies(logits_of(checkpoint, ToyCIFAR(10, train=False).data).argmax(1))
    assert {name: last[f"test_{name}"] for name in plain} == pytest.approx(plain)
    assert list(adjusted.values()) != list(plain.values()), "or no adjustment would pass too"
    shots = " ".join(f"{name.capitalize()}-Shot {adjusted[f'test_adjusted_{name}']:.3f}" for name in GROUPS)
    line = f"* logit-adjusted (tau 1): Acc@1 {adjusted['test_adjusted_acc1']:.3f} {shots}"
    assert said.count("* logit-adjusted") == 3 and line in said.splitlines()
    metrics = evaluate(script, final_file(script, tmp_path))
    assert line in capsys.readouterr().out.splitlines() and metrics == figures_of(last)


@pytest.mark.slow
@pytest.mark.parametrize("script", [lineprob, finetune])
def test_the_strength_of_adjustment_changes_its_figures_alone(script, tmp_path, capsys):
    weights, histories = [], []
    for tau in (1, 0.5, 0):
        histories.append(run(script, tmp_path / str(tau), "--epochs", 2, "--num_samples", 10, "--batch_size", 20,
                             "--blr", 0.05, "--logit_adjustment", tau))
        said = capsys.readouterr().out
        assert said.count("logit-adjusted") == said.count(f"* logit-adjusted (tau {tau}): Acc@1") == 2 * (tau != 0)
        checkpoint = load_checkpoint(final_file(script, tmp_path / str(tau)))
        weights.append(checkpoint["model"])
        adjusted = {name: value for name, value in histories[-1][-1].items() if "adjusted" in name}
        assert adjusted == pytest.approx(adjusted_accuracies(checkpoint, tau) if tau else {})
    for other in weights[1:]:
        assert all(torch.equal(value, weights[0][name]) for name, value in other.items())
    unadjusted = [[{name: value for name, value in record.items() if "adjusted" not in name} for record in history]
                  for history in histories]
    assert unadjusted[0] == unadjusted[1] == unadjusted[2]


def test_what_was_trained_with_adjusted_logits_is_not_adjusted_again(tmp_path, capsys):
    last = run(finetune, tmp_path, "--epochs", 1, "--num_samples", 10, "--loss", "logit_adjusted")[-1]
    metrics = evaluate(finetune, final_file(finetune, tmp_path))
    assert "logit-adjusted" not in capsys.readouterr().out
    assert evaluate(finetune, final_file(finetune, tmp_path), "--logit_adjustment", 2) == metrics
    assert metrics == figures_of(last) and not [name for name in last if "adjusted" in name]


def test_knn_figures_are_those_of_plainly_computed_features(tmp_path, capsys):
    history = run(pretrain, tmp_path, "--epochs", 2, "--batch_size", 60, "--eval_freq", 2, "--blr", 0.01)
    said = capsys.readouterr().out
    assert "knn_acc1" not in history[0]
    train_set, test_set = ToyCIFAR(10), ToyCIFAR(10, train=False)
    encoder = encoder_of(load_checkpoint(final_file(pretrain, tmp_path)))
    with torch.no_grad():
        features, queries = encoder(small(train_set.data)), encoder(small(test_set.data))
    votes = KNNClassifier(features, torch.tensor(train_set.targets), 10)(queries)
    figures = accuracies(votes.argmax(1))
    assert figures_of(history[1]) == pytest.approx({f"knn_{name}": value for name, value in figures.items()})
    shots = " ".join(f"{name.capitalize()}-Shot {figures[name]:.3f}" for name in GROUPS)
    line = f"* kNN Acc@1 {figures['acc1']:.3f} {shots}"
    assert re.findall(r"^\* .*", said, re.M) == [line]

    files = sorted(tmp_path.iterdir())
    assert evaluate(pretrain, final_file(pretrain, tmp_path)) == figures_of(history[1])
    assert re.findall(r"^\* .*", capsys.readouterr().out, re.M) == [line] and sorted(tmp_path.iterdir()) == files
    # Probing leaves the encoder as it is: the same line for its file.
    run(lineprob, tmp_path / "probe", "--epochs", 1, "--resume", final_file(pretrain, tmp_path))
    assert evaluate(pretrain, final_file(lineprob, tmp_path / "probe")) == figures_of(history[1])


# --------------------------------------------------------------------------------------- flags of the checkpoint


TRAINED = {"imbalanced_factor": 30.0, "num_samples": 7, "ipdpp_sampler": "uniform", "loss": "cross_entropy",
           "input_size": 16, "model": "test_resnet", "toy_data": True}


@pytest.fixture
def trained(tmp_path, request):
    """The final file of a run whose flags are no defaults, and the figures of its last epoch."""
    last = run(finetune, tmp_path, "--imbalanced_factor", 30, "--num_samples", 7, "--ipdpp_sampler", "uniform",
               "--epochs", 1, "--logit_adjustment", 0.5, "--loss", getattr(request, "param", "cross_entropy"))[-1]
    return tmp_path / "finetune_ipdpp_cifar10_if30.pth", figures_of(last)


@pytest.mark.parametrize("trained", ["cross_entropy", "logit_adjusted"], indirect=True)
def test_eval_takes_from_the_file_what_the_user_does_not_give(trained, capsys):
    path, figures = trained
    capsys.readouterr()
    metrics = evaluate(finetune, path)
    taken, *evaluated = capsys.readouterr().out.splitlines()
    loss = load_checkpoint(path)["args"]["loss"]
    expected = {f"{name} {value}" for name, value in {**TRAINED, "loss": loss}.items() if value != "cross_entropy"}
    assert taken.startswith("from the checkpoint: ")
    assert set(taken.removeprefix("from the checkpoint: ").split(", ")) == expected
    assert {name: metrics[name] for name in figures if "adjusted" not in name} == {
        name: value for name, value in figures.items() if "adjusted" not in name}
    # Of all other flags, such as this one, the file's count for nothing.
    assert any("(tau 1)" in line for line in evaluated) == (loss == "cross_entropy")
    assert not any("(tau 0.5)" in line for line in evaluated)
    if loss == "cross_entropy":
        assert evaluate(finetune, path, "--logit_adjustment", 0.5) == figures


def test_flags_that_the_user_gives_win_and_are_named(trained, capsys):
    path, figures = trained

    def said(*flags):
        capsys.readouterr()
        return evaluate(finetune, path, *flags), capsys.readouterr().out

    def line(name, given):
        return f"--{name} {given}, as asked; {path} was trained with {TRAINED[name]}\n"

    checkpoint = load_checkpoint(path)
    logits = logits_of(checkpoint, ToyCIFAR(10, train=False).data)
    metrics, out = said("--imbalanced_factor", 100)
    assert line("imbalanced_factor", 100.0) in out
    expected = accuracies(logits.argmax(1), 100)
    assert {name: metrics[f"test_{name}"] for name in expected} == pytest.approx(expected)
    assert metrics["test_few"] is not None and figures["test_few"] is None

    counts = torch.from_numpy(ToyCIFAR(10, 30).class_counts)
    for flags, named, drawn in ((["--num_samples", 1], line("num_samples", 1), counts.clip(max=1)),
                                (["--ipdpp_sampler", "none"], line("ipdpp_sampler", "none"), counts)):
        metrics, out = said(*flags)
        predicted = (logits - torch.log(drawn / drawn.sum())).argmax(1)
        assert named in out and metrics["test_adjusted_acc1"] == accuracies(predicted)["acc1"]
    metrics, out = said("--loss", "logit_adjusted")
    assert line("loss", "logit_adjusted") in out and "* logit-adjusted" not in out
    metrics, out = said("--input_size", 20)
    assert line("input_size", 20) in out and metrics["test_loss"] != figures["test_loss"]
    metrics, out = said("--imbalanced_factor", 30, "--num_samples", 7, "--toy_data")
    assert "as asked" not in out and metrics["test_acc1"] == figures["test_acc1"]
    with pytest.raises(UserError, match="--model"):
        said("--model", "cifar_resnet20")
    assert line("model", "cifar_resnet20") in capsys.readouterr().out


def test_a_class_without_test_images_and_classes_in_another_order(trained, capsys, monkeypatch):
    """The smallest class comes first here, and the largest has no test images."""
    def reversed_classes(self, *args, **kwargs):
        draw_few(self, *args, **kwargs)
        self.targets = [9 - target for target in self.targets]
        self.class_counts = self.class_counts[::-1]
        if len(self.targets) == 100:
            self.data, self.targets = self.data[10:], self.targets[10:]

    path, _ = trained
    monkeypatch.setattr(ToyCIFAR, "__init__", reversed_classes)
    capsys.readouterr()
    metrics = evaluate(finetune, path)
    line = capsys.readouterr().out.splitlines()[-1]
    assert metrics["test_per_class"][9] is None
    assert line.startswith("accuracy per class, in order of training images: none ")
    assert line.split()[-10:][1:] == [f"{fraction:.3f}" for fraction in metrics["test_per_class"][8::-1]]


def test_a_published_namespace_counts_too(trained, tmp_path, capsys):
    path, figures = trained
    namespace = argparse.Namespace(imbalanced_factor=30, num_samples=7, model="ResNet18", input_size=16, batch_size=64,
                                   device="cuda", output_dir="/published", amp=True)
    torch.save({"model": load_checkpoint(path)["model"], "args": namespace}, tmp_path / "published.pth")
    capsys.readouterr()
    flags = ["--toy_data", "--model", "test_resnet"]
    metrics = evaluate(finetune, tmp_path / "published.pth", *flags, "--logit_adjustment", 0.5)
    said = capsys.readouterr().out
    assert "from the checkpoint: imbalanced_factor 30, input_size 16, num_samples 7\n" in said
    assert metrics == figures
    evaluate(finetune, tmp_path / "published.pth", *flags, "--imbalanced_factor", 100)
    assert "--imbalanced_factor 100.0, as asked; " in capsys.readouterr().out


def test_absent_from_the_file_the_scripts_default_counts(trained, tmp_path):
    path, _ = trained
    weights = load_checkpoint(path)["model"]
    torch.save({"model": weights}, tmp_path / "weights.pth")
    metrics = evaluate(finetune, tmp_path / "weights.pth", *TINY)
    logits = torch.as_tensor(logits_of({"model": weights}, ToyCIFAR(10, train=False).data))
    counts = torch.from_numpy(ToyCIFAR(10).class_counts)  # at IF 100, and no class has more than 500
    expected = accuracies((logits - torch.log(counts / counts.sum())).argmax(1))
    assert {name: metrics[f"test_adjusted_{name}"] for name in expected} == pytest.approx(expected)


def test_knn_of_another_stages_file_is_of_its_data_and_size(trained, capsys):
    path, _ = trained
    capsys.readouterr()
    metrics = evaluate(pretrain, path)
    assert "toy_data True, imbalanced_factor 30.0, model test_resnet, input_size 16\n" in capsys.readouterr().out
    encoder, train_set = encoder_of(load_checkpoint(path)), ToyCIFAR(10, 30)
    with torch.no_grad():
        features, queries = encoder(small(train_set.data)), encoder(small(ToyCIFAR(10, train=False).data))
    votes = KNNClassifier(features, torch.tensor(train_set.targets), 10)(queries)
    expected = {f"knn_{name}": value for name, value in accuracies(votes.argmax(1), 30).items()}
    assert metrics == pytest.approx(expected)
