#!/bin/sh
# Methods compared over seeds: a multirun on the built-in data, a table with paired differences, a figure. Without arguments, IPO and
# GR-IPO over three seeds with a 0.1 M-parameter model. Arguments are Hydra overrides; experiment= and seed= say what is compared:
#   sh scripts/compare.sh [experiment=A,B] [seed=0,1,2,3,4] [exp_name=NAME] [run_root=DIR] ...
set -eu
. "$(dirname "$0")/usage.sh"
cd "$(dirname "$0")/.."
sh scripts/setup.sh
root=runs name=compare
for word in "$@"; do
    case $word in
    run_root=*) root=${word#*=} ;;
    exp_name=*) name=${word#*=} ;;
    esac
done
.venv/bin/python -u train.py -m experiment=group_robust_opinions_ipo,group_robust_opinions_gr_ipo seed=0,1,2 exp_name="$name" "$@"
.venv/bin/python -m commands.summarize "runs=$root/$name" "out=$root/$name/tables"
exec .venv/bin/python plot_scripts/make_figures.py figure=worst_group "runs=$root/$name" "out=$root/$name/figures"
