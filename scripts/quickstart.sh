#!/bin/sh
# Set up .venv, then SFT and preference training on built-in data with a built-in model: a table and a figure in minutes on two CPU
# cores. Arguments are Hydra overrides for both trainings.
set -eu
. "$(dirname "$0")/usage.sh"
cd "$(dirname "$0")/.."
sh scripts/setup.sh
exec .venv/bin/python -m commands.quickstart "$@"
