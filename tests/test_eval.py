"""Evaluation: the figures of a run and of --eval, recomputed plainly, and what --eval takes from the checkpoint."""
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import final_file, run

import main_cifar10_finetune_ipdpp as finetune
import main_cifar10_lineprob_bns as lineprob
import main_cifar10_pretrain_bns as pretrain
from models import Classifier, create_encoder
from util.errors import UserError
from util.knn import KNNClassifier
from util.run.checkpoint import load_checkpoint
from util.toy_data import ToyCIFAR

pytestmark = pytest.mark.usefixtures("few_images", "no_pictures")
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
    for number, record in enumerate((before, last)):
        acc1, acc5, loss = (record[f"test_{name}"] for name in ("acc1", "acc5", "loss"))
        shots = " ".join(f"{name.capitalize()}-Shot Acc@1 {record[f'test_{name}']:.3f}" for name in GROUPS)
        assert lines[4 * number:4 * number + 3] == [
            f"* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}",
            f"Accuracy of the network on the 100 test images: {acc1:.1f}%", f"* {shots}"]
    best = max(before["test_acc1"], last["test_acc1"])
    assert re.findall(r"^Max accuracy: (.*)$", trained, re.M) == [f"{before['test_acc1']:.2f}%", f"{best:.2f}%"]
    number = [before["test_acc1"], last["test_acc1"]].index(best)
    assert f"last epoch 1: {last['test_acc1']:.2f}%; best epoch {number}: {best:.2f}%" in trained


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


@pytest.fixture
def trained(tmp_path, request):
    """The final file of a run whose flags are no defaults, and the figures of its last epoch."""
    last = run(finetune, tmp_path, "--imbalanced_factor", 30, "--num_samples", 7, "--ipdpp_sampler", "uniform",
               "--epochs", 1, "--logit_adjustment", 0.5, "--loss", getattr(request, "param", "cross_entropy"))[-1]
    return tmp_path / "finetune_ipdpp_cifar10_if30.pth", figures_of(last)


@pytest.mark.parametrize("trained", ["cross_entropy", "logit_adjusted"], indirect=True)
def test_eval_takes_from_the_file_what_the_user_does_not_give(trained):
    path, figures = trained
    metrics = evaluate(finetune, path, "--logit_adjustment", 0.5)  # of which the file decides nothing
    assert metrics == figures
    assert ("test_adjusted_acc1" in metrics) == (load_checkpoint(path)["args"]["loss"] == "cross_entropy")


def test_flags_that_the_user_gives_win(trained):
    path, figures = trained
    logits = logits_of(load_checkpoint(path), ToyCIFAR(10, train=False).data)
    metrics, expected = evaluate(finetune, path, "--imbalanced_factor", 100), accuracies(logits.argmax(1), 100)
    assert {name: metrics[f"test_{name}"] for name in expected} == pytest.approx(expected)
    assert metrics["test_few"] is not None and figures["test_few"] is None
    counts = torch.from_numpy(ToyCIFAR(10, 30).class_counts)
    for flags, drawn in ((["--num_samples", 1], counts.clip(max=1)), (["--ipdpp_sampler", "none"], counts)):
        predicted = (logits - torch.log(drawn / drawn.sum())).argmax(1)
        assert evaluate(finetune, path, *flags)["test_adjusted_acc1"] == accuracies(predicted)["acc1"]
    assert "test_adjusted_acc1" not in evaluate(finetune, path, "--loss", "logit_adjusted")
    assert evaluate(finetune, path, "--input_size", 20)["test_loss"] != figures["test_loss"]
    with pytest.raises(UserError, match="--model"):
        evaluate(finetune, path, "--model", "cifar_resnet20")


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
