#!/bin/sh
# GR-IPO against IPO and importance weighting on the built-in data over ten seeds: the worst group's held-out loss and accuracy.
# Thirty runs of a 0.1 M-parameter model; a table and a figure. Arguments are Hydra overrides (run_root=, seed=0,1).
set -eu
exec sh "$(dirname "$0")/compare.sh" exp_name=robust_opinions seed=0,1,2,3,4,5,6,7,8,9 wandb.enabled=false \
    experiment=group_robust_opinions_ipo,group_robust_opinions_is,group_robust_opinions_gr_ipo "$@"
