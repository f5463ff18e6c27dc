#!/bin/sh
# The images of docs/: real runs on the built-in data (about ten minutes on two CPU cores), then figures of them.
#   sh scripts/doc_images.sh [FOLDER OF RUNS]        runs that are there already are not made again
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh
python=${PYTHON:-.venv/bin/python}
runs=${1:-runs}
"$python" train.py run_root="$runs" model=tiny loss=sft loss.sft_on=all sep_pairs=true lr=3e-4 n_epochs=null n_examples=4000 \
    eval_every=2000 eval_batch_size=256 exp_name=doc_images/sft
"$python" train.py -m run_root="$runs" model.archive="$runs/doc_images/sft/LATEST" exp_name=doc_images/two seed=0,1 \
    experiment=group_robust_opinions_ipo,group_robust_opinions_gr_ipo
mkdir -p docs/img
made=$(mktemp -d)
for figure in training_curves worst_group; do
    "$python" plot_scripts/make_figures.py figure=$figure runs="$runs/doc_images/two" out="$made"
    cp "$made/$figure.png" "docs/img/$figure.png"
done
rm -r "$made"
ls -l docs/img
