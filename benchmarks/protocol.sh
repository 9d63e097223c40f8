#!/usr/bin/env bash
# The runs behind a table of RESULTS.md: stage 1 with both forms of its loss, probes of the encoders and of a random one,
# every variant of stage 2 from the same encoder, and plain cross-entropy.
#     bash benchmarks/protocol.sh cifar10 FOLDER_OF_CIFAR results/NAME [flags for every script]
# The schedules are the scripts' own unless the variables below hold other flags; SEEDS are those of all but stage 1.
set -euo pipefail
dataset=$1 data=$2 results=$3
shift 3
: "${BNS:=}" "${PROBE:=}" "${FINETUNE:=}" "${NO_SAMPLING:=$FINETUNE}" "${CROSS_ENTROPY:=}"
: "${SEEDS:=42 43 44}" "${CROSS_ENTROPY_SEEDS:=$SEEDS}"
out=output_dir/$results
mkdir -p "$results"

run() {  # run NAME STAGE FLAGS: train, unless that has been done, and keep log and command
    local name=$1 stage=$2 began=$SECONDS
    shift 2
    [ -f "$results/$name.txt" ] && return
    echo "+ main_${dataset}_$stage.py $*"
    python "main_${dataset}_$stage.py" --data_root "$data" --imbalanced_factor 100 "$@" --output_dir "$out/$name" --overwrite
    cp "$out/$name/log.txt" "$results/$name.txt"
    echo "$name: main_${dataset}_$stage.py $* ($((SECONDS - began)) s)" >> "$results/commands"
}

for form in published eq12; do
    bns=bns_$form
    run $bns-seed0 pretrain_bns "$@" $BNS --bns_form $form
    from=(--resume "$out/$bns-seed0/pretrain_bns_${dataset}_if100.pth")
    for seed in $SEEDS; do
        run $bns-probe-seed$seed lineprob_bns "$@" $PROBE --seed $seed "${from[@]}"
        run $bns-ipdpp-seed$seed finetune_ipdpp "$@" $FINETUNE --seed $seed "${from[@]}"
        [ $form = published ] || continue
        run $bns-uniform-seed$seed finetune_ipdpp "$@" $FINETUNE --seed $seed "${from[@]}" --ipdpp_sampler uniform
        run $bns-ipdpp_n2_kernel-seed$seed finetune_ipdpp "$@" $FINETUNE --seed $seed "${from[@]}" --ipdpp_kernel published
        run $bns-no_sampling-seed$seed finetune_ipdpp "$@" $NO_SAMPLING --seed $seed "${from[@]}" --ipdpp_sampler none
        run random-probe-seed$seed lineprob_bns "$@" $PROBE --seed $seed
    done
done
for seed in $CROSS_ENTROPY_SEEDS; do
    run cross_entropy-seed$seed finetune_ipdpp "$@" $CROSS_ENTROPY --seed $seed --ipdpp_sampler none
done
python benchmarks/plot_results.py "$results"
