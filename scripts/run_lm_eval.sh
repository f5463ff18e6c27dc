#!/bin/sh
# lm-evaluation-harness on a run's model: sh scripts/run_lm_eval.sh RUN|DIRECTORY [--tasks mmlu,hellaswag] [its other arguments]
# The harness is not among the requirements: .venv/bin/python -m pip install "lm_eval[hf]"   (PYTHON=... uses another interpreter)
# BOS: it is put in front where the model's own tokenizer does so, as in training. Gemma is far off without it.
set -eu
. "$(dirname "$0")/usage.sh"
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
fail() {
    echo "error: $1" >&2
    exit 2
}
[ $# -gt 0 ] || fail "which model? sh scripts/run_lm_eval.sh RUN|DIRECTORY [--tasks a,b] [arguments of lm_eval]"
command -v "$python" >/dev/null || fail "$python: not there; run sh scripts/setup.sh, or set PYTHON"
model=$1
shift
for folder in "$model/merged" "$model/LATEST" "$model"; do
    [ -e "$folder/config.json" ] && break
done
if [ ! -e "$folder/config.json" ]; then
    for folder in "$model/LATEST" "$model"; do
        [ ! -e "$folder/adapter_config.json" ] ||
            fail "$folder: an adapter; a run with checkpoint.merge_lora=true writes the merged model beside it"
    done
    fail "$model: no run and no Hugging Face directory (no config.json in it, in merged/ or in LATEST/)"
fi
! grep -q SequenceClassification "$folder/config.json" || fail "$folder: a reward model; the harness scores language models"
"$python" -c 'import lm_eval' 2>/dev/null ||
    fail "lm-evaluation-harness is not installed; $python -m pip install \"lm_eval[hf]\""
bos=$("$python" -c '
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(tokenizer.bos_token_id is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id])
' "$folder") || fail "$folder: its tokenizer cannot be read"
tasks=hellaswag
case " $* " in *" --tasks"*) ;; *) set -- --tasks "$tasks" "$@" ;; esac
case " $* " in *" --output_path"*) ;; *) set -- --output_path "$model/lm_eval" "$@" ;; esac
echo "evaluating $folder (add_bos_token=$bos)" >&2
exec "$python" -m lm_eval --model hf --model_args "pretrained=$folder,add_bos_token=$bos" --batch_size auto "$@"
