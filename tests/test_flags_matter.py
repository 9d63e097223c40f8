"""Every flag of every script has its effect, the seed decides all that is random, and --amp the type of activations."""
import importlib
import math

import pytest
import torch
from conftest import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.batches import EpochBatches
from util.run.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("few_images", "no_pictures")
STAGES = ("pretrain_bns", "lineprob_bns", "finetune_ipdpp")
BRIEF = {"pretrain_bns": ["--epochs", 1, "--batch_size", 42, "--warmup_epochs", 0, "--eval_freq", 5],
         "lineprob_bns": ["--epochs", 1, "--batch_size", 20, "--warmup_epochs", 0, "--num_samples", 10],
         "finetune_ipdpp": ["--epochs", 1, "--batch_size", 20, "--warmup_epochs", 0, "--num_samples", 10]}
TWO = ["--epochs", 2]
# Of each flag: flags of both runs, what the flag adds, and what must change.
EFFECTS = {
    "imbalanced_factor": ([], [10], "weights"), "input_size": ([], [24], "weights"),
    "model": ([], ["cifar_resnet20"], "weights"), "min_crop": ([], [0.9], "weights"),
    "jitter_strength": ([], [0.1], "weights"), "augment": ([], ["crop"], "weights"),
    "embed_dim": ([], [16], "weights"), "temperature": ([], [0.2], "weights"), "bns_form": ([], ["eq12"], "weights"),
    "num_extra_positives": (["--bns_form", "eq12"], [0], "weights"),
    "num_samples": ([], [5], "weights"), "logit_adjustment": ([], [0], "log"),
    "sampling_freq": (["--epochs", 3], [1], "weights"), "ipdpp_sampler": ([], ["uniform"], "weights"),
    "ipdpp_kernel": (["--epochs", 3, "--sampling_freq", 1, "--blr", 0.2], ["published"], "weights"),
    "mcmc_steps": (["--ipdpp_sampler", "mcmc"], [1], "weights"), "loss": ([], ["logit_adjusted"], "weights"),
    "epochs": ([], [2], "weights"), "batch_size": ([], [30], "weights"), "accum_iter": ([], [2], "weights"),
    "opt": ([], ["sgd"], "weights"), "weight_decay": ([], [0.5], "weights"), "lr": ([], [0.1], "weights"),
    "blr": ([], [0.1], "weights"), "min_lr": ([], [5e-5], "weights"), "warmup_epochs": (TWO, [1], "weights"),
    "amp": ([], ["bfloat16"], "weights"), "seed": ([], [5], "weights"), "start_epoch": (TWO, [1], "weights"),
    "eval_freq": (["--epochs", 3], [2], "log"), "save_freq": (TWO, [1], "files"),
    "keep_checkpoints": ([*TWO, "--save_freq", 1], [1], "files"), "log_dir": ([], ["{folder}/logs"], "files"),
    "resume": ([], ["{encoder}"], "weights"), "encoder": ([], ["{encoder}"], "weights"),
    "deterministic": ([], [], "algorithms"),
}
SEEN_ELSEWHERE = {  # why these must change nothing here, or what else tests them
    "toy_data": "test_data.py", "data_root": "test_data.py",
    "num_classes": "is refused unless it is that of the data set", "device": "only the CPU is sure to be there",
    "compile": "test_compile.py and test_two_processes.py", "eval": "test_eval.py",
    "output_dir": "where all tests look", "overwrite": "test_output_folder.py"}


def outcome(stage, folder, *flags):
    """What a run of main_cifar10_<stage>.py leaves: its log, weights, files, and PyTorch's choice of algorithms."""
    torch.use_deterministic_algorithms(False)
    history = run(f"main_cifar10_{stage}", folder / "run", *BRIEF[stage], *flags)
    final, = (folder / "run").glob(f"{stage}_*.pth")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    return {"log": history, "weights": load_checkpoint(final)["model"], "algorithms": deterministic,
            "files": sorted(str(path.relative_to(folder)).partition("tfevents")[0] for path in folder.rglob("*"))}


