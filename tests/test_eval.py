"""Evaluation: the figures of a run and of --eval, recomputed plainly, and what --eval takes from the checkpoint."""
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import FINETUNE, LINEPROB, PRETRAIN, final_file, load, run

from models import Classifier, create_encoder
from util.errors import UserError
from util.knn import KNNClassifier
from util.run.checkpoint import load_checkpoint
from util.toy_data import ToyCIFAR

pytestmark = pytest.mark.usefixtures("few_images")
GROUPS = ("many", "medium", "few")


def evaluate(script, path, *flags):
    """What `main` returns for `--eval path flags` and nothing else."""
    flags = ["--device", "cpu", "--amp", "none", "--eval", path, *flags]
    return load(script).main(load(script).get_args_parser().parse_args([str(flag) for flag in flags]))


def figures_of(record):
    return {name: value for name, value in record.items() if name.startswith(("test_", "knn_"))}


@torch.no_grad()
def outputs(network, images):
    """Of uint8 images (N, 32, 32, 3), made small."""
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return network.eval()(F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True))


def logits_of(path):
    """Of the test images, by a checkpoint."""
    model = Classifier(create_encoder("test_resnet"), 10)
    model.load_state_dict(load_checkpoint(path)["model"])
    return outputs(model, ToyCIFAR(10, train=False).data)


def accuracies(predicted, factor=100):
    """In percent and, of the shots, as fractions; written plainly."""
    counts, right = ToyCIFAR(10, factor).class_counts, {"all": [], "many": [], "medium": [], "few": []}
    for c, answer in zip(ToyCIFAR(10, train=False).targets, predicted.tolist(), strict=True):
        group = "many" if counts[c] > 5 else "few" if counts[c] < 2 else "medium"
        for name in ("all", group):
            right[name].append(c == answer)
    fractions = {name: sum(hits) / len(hits) if hits else None for name, hits in right.items()}
    return {"acc1": 100 * fractions.pop("all"), **fractions}


def knn_accuracies(path, factor=100):
    """By the encoder of a checkpoint, of images of this imbalance factor."""
    encoder, train_set = create_encoder("test_resnet"), ToyCIFAR(10, factor)
    weights = load_checkpoint(path)["model"]
    encoder.load_state_dict({name[4:]: value for name, value in weights.items() if name.startswith("enc.")})
    neighbours = KNNClassifier(outputs(encoder, train_set.data), torch.tensor(train_set.targets), 10)
    votes = neighbours(outputs(encoder, ToyCIFAR(10, train=False).data))
    return {f"knn_{name}": value for name, value in accuracies(votes.argmax(1), factor).items()}


@pytest.mark.parametrize("script, amp", [(LINEPROB, "none"), (FINETUNE, "bfloat16")])
def test_eval_repeats_the_last_epoch_exactly(script, amp, tmp_path, capsys):
    before, last = run(script, tmp_path, "--epochs", 2, "--num_samples", 10, "--amp", amp, "--blr", 0.05,
                       "--batch_size", 20)
    trained = capsys.readouterr().out
    files = sorted(tmp_path.iterdir())
    metrics = evaluate(script, final_file(script, tmp_path), "--amp", amp)
    assert metrics == figures_of(last) and last["test_loss"] != before["test_loss"]
    assert sorted(tmp_path.iterdir()) == files, "--eval writes nothing"
    # What is printed, in the format of the published code.
    lines = [line for line in trained.splitlines() if re.match(r"\* |Accuracy of the network", line)]
    assert lines[-4:] == capsys.readouterr().out.splitlines()[1:5]
    for number, record in enumerate((before, last)):
        acc1, acc5, loss = (record[f"test_{name}"] for name in ("acc1", "acc5", "loss"))
        shots = " ".join(f"{name.capitalize()}-Shot Acc@1 {record[f'test_{name}']:.3f}" for name in GROUPS)
        assert lines[4 * number:4 * number + 3] == [
            f"* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}",
            f"Accuracy of the network on the 100 test images: {acc1:.1f}%", f"* {shots}"]
    reached = [before["test_acc1"], last["test_acc1"]]
    assert re.findall(r"^Max accuracy: (.*)$", trained, re.M) == [f"{reached[0]:.2f}%", f"{max(reached):.2f}%"]


@pytest.mark.slow
# Learning rates at which the logits tell classes apart after three epochs.
@pytest.mark.parametrize("script, blr, flags", [
    (LINEPROB, 3, []), (FINETUNE, 0.2, ["--sampling_freq", 1]), (FINETUNE, 0.05, ["--ipdpp_sampler", "none"])])
