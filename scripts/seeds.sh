#!/bin/sh
# Run train.py once per seed: sh scripts/seeds.sh [--seeds "0 1 2"] OVERRIDES...   (for the experiments group_robust_goqa_*)
# exp_name=NAME becomes NAME_seed<k>. The flags of the group-robust repository's scripts are understood, with space or "=":
#   --datasets a,b  --step_sizes x,y (one run each)  --nseeds 4 (seeds 0 to 4)  --loss_beta  --train_frac  --use_kfoldsplit (fold = seed) ...
# Every other argument goes to train.py, as a Hydra override or as --key value.
set -eu
. "$(dirname "$0")/usage.sh"
cd "$(dirname "$0")/.."
seeds="0 1 2 3 4" name= datasets=goqa fraction= folds= sizes=
fail() {
    echo "error: $1" >&2
    exit 2
}
n=$#
while [ "$n" -gt 0 ]; do
    word=$1 key=$1
    shift
    n=$((n - 1))
    case $word in
    --*=*) key=${word%%=*} value=${word#*=} ;;
    --seeds | --seed | --nseeds | --exp_name | --datasets | --step_size | --step_sizes | --divide_by_totalcount | --loss_beta | --label_smoothing | \
        --adaptive_step_size | --step_factor | --train_frac | --use_kfoldsplit | --eval_train_every)
        [ "$n" -gt 0 ] || fail "$word: a value is missing"
        value=$1
        shift
        n=$((n - 1))
        ;;
    esac
    case $key in
    --seeds) seeds=$(echo "$value" | tr ',' ' ') ;;
    seeds=*) seeds=$(echo "${word#*=}" | tr ',' ' ') ;;
    --nseeds)
        case $value in '' | *[!0-9]*) fail "--nseeds $value: must be a number, of the last seed: 4 is seeds 0 to 4" ;; esac
        seeds= k=0
        while [ "$k" -le "$value" ]; do seeds="$seeds $k" k=$((k + 1)); done
        ;;
    --exp_name) name=$value ;;
    exp_name=*) name=${word#*=} ;;
    seed=* | --seed) fail "$word: this script loops over seeds; use --seeds \"0 1\", or train.py for one" ;;
    --datasets | datasets=*)
        [ "$key" = --datasets ] || value=${word#*=}
        value=${value#[} datasets=${value%]}
        set -- "$@" "datasets=[$datasets]"
        ;;
    --step_size | --step_sizes) sizes=$(echo "$value" | tr ',' ' ') ;;
    --divide_by_totalcount | --adaptive_step_size | --step_factor | --label_smoothing) set -- "$@" "loss.${key#--}=$value" ;;
    --loss_beta) set -- "$@" "loss.beta=$value" ;;
    --train_frac) fraction=$value ;;
    --use_kfoldsplit) case $value in [Tt]rue | 1) folds=yes ;; *) folds= ;; esac ;;
    --eval_train_every)
        echo "$word $value: training rows are evaluated with the others, every eval_every" >&2
        set -- "$@" eval_train_data=true
        ;;
    *) set -- "$@" "$word" ;; # to the end of the list: after n words it holds what is left, in order
    esac
done
[ -n "$(echo $seeds)" ] || fail "--seeds: no seed is named, e.g. --seeds \"0 1\""
for seed in $seeds; do
    case $seed in *[!0-9]*) fail "--seeds $seed: must be whole numbers, e.g. --seeds \"0 1\"" ;; esac
done
[ -z "$fraction" ] || for data in $(echo "$datasets" | tr ',' ' '); do set -- "$@" "data.$data.train_frac=$fraction"; done
sh scripts/setup.sh
run() {
    echo "== seed $seed${size:+, step size $size}" >&2
    set -- "$@" "seed=$seed" ${size:+"loss.step_size=$size"}
    [ -z "$folds" ] || for data in $(echo "$datasets" | tr ',' ' '); do set -- "$@" "data.$data.kfold=$seed"; done
    [ -z "$name" ] || set -- "$@" "exp_name=${name}${mark}_seed$seed"
    .venv/bin/python -u train.py "$@"
}
case $sizes in *" "*) [ -n "$name" ] || fail "several --step_sizes: name the runs with --exp_name NAME" ;; esac
for size in ${sizes:-""}; do
    case $sizes in *" "*) mark=_step$size ;; *) mark= ;; esac
    for seed in $seeds; do run "$@"; done
done
