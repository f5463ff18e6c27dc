#!/bin/sh
# Run train.py once per seed: sh scripts/seeds.sh [--seeds "0 1 2"] OVERRIDES...   (used by run_multi.sh and run_multi_robust.sh)
# Every other argument goes to train.py, as a Hydra override or as --key value. exp_name=NAME becomes NAME_seed<k>.
set -eu
cd "$(dirname "$0")/.."
seeds="0 1 2 3 4"
name=
n=$#
while [ "$n" -gt 0 ]; do
    word=$1
    shift
    n=$((n - 1))
    case $word in
    --seeds | --exp_name)
        [ "$n" -gt 0 ] || { echo "$word: a value is missing" >&2; exit 2; }
        value=$1
        shift
        n=$((n - 1))
        if [ "$word" = --seeds ]; then seeds=$value; else name=$value; fi
        ;;
    --seeds=* | seeds=*) seeds=${word#*=} ;;
    --exp_name=* | exp_name=*) name=${word#*=} ;;
    seed=* | --seed | --seed=*)
        echo "$word: this script loops over seeds; use --seeds \"0 1\", or train.py for one" >&2
        exit 2
        ;;
    *) set -- "$@" "$word" ;; # to the end of the list: after n words it holds what is left, in order
    esac
done
sh scripts/setup.sh
for seed in $(echo "$seeds" | tr ',' ' '); do
    echo "== seed $seed" >&2
    if [ -n "$name" ]; then
        .venv/bin/python -u train.py "$@" "seed=$seed" "exp_name=${name}_seed$seed"
    else
        .venv/bin/python -u train.py "$@" "seed=$seed"
    fi
done
