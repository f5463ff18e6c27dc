#!/bin/sh
# SFT on the five countries of the group-robust paper with its settings (Ramesh et al. 2024, Table 2): the start of run_multi.sh and
# run_multi_robust.sh. Other data: python train.py loss=sft datasets=[hh] ...
#   sh scripts/run_sft.sh [--seeds "0 1"] [OVERRIDES...]
set -eu
. "$(dirname "$0")/usage.sh"
exec sh "$(dirname "$0")/seeds.sh" --seeds 0 experiment=group_robust_goqa_sft "$@"