def same_weights(one, two):
    return one.keys() == two.keys() and all(
        one[name].shape == two[name].shape and torch.allclose(one[name].double(), two[name].double(), 0, 1e-9)
        for name in one)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Outcomes of the runs without the flag, by stage and flags."""
    known = {}

    def of(stage, *flags):
        if (stage, *flags) not in known:
            known[stage, *flags] = outcome(stage, tmp_path_factory.mktemp("plain"), *flags)
        return known[stage, *flags]
    return of


def flags_of(stage):
    """Names of all flags of a script."""
    parsed = vars(importlib.import_module(f"main_cifar10_{stage}").get_args_parser().parse_args([]))
    return parsed.keys() - {"stage", "dataset", "given"}


CASES = [(stage, flag) for stage in STAGES for flag in sorted(flags_of(stage) - SEEN_ELSEWHERE.keys())]


@pytest.mark.slow
@pytest.mark.parametrize("stage, flag", CASES)
def test_each_flag_changes_what_it_is_there_for(stage, flag, plain, tmp_path):
    shared, values, part = EFFECTS[flag]
    words = {"encoder": tmp_path / "source" / "run" / "lineprob_bns_cifar10_if100.pth", "folder": tmp_path / "changed"}
    if flag in ("resume", "encoder"):
        outcome("lineprob_bns", tmp_path / "source", "--seed", 7)
        if stage == "lineprob_bns" and flag == "resume":
            shared, values = TWO, ["{encoder}"]
    before = plain(stage, *shared)
    changed = [f"--{flag}", *(str(value).format(**words) for value in values)]
    after = outcome(stage, tmp_path / "changed", *shared, *changed)
    if part == "weights":
        assert not same_weights(before["weights"], after["weights"])
    else:
        assert before[part] != after[part]


@pytest.mark.parametrize("stage", STAGES)
def test_without_another_flag_nothing_changes(stage, plain, tmp_path):
    """Or the test above would prove nothing."""
    before, after = plain(stage), outcome(stage, tmp_path)
    assert same_weights(before["weights"], after["weights"])
    assert all(before[part] == after[part] for part in ("log", "files", "algorithms"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_seed_decides_weights_draws_order_and_views_and_nothing_else_does(stage, tmp_path, monkeypatch):
    """All images are the first one, so that views differ by the draw of the augmentation only."""
    iterate, seen = EpochBatches.__iter__, []

    def watched(batches):
        batches.loader.images = batches.loader.images[:1].expand_as(batches.loader.images)
        indices = torch.cat(list(batches.indices))
        seen.append({"order": indices.argsort()})  # places among the images drawn, whatever was drawn
        for views, labels in iterate(batches):
            seen[-1].setdefault("views", views[0])
            yield views, labels

    monkeypatch.setattr(EpochBatches, "__iter__", watched)

    def trained(seed, folder):
        seen.clear()
        flags = [*BRIEF[stage], "--lr", 1e-12, "--seed", seed]
        run(f"main_cifar10_{stage}", tmp_path / folder, *flags)
        checkpoint = load_checkpoint(tmp_path / folder / f"{stage}_cifar10_if100.pth")
        head = "projector.0.weight" if stage == "pretrain_bns" else "lin.weight"
        found = {**seen[-1], "encoder": checkpoint["model"]["enc.conv1.weight"], "head": checkpoint["model"][head]}
        return found if checkpoint["subset"] is None else {**found, "draw": checkpoint["subset"]}

    one, again, other = trained(3, "one"), trained(3, "again"), trained(4, "other")
    assert ("draw" in one) == (stage != "pretrain_bns")
    for name, value in one.items():
        assert torch.equal(value, again[name]), name
        assert not torch.allclose(value.double(), other[name].double(), atol=1e-6), name


# --------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("stage, amp, dtype", [
    ("pretrain_bns", "bfloat16", torch.bfloat16), ("lineprob_bns", "bfloat16", torch.bfloat16),
    ("finetune_ipdpp", "float16", torch.float16), ("finetune_ipdpp", "none", torch.float32)])
def test_activations_have_the_type_that_amp_names(stage, amp, dtype, tmp_path):
    seen = set()

    def note(module, _, output):
        if isinstance(module, torch.nn.Conv2d) and len(output) > 2:  # two images try the encoder out
            seen.add(("training" if torch.is_grad_enabled() else "prediction", output.dtype))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        run(f"main_cifar10_{stage}", tmp_path, *BRIEF[stage], "--amp", amp)
    finally:
        hook.remove()
    assert seen == {("training", dtype), ("prediction", dtype)}


def gradient_norms(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars("train/gradient_norm")]


def test_gradient_norms_of_float16_are_those_of_float32(tmp_path):
    for amp in ("float16", "none"):
        run("main_cifar10_finetune_ipdpp", tmp_path / amp, *BRIEF["finetune_ipdpp"], "--lr", 1e-9, "--amp", amp)
    half, full = (gradient_norms(tmp_path / amp) for amp in ("float16", "none"))
    assert half == pytest.approx(full, rel=0.05) and all(math.isfinite(norm) for norm in full)


def test_the_scaler_of_float16_goes_on_where_it_was(tmp_path):
    """It counts the steps since its scale last changed."""
    flags = [*BRIEF["finetune_ipdpp"], "--amp", "float16", "--lr", 1e-4]
    states = []
    for epochs in (1, 2):
        run("main_cifar10_finetune_ipdpp", tmp_path, *flags, "--epochs", epochs, "--resume", "auto")
        states.append(load_checkpoint(tmp_path / "finetune_ipdpp_cifar10_if100.pth")["scaler"])
    assert [state["_growth_tracker"] for state in states] == [3, 6]
