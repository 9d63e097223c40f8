#!/usr/bin/env bash
# The runs of a study: stage 1; from its encoder, probing and the variants of stage 2; and the same from scratch.
#
#     bash benchmarks/protocol.sh cifar10|cifar100 CIFAR_FOLDER RESULTS_FOLDER [flags for every script]
#     BNS="--epochs 200" OMP_NUM_THREADS=1 taskset -c 0 bash benchmarks/protocol.sh cifar10 /data/cifar \
#         results/cifar10_if100_resnet32 --model cifar_resnet32
#
# Call it at the root of the repository, with paths without spaces. Call it again to go on: a finished run is not
# repeated, and a stopped one continues after its last checkpoint. It may run several times at once, for example once
# per core: a run that is under way elsewhere is passed over, and so is one whose stage 1 is missing.
#
# RESULTS_FOLDER gets the log of each finished run, VARIANT-seed<number>.txt, and in `commands` a line per part of a
# run: its command, seconds (on CPU cores those that they computed, not those that passed), hardware and git commit.
# Checkpoints go to output_dir/RESULTS_FOLDER/VARIANT-seed<number>. Copy that folder with `cp -a`: a part that was killed
# counts until its log was written last.
# Variables, with their defaults:
: "${IF:=100}"            # imbalance factors; each takes the place of {IF} in RESULTS_FOLDER: 'results/cifar10_if{IF}'
: "${SEEDS:=42 43 44}"    # of the later stages; runs marked $two below take the first two
: "${BNS:=}"              # flags of stage 1, which otherwise is the paper's: 1000 epochs
: "${LATER:=}"            # flags of every later stage, such as '--lr 0.001'; else they are the paper's
: "${RUNS:=bns bns-probe bns-ipdpp bns-uniform bns-no_sampling scratch-uniform scratch-cross_entropy}"  # or 'bns-*'
: "${OUT:=output_dir}"    # where checkpoints go
: "${ON:=$(nproc) core}"  # hardware of a run, for its cost (nproc knows taskset and OMP_NUM_THREADS); else ON="1 H100"
set -feuo pipefail        # f: patterns of RUNS are not expanded to files

fail() { echo "protocol.sh: $*" >&2; exit 2; }

recipe() {
    #   variant                     seeds     stage          encoder  flags
    run bns                         0         pretrain_bns   -
    run bns-probe                   "$SEEDS"  lineprob_bns   bns
    run bns-ipdpp                   "$SEEDS"  finetune_ipdpp bns
    run bns-uniform                 "$SEEDS"  finetune_ipdpp bns      --ipdpp_sampler uniform
    run bns-no_sampling             "$two"    finetune_ipdpp bns      --ipdpp_sampler none --epochs "$(epochs_for all)"
    run scratch-uniform             "$SEEDS"  finetune_ipdpp -        --ipdpp_sampler uniform
    run scratch-cross_entropy       "$two"    finetune_ipdpp -        --ipdpp_sampler none --epochs 200

    # More. How many images to keep of a class, at the same number of images seen:
    local n
    for n in $numbers; do
        run bns-ipdpp-n$n           "$SEEDS"  finetune_ipdpp bns      --num_samples $n --epochs "$(epochs_for $n)"
        run bns-uniform-n$n         "$SEEDS"  finetune_ipdpp bns      --num_samples $n --epochs "$(epochs_for $n)" \
            --ipdpp_sampler uniform
    done
    # Plain training that sees as many images as stage 1, whose views count twice, and stage 2 together:
    run scratch-cross_entropy-as_long "$two"  finetune_ipdpp -        --ipdpp_sampler none \
        --epochs $((2 * epochs1 + $(epochs_for all)))
    # Learning rates: the paper's, and a higher one.
    local lr
    for lr in 0.00025 0.001; do
        run bns-ipdpp-lr$lr         "$SEEDS"  finetune_ipdpp bns      --lr $lr
        run bns-uniform-lr$lr       "$SEEDS"  finetune_ipdpp bns      --lr $lr --ipdpp_sampler uniform
        run scratch-uniform-lr$lr   "$two"    finetune_ipdpp -        --lr $lr --ipdpp_sampler uniform
    done
    # Other forms of the method:
    run bns-ipdpp-n2_kernel         "$SEEDS"  finetune_ipdpp bns      --ipdpp_kernel published
    run bns-ipdpp-adjusted_loss     "$SEEDS"  finetune_ipdpp bns      --loss logit_adjusted
    run scratch-adjusted_loss       "$two"    finetune_ipdpp -        --loss logit_adjusted --ipdpp_sampler none \
        --epochs 200
    run eq12                        0         pretrain_bns   -        --bns_form eq12
    run eq12-probe                  "$SEEDS"  lineprob_bns   eq12
    run eq12-ipdpp                  "$SEEDS"  finetune_ipdpp eq12
}

epochs_for() {  # epochs_for N: with N images a class (or all), epochs that see as many as 100 of the script's own
    awk -v classes=$classes -v own=$own -v n="${1/all/50000}" -v factor="$factor" 'BEGIN {
        for (c = 0; c < classes; c++) {
            count = int(50000 / classes * factor ^ (-c / (classes - 1)))  # as in util/imbalanced_cifar.py
            reference += count < own ? count : own
            epoch += count < n ? count : n
        }
        printf "%.0f", 100 * reference / epoch
    }'
}

