#!/bin/sh
# VRPO from labelled pairs to an evaluated policy, one stage after the other:
#   sft        on both responses of every pair: the reference policy, which VRPO presumes wrote them
#   sample     auxiliary responses of the reference policy (sample.num_pairs=M)
#   annotate   preferences for all pairs, by 2-fold cross-fitted reward models unless annotate.* says otherwise
#   train      loss=vrpo (run_vrpo_two_stage.sh: loss=vrpo_reward), evaluated at its end
#   sh scripts/run_vrpo.sh model=tiny datasets=[opinions] data.opinions.distinct_pairs=false sample.num_pairs=4 loss.lam=auto
#   sh scripts/run_vrpo.sh model=pythia28 datasets=[hh] data.hh.path=FILE exp_name=hh sft:lr=1e-5 annotate:lr=1e-5 train:lr=5e-7
# Every word is key=value and goes to all stages; STAGE:key=value to that stage alone; loss, weighting, stopping and fresh_pairs
# to train; sample.* and annotate.* to theirs. Results are in run_root/exp_name (runs/vrpo) and its neighbours exp_name_sft,
# exp_name_sampled and exp_name_annotated. The same command continues where it was stopped.
set -eu
. "$(dirname "$0")/usage.sh"
cd "$(dirname "$0")/.."
name=vrpo root=runs loss=vrpo beta=loss.beta=0.1 scorer=annotate.cross_fit=2
for word in "$@"; do
    case $word in
    -*) echo "$word: write key=value" >&2; exit 2 ;;
    exp_name=*) name=${word#*=} ;;
    run_root=*) root=${word#*=} ;;
    loss=*) loss=${word#*=} ;;
    loss.beta=* | train:loss.beta=*) beta= ;;
    annotate.model=* | annotate.cross_fit=* | annotate.scorer=function | annotate.scorer=judge) scorer= ;;
    esac
done
[ "$loss" = vrpo ] || beta=
sft=$root/${name}_sft sampled=$root/${name}_sampled annotated=$root/${name}_annotated

# stage NAME PROGRAM [FIXED WORDS...] -- "$@": run the program with the words that are for this stage, the user's last
stage() {
    stage=$1
    shift
    echo "== $stage" >&2
    left=$#
    fixed=yes
    while [ "$left" -gt 0 ]; do
        word=$1
        shift
        left=$((left - 1))
        if [ "$word" = -- ]; then
            fixed=no
            continue
        fi
        if [ $fixed = no ]; then
            case $word in
            "$stage":*) word=${word#*:} ;;
            sft:* | sample:* | annotate:* | train:* | exp_name=*) continue ;;
            loss=* | loss.* | weighting* | stopping* | fresh_pairs*) [ "$stage" = train ] || continue ;;
            sample.*) [ "$stage" = sample ] || continue ;;
            annotate.*) [ "$stage" = annotate ] || continue ;;
            data.bos=* | data.tokenize=* | data.on_bad_row=* | data.max_bad_fraction=*) ;;
            datasets=* | data.*) [ "$stage" = sft ] || [ "$stage" = sample ] || continue ;;
            esac
        fi
        [ -z "$word" ] || set -- "$@" "$word" # to the end of the list: at last it holds what is kept, in order
    done
    .venv/bin/python -u "$@"
}

sh scripts/setup.sh
stage sft train.py truncation=keep_end loss=sft loss.sft_on=all "exp_name=${name}_sft" -- "$@"
stage sample -m commands.sample truncation=keep_end "model.archive=$sft/LATEST" "sample.out=$sampled" -- "$@"
stage annotate -m commands.annotate truncation=keep_end "model.archive=$sft/LATEST" \
    "annotate.data=$sampled" "annotate.out=$annotated" $scorer -- "$@"
validation=
[ ! -f "$annotated/validation.jsonl" ] || validation=data.local.validation_path=$annotated/validation.jsonl
stage train train.py truncation=keep_end "loss=$loss" $beta "model.archive=$sft/LATEST" "exp_name=$name" "datasets=[local]" \
    "data.local.path=$annotated/train.jsonl" "data.local.test_path=$annotated/test.jsonl" "$validation" -- "$@"
