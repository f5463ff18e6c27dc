#!/bin/sh
# GR-IPO against IPO and importance weighting on the built-in data over ten seeds: the worst group's held-out loss and accuracy.
# Thirty runs of a 0.1 M-parameter model; a table and a figure. Arguments are Hydra overrides (run_root=, seed=0,1).
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh
root=runs
for word in "$@"; do
    case $word in run_root=*) root=${word#*=} ;; esac
done
sweep() {
    name=$1
    shift
    .venv/bin/python -u train.py -m seed=0,1,2,3,4,5,6,7,8,9 loss=ipo loss.beta=0.5 model=mini assert_sft_step=false \
        sep_pairs=true batch_size=32 n_epochs=6 lr=2e-3 lr_schedule=cosine eval_every=2000 n_eval_examples=null \
        eval_batch_size=256 wandb.enabled=false "exp_name=robust_opinions/$name" "$@"
}
sweep ipo weighting=uniform "$@"
sweep importance weighting=importance "$@"
sweep gr_ipo weighting=group_robust weighting.step_size=0.02 "$@"
.venv/bin/python -m commands.summarize "runs=$root/robust_opinions" "out=$root/robust_opinions/tables"
exec .venv/bin/python plot_scripts/make_figures.py figure=worst_group "runs=$root/robust_opinions" "out=$root/robust_opinions/figures"