run() {  # run VARIANT SEEDS STAGE ENCODER [flags]: those of its runs that RUNS asks for
    local variant=$1 seeds=$2 seed pattern
    shift 2
    variants+=" $variant"
    for seed in $seeds; do
        for pattern in $RUNS; do
            if [[ $variant == $pattern || $variant-seed$seed == $pattern ]]; then
                chosen+=" $pattern "
                [ "$dry" ] || { train "$variant-seed$seed" "$@" --seed "$seed"; break; }
            fi
        done
    done
}

train() {  # train NAME STAGE ENCODER FLAGS: until it is over, from where an earlier part of it stopped
    local name=$1 stage=$2 encoder=$3 folder=$OUT/$results/$1 code=0 extractor="" earlier began computed_before seconds
    shift 3
    exec 9> "$folder.lock"  # held until the next run's, by python too, should it outlive this script
    flock -n 9 || { echo "$name: passed over: under way elsewhere"; return; }
    [ "$encoder" = - ] || extractor=$encoder-seed0/pretrain_bns_${dataset}_if$factor.pth
    case $stage in
        pretrain_bns) set -- "$@" $BNS ;;
        *) set -- --eval_freq 10 $LATER "$@" ;;  # the variant's own flags win
    esac
    set -- "main_${dataset}_$stage.py" --imbalanced_factor "$factor" "${flags[@]}" "$@" --resume auto
    local command="$*${extractor:+ $extractor}"  # without this machine's paths
    # A part that was killed together with this script ended, as far as is known, when its log was written last.
    if [ "$folder/log.txt" -nt "$folder.began" ] && [ -f "$folder.began" ]; then
        write_down "$name" $(($(stat -c %Y "$folder/log.txt") - $(head -1 "$folder.began"))) ", stopped"
    fi
    earlier=$(grep "^$name: " "$results/commands" 2> /dev/null | tail -1) || true
    [[ -z $earlier || $earlier == "$name: $command ("* ]] ||
        fail "$name was run with other flags; expected the same ones, or another folder: $earlier"
    [ -f "$results/$name.txt" ] && return
    if [ "$extractor" ] && [ ! -f "$OUT/$results/$extractor" ]; then
        echo "$name: passed over: no $OUT/$results/$extractor"
        return
    fi

    printf '%s\n' "$(date +%s)" "$ON, commit $(commit | xargs)" "$command" > "$folder.began"
    echo "+ $command"
    began=$(date +%s)
    count_computed
    computed_before=$computed
    python "$@" ${extractor:+"$OUT/$results/$extractor"} --data_root "$data" --output_dir "$folder" || code=$?
    count_computed
    seconds=$(($(date +%s) - began))
    [[ $ON == *" core" ]] && seconds=$(((computed - computed_before) / ${ON% core}))
    if [ $code = 2 ] && [ ! -s "$folder/log.txt" ]; then  # a wrong flag, say: nothing was trained
        rm "$folder.began"
        exit $code
    fi
    [ $code = 0 ] || { write_down "$name" $seconds ", stopped"; exit $code; }
    write_down "$name" $seconds ""
    cp "$folder/log.txt" "$results/.$name.copy"
    mv "$results/.$name.copy" "$results/$name.txt"  # never half of it
}

write_down() {  # write_down NAME SECONDS HOW: add the part that began last to `commands`
    local began=$OUT/$results/$1.began where command
    { read -r; read -r where; read -r command; } < "$began"
    rm "$began"
    echo "$1: $command ($2 s on $where$3)" >> "$results/commands"
}

count_computed() {  # set `computed` to the seconds of CPU time of all that this script has waited for
    local file=$OUT/$results/.times.$$
    times > "$file"  # in $(...) they would be those of the subshell
    computed=$(awk -F'[ms ]+' 'NR == 2 { printf "%d", 60 * $1 + $2 + 60 * $3 + $4 }' "$file")
    rm "$file"
}

commit() {
    git rev-parse --short HEAD
    git diff --quiet HEAD -- '*.py' ':!benchmarks' ':!tests' || echo "with changes"
}

[ $# -ge 3 ] || fail "expected cifar10 or cifar100, the folder of CIFAR and the folder for the results"
[[ $ON =~ ^[1-9][0-9]*\ [^,]+$ ]] || fail "ON: found '$ON', expected a number and a name, such as '1 H100'"
dataset=$1 data=$2 folders=$3
shift 3
flags=("$@")
[[ " $BNS" =~ .*" --epochs "([0-9]+) ]] && epochs1=${BASH_REMATCH[1]} || epochs1=1000  # of stage 1
two=$(echo $SEEDS | cut -d' ' -f1-2)
case $dataset in  # own: the script's --num_samples
    cifar10) classes=10 own=500 numbers="100 200 1000" ;;
    cifar100) classes=100 own=50 numbers="10 20 100" ;;
    *) fail "found the data set '$dataset', expected cifar10 or cifar100" ;;
esac
for factor in $IF; do
    results=${folders//"{IF}"/$factor} variants="" chosen=""
    [[ $results/ =~ ${dataset}_if${factor}[^0-9.] ]] ||
        fail "found '$results', expected a name with ${dataset}_if$factor"
    dry=yes
    recipe
    for pattern in $RUNS; do
        [[ $chosen == *" $pattern "* ]] || fail "RUNS: found '$pattern', expected some of:$variants"
    done
    dry=""
    mkdir -p "$results" "$OUT/$results"
    recipe
    [ -z "$(find "$results" -name '*-seed*.txt')" ] || python benchmarks/plot_results.py "$results"
done
