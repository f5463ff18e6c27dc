#!/bin/sh
# GR-IPO against IPO and importance sampling on the built-in data over ten seeds: the worst group's held-out loss and accuracy.
# Thirty runs of a 0.1 M-parameter model; a table and a figure. The first word may be
#   shown    the prompt tells the group (the default): one policy can serve all five groups
#   hidden   it does not: what the policy gives to one of four groups it takes from another; the exact optima are printed beside the runs
# Other arguments are Hydra overrides (run_root=, seed=0,1).
set -eu
. "$(dirname "$0")/usage.sh"
cd "$(dirname "$0")/.."
name=robust_opinions hidden=
case ${1:-} in
shown) shift ;;
hidden)
    shift
    name=robust_opinions_hidden
    hidden="data.opinions.group_in_prompt=false data.opinions.group_sizes=[0.6,0.25,0.1,0.05]"
    set -- $hidden data.opinions.num_train=8000 data.opinions.num_validation=0 data.opinions.num_test=4000 n_epochs=3 \
        eval_every=4000 "$@"
    ;;
esac
sh scripts/compare.sh "exp_name=$name" seed=0,1,2,3,4,5,6,7,8,9 wandb.enabled=false \
    experiment=group_robust_opinions_ipo,group_robust_opinions_is,group_robust_opinions_gr_ipo "$@"
[ -n "$hidden" ] || exit 0
root=runs
for word in "$@"; do
    case $word in run_root=*) root=${word#*=} ;; esac
done
exec .venv/bin/python -m commands.tradeoff loss=ipo loss.beta=0.5 $hidden "tradeoff.runs=$root/$name"
