#!/bin/sh
# IPO on the five countries of the group-robust paper with its settings (config/experiment/group_robust_goqa_ipo.yaml), over seeds.
#   sh scripts/run_multi.sh --model.archive runs/SFT/LATEST [--seeds "0 1"] [OVERRIDES...]
set -eu
. "$(dirname "$0")/usage.sh"
exec sh "$(dirname "$0")/seeds.sh" experiment=group_robust_goqa_ipo "$@"
