"""Every flag of every script has its effect, the seed decides all that is random, and --amp the type of activations."""
import math

import pytest
import torch
from conftest import FINETUNE, LINEPROB, PRETRAIN, final_file, load, run, scalars

from util.batches import DeviceLoader
from util.run.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("few_images")
SCRIPTS = (PRETRAIN, LINEPROB, FINETUNE)
BRIEF = ["--epochs", 1, "--warmup_epochs", 0]
OF_SCRIPT = {PRETRAIN: [*BRIEF, "--batch_size", 42, "--eval_freq", 5],
             LINEPROB: [*BRIEF, "--batch_size", 20, "--num_samples", 10],
             FINETUNE: [*BRIEF, "--batch_size", 20, "--num_samples", 10]}
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
    "loss": ([], ["logit_adjusted"], "weights"),
    "epochs": ([], [2], "weights"), "batch_size": ([], [30], "weights"),
    "opt": ([], ["sgd"], "weights"), "weight_decay": ([], [0.5], "weights"), "lr": ([], [0.1], "weights"),
    "blr": ([], [0.1], "weights"), "min_lr": ([], [5e-5], "weights"), "warmup_epochs": (TWO, [1], "weights"),
    "amp": ([], ["bfloat16"], "weights"), "seed": ([], [5], "weights"),
    "eval_freq": (["--epochs", 3], [2], "log"), "save_freq": (TWO, [1], "files"),
    "keep_checkpoints": ([*TWO, "--save_freq", 1], [1], "files"), "log_dir": ([], ["{folder}/logs"], "files"),
    "resume": ([], ["{encoder}"], "weights"), "encoder": ([], ["{encoder}"], "weights"),
    "deterministic": ([], [], "algorithms"),
}
# These change nothing here, or are refused here, and other files test them.
SEEN_ELSEWHERE = {"toy_data", "data_root", "num_classes", "device", "compile", "eval", "output_dir", "overwrite"}
CASES = [(script, flag) for script in SCRIPTS for flag in sorted(
    vars(load(script).get_args_parser().parse_args([])).keys() - {"stage", "dataset", "given"} - SEEN_ELSEWHERE)]


def outcome(script, folder, *flags):
    """What a run leaves: its log, weights, files, and PyTorch's choice of algorithms."""
    history = run(script, folder / "run", *OF_SCRIPT[script], *flags)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    final, = (folder / "run").glob("*_if*.pth")
    return {"log": history, "weights": load_checkpoint(final)["model"], "algorithms": deterministic,
            "files": sorted(str(path.relative_to(folder)).partition("tfevents")[0] for path in folder.rglob("*"))}


def same_weights(one, two):
    return one.keys() == two.keys() and all(
        one[name].shape == two[name].shape and torch.allclose(one[name].double(), two[name].double(), 0, 1e-9)
        for name in one)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Outcomes of the runs without the flag, by script and flags."""
    known = {}

    def of(*command):
        if command not in known:
            known[command] = outcome(command[0], tmp_path_factory.mktemp("plain"), *command[1:])
        return known[command]
    return of


@pytest.mark.slow
@pytest.mark.parametrize("script, flag", CASES)
def test_each_flag_changes_what_it_is_there_for(script, flag, plain, tmp_path):
    shared, values, part = EFFECTS[flag]
    words = {"encoder": final_file(LINEPROB, tmp_path / "source" / "run"), "folder": tmp_path / "changed"}
    if flag in ("resume", "encoder"):
        outcome(LINEPROB, tmp_path / "source", "--seed", 7)
        if script == LINEPROB and flag == "resume":
            shared = TWO
    before = plain(script, *shared)
    changed = [f"--{flag}", *(str(value).format(**words) for value in values)]
    after = outcome(script, tmp_path / "changed", *shared, *changed)
    if part == "weights":
        assert not same_weights(before["weights"], after["weights"])
    else:
        assert before[part] != after[part]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_another_flag_nothing_changes(script, plain, tmp_path):
    """Or the test above would prove nothing."""
    before, after = plain(script), outcome(script, tmp_path)
    assert same_weights(before["weights"], after["weights"])
    assert all(before[part] == after[part] for part in ("log", "files", "algorithms"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_seed_decides_weights_draws_order_and_views_and_nothing_else_does(script, tmp_path, monkeypatch):
    """All images are the first one, so that views differ by the draw of the augmentation only."""
    original, seen = DeviceLoader.epoch, []

    def watched(loader, *args):
        loader.images = loader.images[:1].expand_as(loader.images)
        indices = torch.cat(loader.indices(*args))
        seen.append({"order": indices.argsort()})  # places among the images drawn, whatever was drawn
        for views, labels in original(loader, *args):
            seen[-1].setdefault("views", views[0])
            yield views, labels

    monkeypatch.setattr(DeviceLoader, "epoch", watched)

    def trained(seed, folder):
        run(script, tmp_path / folder, *OF_SCRIPT[script], "--lr", 1e-12, "--seed", seed)
        checkpoint = load_checkpoint(final_file(script, tmp_path / folder))
        head = "projector.0.weight" if script == PRETRAIN else "lin.weight"
        found = {**seen[-1], "encoder": checkpoint["model"]["enc.conv1.weight"], "head": checkpoint["model"][head]}
        return found if script == PRETRAIN else {**found, "draw": checkpoint["subset"]}

    one, again, other = trained(3, "one"), trained(3, "again"), trained(4, "other")
    for name, value in one.items():
        assert torch.equal(value, again[name]), name
        assert not torch.allclose(value.double(), other[name].double(), atol=1e-6), name


@pytest.mark.parametrize("script, amp, dtype", [
    (PRETRAIN, "bfloat16", torch.bfloat16), (LINEPROB, "bfloat16", torch.bfloat16),
    (FINETUNE, "float16", torch.float16), (FINETUNE, "none", torch.float32)])
def test_activations_have_the_type_that_amp_names(script, amp, dtype, tmp_path):
    seen = set()

    def note(module, _, output):
        if isinstance(module, torch.nn.Conv2d) and len(output) > 2:  # two images try the encoder out
            seen.add(("training" if torch.is_grad_enabled() else "prediction", output.dtype))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        run(script, tmp_path, *OF_SCRIPT[script], "--amp", amp)
    finally:
        hook.remove()
    assert seen == {("training", dtype), ("prediction", dtype)}


def test_float16_has_the_gradient_norms_of_float32_and_its_scaler_goes_on(tmp_path):
    def trained(amp, epochs):
        run(FINETUNE, tmp_path / amp, *OF_SCRIPT[FINETUNE], "--lr", 1e-9, "--amp", amp, "--epochs", epochs,
            "--resume", "auto")
        norms = [value for _, value in scalars(tmp_path / amp)["train/gradient_norm"]]
        return norms, load_checkpoint(final_file(FINETUNE, tmp_path / amp))["scaler"]

    (half, scaler), (full, _) = trained("float16", 1), trained("none", 1)
    assert half == pytest.approx(full, rel=0.05) and all(math.isfinite(norm) for norm in full)
    assert scaler["_growth_tracker"] == 3  # steps since its scale last changed
    assert trained("float16", 2)[1]["_growth_tracker"] == 6
