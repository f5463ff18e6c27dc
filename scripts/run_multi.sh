#!/bin/sh
# IPO on the five countries of the group-robust paper with its settings (Ramesh et al. 2024, Table 2), over seeds.
#   sh scripts/run_multi.sh --model.archive runs/SFT/LATEST [--seeds "0 1"] [OVERRIDES...]
set -eu
exec sh "$(dirname "$0")/seeds.sh" \
    model=gemma-2b "datasets=[goqa]" \
    "data.goqa.countries=[Nigeria,Egypt,'India (Current national sample)',China,Japan]" \
    loss=ipo loss.beta=0.01 trainer=GroupTrainerEarlyStop stopping.scheduler_metric=loss stopping.patience_factor=2 \
    stopping.min_lr=1e-8 batch_size=16 gradient_accumulation_steps=2 eval_batch_size=8 n_epochs=30 eval_every=960 \
    n_eval_examples=null lr=3e-5 optimizer=AdamW weight_decay=0.01 warmup_steps=0 "$@"
