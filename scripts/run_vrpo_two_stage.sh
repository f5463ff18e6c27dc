#!/bin/sh
# The first of VRPO's two stages: a variance-reduced Bradley-Terry reward model, for best-of-n or an online algorithm to use.
# Stages and words as in run_vrpo.sh, with loss=vrpo_reward:
#   sh scripts/run_vrpo_two_stage.sh model=tiny datasets=[opinions] data.opinions.distinct_pairs=false sample.num_pairs=4
set -eu
. "$(dirname "$0")/usage.sh"
exec sh "$(dirname "$0")/run_vrpo.sh" loss=vrpo_reward exp_name=vrpo_reward "$@"
