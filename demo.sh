#!/usr/bin/env bash
# Both stages and an evaluation on toy images, beside plain cross-entropy training of the same length.
#     bash demo.sh                 SEED=1 bash demo.sh --device cpu    (flags are passed to every script)
# A tiny ResNet, weak colour jitter and a low temperature let it learn something within minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")"
out=output_dir/demo
common=(--toy_data --model test_resnet --jitter_strength 0.25 --batch_size 64 --blr 8e-3 --seed "${SEED:-0}"
        --save_freq 1000 --overwrite "$@")

step() { printf '\n=== %s\n' "$1"; shift; echo "+ $*"; "$@" | tee "$out/last.txt"; }
shots() { grep -h -e "-Shot" -e "^\* Acc@1" "$out/last.txt" | tail -n 2 > "$out/$1.txt"; }

mkdir -p "$out"
step "Stage 1: pretraining by BNS" python main_cifar10_pretrain_bns.py "${common[@]}" --epochs 20 --warmup_epochs 4 \
    --temperature 0.2 --output_dir $out/pretrain_bns
extractor=$out/pretrain_bns/pretrain_bns_cifar10_if100.pth
step "Linear probing" python main_cifar10_lineprob_bns.py "${common[@]}" --epochs 20 --warmup_epochs 2 --num_samples 20 \
    --eval_freq 10 --resume $extractor --output_dir $out/lineprob_bns
step "Stage 2: fine-tuning by IP-DPP" python main_cifar10_finetune_ipdpp.py "${common[@]}" --epochs 60 --warmup_epochs 2 \
    --num_samples 50 --sampling_freq 10 --eval_freq 10 --resume $extractor --output_dir $out/finetune_ipdpp
step "Evaluation of the saved checkpoint" python main_cifar10_finetune_ipdpp.py "${common[@]}" \
    --eval $out/finetune_ipdpp/finetune_ipdpp_cifar10_if100.pth
shots two_stages
# Stage 1 passes 20 x 2 views x 1,216 images through the network and stage 2 60 x 337: as many as 56 epochs of 1,236.
step "For comparison: plain cross-entropy on as many images" python main_cifar10_finetune_ipdpp.py "${common[@]}" \
    --ipdpp_sampler none --epochs 56 --warmup_epochs 4 --eval_freq 10 --output_dir $out/cross_entropy
shots cross_entropy

printf '\nToy images, imbalance factor 100, seed %-6s  many    medium  few     overall\n' "${SEED:-0}"
for run in cross_entropy two_stages; do
    awk -v run=$run '/Shot/ {many=$4; medium=$7; few=$10} /^\* Acc/ {overall=$3/100}
        END {printf "%-44s  %.3f   %.3f   %.3f   %.3f\n", run, many, medium, few, overall}' "$out/$run.txt"
done
rm -f "$out/last.txt"
echo
echo "Curves and pictures:  tensorboard --logdir $out"
echo "Next: the same on real images, for example  python main_cifar10_pretrain_bns.py --data_root FOLDER --imbalanced_factor 100"
