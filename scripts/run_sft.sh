#!/bin/sh
# Supervised fine-tuning. Every argument is a Hydra override (or --key value): sh scripts/run_sft.sh model=gemma-2b datasets=[goqa] lr=1e-4
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh
exec .venv/bin/python -u train.py loss=sft "$@"
