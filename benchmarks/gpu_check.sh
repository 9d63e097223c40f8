#!/usr/bin/env bash
# The first minutes on a GPU: does everything run there, how fast, and where does the time go? Ends in one table.
#
#     bash benchmarks/gpu_check.sh [FOLDER]                   DEVICE=cpu bash benchmarks/gpu_check.sh
#
# Call it at the root of the repository, with requirements.txt and tests/requirements.txt installed. It needs no data.
# FOLDER (output_dir/gpu_check-<time>) gets table.md, which is printed too, and of each part its output and figures,
# PART.log and PART.json. A part that fails is named in the table, and the others go on; the exit status is 1 then.
# Given the FOLDER of a check before, it does only what failed there or was left out. Variables, with their defaults:
: "${DEVICE:=cuda}"  # cpu: a small form without a GPU, to see that the check itself works; its figures say nothing
: "${MINUTES:=10}"   # no part goes on after these; those left out are named
: "${PARTS:=*}"      # patterns of the parts to do, such as 'rates stage1-1024-*'
set -fuo pipefail    # f: patterns of PARTS are not expanded to files; no e: parts may fail

parts() {
    local type dataset stage
    # Compiling takes minutes. Meanwhile run what is not timed to the millisecond.
    for type in bfloat16 float16; do
        { compile 1 $big $type; compile 2 $later $type; compile 1 $half $type; } &
    done
    part tests python -m pytest tests -m gpu -q --continue-on-collection-errors --junitxml="$out/tests.xml"
    for dataset in cifar10 cifar100; do
        for stage in pretrain_bns lineprob_bns finetune_ipdpp; do
            epoch ${dataset}_$stage $dataset
        done
    done
    wait

    part rates $measure rates "$out/rates.json" --device "$DEVICE"
    for type in bfloat16 float16; do
        steps 1 $big $type
        steps 2 $later $type
    done
    part plain-$big $measure plain "$out/plain-$big.json" --batch_size $big $blocks1
    for type in bfloat16 float16; do
        steps 1 $big $type --compile
        steps 2 $later $type --compile
    done
    for type in bfloat16 float16; do
        steps 1 $half $type
        steps 1 $half $type --compile
    done
}

steps() {  # steps STAGE BATCH TYPE [--compile]: time, memory and profile of its steps
    local name=stage$1-$2-$3${4:+-compile} blocks=blocks$1
    part "$name" $measure "stage$1" "$out/$name.json" --batch_size "$2" --amp "$3" ${4:-} ${!blocks} $small
}

compile() {  # compile STAGE BATCH TYPE: fill the compiler's caches for its steps
    local name=compile$1-$2-$3
    part "$name" $measure "stage$1" "$out/$name.json" --batch_size "$2" --amp "$3" --compile $once $small
}

epoch() {  # epoch SCRIPT DATASET: one on toy data, the later stages from the encoder of stage 1
    local extractor=$out/$2_pretrain_bns/pretrain_bns_$2_if100.pth
    [[ $1 != *pretrain* && -f $extractor ]] || extractor=""
    part "epoch-$1" python "main_$1.py" --toy_data --epochs 1 --device "$DEVICE" --overwrite --output_dir "$out/$1" \
        ${extractor:+--resume "$extractor"} $small
}

part() {  # part NAME COMMAND: PART.code gets its exit code ("-" where no time was left), seconds, and when it began
    local name=$1 began=$SECONDS left=$((MINUTES * 60 - SECONDS - 5)) code=0 pattern wanted=""
    shift
    for pattern in $PARTS; do
        [[ $name == $pattern ]] && wanted=yes
    done
    [ "$wanted" ] || return
    grep -qs "^0 " "$out/$name.code" && return
    rm -f "$out/$name.json"
    if [ $left -lt 10 ]; then
        code=-
    else
        printf '%d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$name"
        timeout --foreground -s KILL $((left < longest ? left : longest)) "$@" > "$out/$name.log" 2>&1 || code=$?
        [ "$code" = 0 ] || { echo "$name failed with code $code:"; tail -n 3 "$out/$name.log"; }
    fi
    echo "$code $((SECONDS - began)) $began" > "$out/$name.code"
}

fail() { echo "gpu_check.sh: $*" >&2; exit 2; }

[[ $# -le 1 && ${1-} != -* ]] || fail "found '$*', expected at most a folder; the variables DEVICE, MINUTES and PARTS do the rest"
[[ $MINUTES =~ ^[0-9]+$ ]] || fail "MINUTES: found '$MINUTES', expected a whole number"
out=${1:-output_dir/gpu_check-$(date +%Y%m%d-%H%M%S)}
longest=200  # seconds of a part
trap 'kill $(jobs -p) 2> /dev/null' EXIT  # after Ctrl-C: what runs in the background would not hear of it
once="--device $DEVICE --steps 1 --blocks 1"
measure="python benchmarks/gpu_check.py"
case $DEVICE in
    cuda)
        big=1024 half=512 later=64 small=""
        blocks1="--steps 30 --blocks 5" blocks2="--steps 64 --blocks 5" ;;  # stage 2 augments 16 batches at once
    cpu)
        big=16 half=8 later=4 small="--model test_resnet --input_size 16"
        blocks1=$once blocks2=$once
        export TORCH_COMPILE_DISABLE=1 ;;  # it would take ten minutes of one core
    *) fail "DEVICE: found '$DEVICE', expected cuda or cpu" ;;
esac
mkdir -p "$out" || exit 2
parts
[ -n "$(find "$out" -name '*.code')" ] || fail "PARTS: found '$PARTS', which matches no part, expected patterns such as 'rates stage1-*'"
{
    echo "gpu_check.sh at commit $(git describe --always --dirty 2> /dev/null || echo unknown), $SECONDS s"
    python benchmarks/gpu_table.py "$out"
} | tee "$out/table.md"
set +f
! grep -qv "^0 " "$out"/*.code
