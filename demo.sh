#!/usr/bin/env bash
# Both stages, probing and evaluation on toy images, beside plain cross-entropy training that sees as many images.
#     bash demo.sh                     SEED=1 bash demo.sh --device cpu   (flags go to every script and win over its own)
# A tiny ResNet, weak colour jitter, large crops and a low temperature let it learn something within minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")"
out=output_dir/demo
mkdir -p $out
common=(--toy_data --model test_resnet --jitter_strength 0.25 --min_crop 0.3 --save_freq 1000 --seed "${SEED:-0}")
given=("$@")
for flag in "$@"; do
    case $flag in --output_dir*|--log_dir*|--resume*|--eval|--eval=*|--overwrite|-h|--help|--seed|--seed=*)
        echo "demo.sh: found $flag, expected flags that all scripts can share; its runs go to $out, SEED=1 bash demo.sh sets the seed" >&2
        exit 2 ;;
    esac
done
run() { echo; echo "+ $*"; "$@"; }
newest() { ls -t "$@" | head -n 1; }  # another --imbalanced_factor leaves files of other names

# The two trainings run side by side with half of the cores each: batches this small gain little from more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + 1) / 2 ))}
# Stage 1 passes two views of 1,216 images through the network 24 times and stage 2 166 images 100 times, together
# 74,968. Plain training does as much in 61 epochs of 1,236.
python main_cifar10_finetune_ipdpp.py "${common[@]}" --ipdpp_sampler none --epochs 61 --warmup_epochs 4 \
    --batch_size 32 --lr 2e-3 --eval_freq 10 --overwrite --output_dir $out/cross_entropy "${given[@]}" \
    > $out/cross_entropy.txt 2>&1 &
plain=$!
trap 'kill $plain 2> /dev/null || true' EXIT

run python main_cifar10_pretrain_bns.py "${common[@]}" --epochs 24 --warmup_epochs 5 --batch_size 64 --lr 2e-3 \
    --temperature 0.2 --overwrite --output_dir $out/pretrain_bns "${given[@]}"
extractor=$(newest $out/pretrain_bns/pretrain_bns_*.pth)
run python main_cifar10_lineprob_bns.py "${common[@]}" --resume "$extractor" --num_samples 20 --epochs 40 \
    --warmup_epochs 2 --batch_size 32 --lr 1e-2 --eval_freq 10 --overwrite --output_dir $out/lineprob_bns "${given[@]}"
run python main_cifar10_finetune_ipdpp.py "${common[@]}" --resume "$extractor" --num_samples 20 --epochs 100 \
    --warmup_epochs 4 --batch_size 32 --lr 2e-3 --eval_freq 10 --overwrite --output_dir $out/finetune_ipdpp "${given[@]}"
run python main_cifar10_finetune_ipdpp.py --eval "$(newest $out/finetune_ipdpp/finetune_ipdpp_*.pth)" "${given[@]}"

echo; echo "waiting for plain training, which writes to $out/cross_entropy.txt"
wait $plain || { tail -n 5 $out/cross_entropy.txt; echo "demo.sh: plain training failed"; exit 1; }

python - $out "${SEED:-0}" <<'END'
import json
import sys
from pathlib import Path

out, seed = sys.argv[1:]
print(f"\n{'test accuracy on toy images, seed ' + seed:54}{'many':>8}{'medium':>8}{'few':>8}{'overall':>9}")
for folder, name in (("cross_entropy", "plain cross-entropy"), ("lineprob_bns", "stage 1, linear layer on frozen features"),
                     ("finetune_ipdpp", "stages 1 and 2")):
    last = json.loads((Path(out) / folder / "log.txt").read_text().splitlines()[-1])
    for prefix, suffix in (("test_", ""), ("test_adjusted_", ", adjusted")):
        shots = [last.get(prefix + group) for group in ("many", "medium", "few")]
        if prefix + "acc1" in last:
            print(f"{name + suffix:54}", *(f"{'none' if shot is None else format(shot, '.3f'):>7}" for shot in shots),
                  f"{last[prefix + 'acc1'] / 100:8.3f}")
print("adjusted: logits less the log of each class's share of the images trained on")
END
echo; echo "curves and pictures: tensorboard --logdir $out"
echo "next, on real images: python main_cifar10_pretrain_bns.py --data_root FOLDER (downloads CIFAR-10 where it is missing)"
