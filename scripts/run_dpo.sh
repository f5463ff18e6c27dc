#!/bin/sh
# DPO from an SFT run: sh scripts/run_dpo.sh model=pythia28 datasets=[hh] model.archive=runs/NAME/LATEST loss.beta=0.1
set -eu
. "$(dirname "$0")/usage.sh"
cd "$(dirname "$0")/.."
sh scripts/setup.sh
exec .venv/bin/python -u train.py loss=dpo loss.beta=0.1 "$@"