def test_adjusted_figures_take_out_the_prior_of_the_images_drawn(script, blr, flags, tmp_path, capsys):
    last = run(script, tmp_path, "--epochs", 3, "--warmup_epochs", 0, "--batch_size", 10, "--blr", blr,
               "--num_samples", 10, *flags)[-1]
    path = final_file(script, tmp_path)
    logits = logits_of(path)
    targets = torch.tensor(ToyCIFAR(10).targets)
    adjusted, by_all, plain = (accuracies((logits - torch.log(counts / counts.sum())).argmax(1)) for counts in (
        targets[load_checkpoint(path)["subset"]].bincount(), targets.bincount(), torch.ones(10)))
    assert {name: last[f"test_adjusted_{name}"] for name in adjusted} == pytest.approx(adjusted)
    assert {name: last[f"test_{name}"] for name in plain} == pytest.approx(plain)
    assert adjusted != plain and (adjusted != by_all or "none" in flags), "or another adjustment would pass too"
    shots = " ".join(f"{name.capitalize()}-Shot Acc@1 {adjusted[name]:.3f}" for name in GROUPS)
    line = f"* logit-adjusted (tau 1): Acc@1 {adjusted['acc1']:.3f} {shots}"
    assert line in capsys.readouterr().out.splitlines()
    assert evaluate(script, path) == figures_of(last) and line in capsys.readouterr().out.splitlines()


def test_knn_figures_are_those_of_plainly_computed_features(tmp_path, capsys):
    history = run(PRETRAIN, tmp_path, "--epochs", 2, "--batch_size", 60, "--eval_freq", 2, "--blr", 0.01)
    path, printed = final_file(PRETRAIN, tmp_path), capsys.readouterr().out
    figures = knn_accuracies(path)
    assert figures_of(history[0]) == {} and figures_of(history[1]) == pytest.approx(figures)
    shots = " ".join(f"{name.capitalize()}-Shot Acc@1 {figures[f'knn_{name}']:.3f}" for name in GROUPS)
    assert re.findall(r"^\* .*", printed, re.M) == [f"* kNN Acc@1 {figures['knn_acc1']:.3f} {shots}"]
    # Probing leaves the encoder as it is.
    run(LINEPROB, tmp_path / "probe", "--epochs", 1, "--resume", path)
    for script, file in ((PRETRAIN, path), (LINEPROB, final_file(LINEPROB, tmp_path / "probe"))):
        assert evaluate(PRETRAIN, file) == figures_of(history[1]), script


@pytest.fixture
def trained(tmp_path, request):
    """The final file of a run whose flags are no defaults, and the figures of its last epoch."""
    last = run(FINETUNE, tmp_path, "--imbalanced_factor", 30, "--num_samples", 7, "--ipdpp_sampler", "uniform",
               "--epochs", 1, "--logit_adjustment", 0.5, "--loss", getattr(request, "param", "cross_entropy"))[-1]
    return tmp_path / "finetune_ipdpp_cifar10_if30.pth", figures_of(last)


@pytest.mark.parametrize("trained", ["cross_entropy", "logit_adjusted"], indirect=True)
def test_eval_takes_from_the_file_what_the_user_does_not_give(trained):
    """And does not adjust again what was trained with adjusted logits."""
    path, figures = trained
    metrics = evaluate(FINETUNE, path, "--logit_adjustment", 0.5)  # of which the file decides nothing
    assert metrics == figures
    assert ("test_adjusted_acc1" in metrics) == (load_checkpoint(path)["args"]["loss"] == "cross_entropy")
    assert evaluate(PRETRAIN, path) == pytest.approx(knn_accuracies(path, 30))


def test_flags_that_the_user_gives_win(trained):
    path, figures = trained
    logits = logits_of(path)
    metrics, expected = evaluate(FINETUNE, path, "--imbalanced_factor", 100), accuracies(logits.argmax(1), 100)
    assert {name: metrics[f"test_{name}"] for name in expected} == pytest.approx(expected)
    assert metrics["test_few"] is not None and figures["test_few"] is None
    counts = torch.from_numpy(ToyCIFAR(10, 30).class_counts)
    for flags, drawn in ((["--num_samples", 1], counts.clip(max=1)), (["--ipdpp_sampler", "none"], counts)):
        predicted = (logits - torch.log(drawn / drawn.sum())).argmax(1)
        assert evaluate(FINETUNE, path, *flags)["test_adjusted_acc1"] == accuracies(predicted)["acc1"]
    assert "test_adjusted_acc1" not in evaluate(FINETUNE, path, "--loss", "logit_adjusted")
    assert evaluate(FINETUNE, path, "--input_size", 20)["test_loss"] != figures["test_loss"]
    with pytest.raises(UserError, match="--model"):
        evaluate(FINETUNE, path, "--model", "cifar_resnet20")
