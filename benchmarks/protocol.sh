#!/usr/bin/env bash
# The runs behind a table of RESULTS.md: stage 1 with both forms of its loss, probes of the encoders and of a random one,
# every variant of stage 2 from the same encoder, and plain cross-entropy.
#     bash benchmarks/protocol.sh cifar10 FOLDER_OF_CIFAR results/NAME [flags for every script]   (paths without spaces)
# The schedules are the scripts' own unless the variables below hold other flags; FORMS are stage 1's, each run with its
# default seed, SEEDS those of everything else.
set -euo pipefail
dataset=$1 data=$2 results=$3
shift 3
: "${BNS:=}" "${PROBE:=}" "${FINETUNE:=}" "${NO_SAMPLING:=$FINETUNE}" "${CROSS_ENTROPY:=}"
: "${FORMS:=published eq12}" "${SEEDS:=42 43 44}" "${CROSS_ENTROPY_SEEDS:=$SEEDS}"
out=output_dir/$results
mkdir -p "$results"

run() {  # run NAME STAGE EXTRACTOR FLAGS: train, or go on where an earlier try stopped; keep log and command
    local name=$1 stage=$2 extractor=$3 began=$SECONDS
    shift 3
    [ -f "$results/$name.txt" ] && return
    set -- "main_${dataset}_$stage.py" --imbalanced_factor 100 "$@" --resume auto $extractor
    echo "+ $*"
    python "$@" --data_root "$data" --output_dir "$out/$name"
    cp "$out/$name/log.txt" "$results/$name.txt"
    echo "$name: $* ($((SECONDS - began)) s)" >> "$results/commands"
}

for form in $FORMS; do
    bns=bns_$form
    run $bns-seed0 pretrain_bns "" "$@" $BNS --bns_form $form
    extractor=$out/$bns-seed0/pretrain_bns_${dataset}_if100.pth
    for seed in $SEEDS; do
        run $bns-probe-seed$seed lineprob_bns $extractor "$@" $PROBE --seed $seed
        run $bns-ipdpp-seed$seed finetune_ipdpp $extractor "$@" $FINETUNE --seed $seed
        [ $form = published ] || continue
        run $bns-uniform-seed$seed finetune_ipdpp $extractor "$@" $FINETUNE --seed $seed --ipdpp_sampler uniform
        run $bns-ipdpp_n2_kernel-seed$seed finetune_ipdpp $extractor "$@" $FINETUNE --seed $seed --ipdpp_kernel published
        run $bns-no_sampling-seed$seed finetune_ipdpp $extractor "$@" $NO_SAMPLING --seed $seed --ipdpp_sampler none
    done
done
for seed in $SEEDS; do
    run random-probe-seed$seed lineprob_bns "" "$@" $PROBE --seed $seed
done
for seed in $CROSS_ENTROPY_SEEDS; do
    run cross_entropy-seed$seed finetune_ipdpp "" "$@" $CROSS_ENTROPY --seed $seed --ipdpp_sampler none
done
python benchmarks/plot_results.py "$results"
