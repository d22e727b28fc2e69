#!/usr/bin/env bash
# The FOEM authors' table (arXiv 2507.11017: Qwen3, W4, groups of 128), measured here and printed beside the published values.
#
#     eval/reproduce_foem_table.sh
#
# Needs an NVIDIA GPU and access to the Hugging Face hub (models, C4, wikitext). Word perplexity of lm-eval's `wikitext`. For GPTQ
# with --act-order group, as in the authors' comparison. Models that exist below OUT are not quantized again, results that exist
# are not measured again. Options, as environment variables:
#
#   MODELS       "Qwen/Qwen3-0.6B Qwen/Qwen3-8B"    hub names or folders
#   METHODS      "gptq gptaq foem foem+gptaq"
#   OUT          out/foem-table                     checkpoints, logs, results
#   CALIBRATION  allenai/c4                         data set or file;  SAMPLES 256  SEQ_LEN 2048
#   TASK         wikitext                           lm-eval task;  CONTEXT 2048;  BACKEND vllm or hf;  LIMIT documents (all)
#   FOEM         .venv/bin/foem of this checkout, else the `foem` on PATH
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MODELS=${MODELS:-Qwen/Qwen3-0.6B Qwen/Qwen3-8B}
METHODS=${METHODS:-gptq gptaq foem foem+gptaq}
OUT=${OUT:-out/foem-table}
CALIBRATION=${CALIBRATION:-allenai/c4}
SAMPLES=${SAMPLES:-256}
SEQ_LEN=${SEQ_LEN:-2048}
TASK=${TASK:-wikitext}
CONTEXT=${CONTEXT:-2048}
BACKEND=${BACKEND:-vllm}
LIMIT=${LIMIT:-}
if [ -z "${FOEM:-}" ]; then
    FOEM=$root/.venv/bin/foem
    [ -x "$FOEM" ] || FOEM=foem
fi
PYTHON=$(dirname "$(command -v "$FOEM" || echo /)")/python
[ -x "$PYTHON" ] || PYTHON=python3
command -v "$FOEM" >/dev/null || { echo "no foem at $FOEM: run make setup, or set FOEM" >&2; exit 1; }

published() {  # word perplexity of $1 (model) quantized by $2 (method), from the paper's table
    case "${1##*/} $2" in
        "Qwen3-0.6B gptq") echo 30.0372 ;;  "Qwen3-0.6B gptaq") echo 30.5776 ;;
        "Qwen3-0.6B foem") echo 29.6199 ;;  "Qwen3-0.6B foem+gptaq") echo 29.3823 ;;
        "Qwen3-8B gptq") echo 12.5488 ;;    "Qwen3-8B gptaq") echo 12.7152 ;;
        "Qwen3-8B foem") echo 12.5128 ;;    "Qwen3-8B foem+gptaq") echo 12.6172 ;;
        *) echo - ;;
    esac
}

perplexity() {  # word perplexity in the table that `foem eval` printed into file $1; nothing when there is none
    "$PYTHON" - "$1" <<'PYTHON_END'
import re, sys
column = None
for line in open(sys.argv[1], encoding="utf-8"):
    cells = [cell.strip() for cell in re.split("[│┃]", line)]
    names = [i for i, cell in enumerate(cells) if cell.startswith("word_perplexity")]
    column = names[0] if names else column
    if column and len(cells) > column and re.fullmatch(r"[0-9]+\.[0-9]+", cells[column]):
        print(cells[column])
PYTHON_END
}

evaluate() {  # word perplexity of $1, a folder or hub name; $2: file for the table of `foem eval`
    if [ ! -f "$2" ] || [ -z "$(perplexity "$2")" ]; then
        echo "== foem eval $1" >&2
        "$FOEM" eval "$1" --tasks "$TASK" --max-model-len "$CONTEXT" --backend "$BACKEND" ${LIMIT:+--limit "$LIMIT"} \
            > "$2" || return
    fi
    perplexity "$2" | grep . || { echo "$2 holds no word_perplexity; choose another TASK" >&2; return 1; }
}

# What exists below OUT is of the settings that it was made with.
mkdir -p "$OUT"
settings="SAMPLES=$SAMPLES SEQ_LEN=$SEQ_LEN CALIBRATION=$CALIBRATION TASK=$TASK CONTEXT=$CONTEXT BACKEND=$BACKEND LIMIT=$LIMIT"
if [ -f "$OUT/settings.txt" ] && [ "$(cat "$OUT/settings.txt")" != "$settings" ]; then
    echo "$OUT was made with $(cat "$OUT/settings.txt"), now $settings: choose another OUT" >&2
    exit 1
fi
echo "$settings" > "$OUT/settings.txt"
rows=()
for model in $MODELS; do
    name=${model##*/}
    value=$(evaluate "$model" "$OUT/$name.eval.txt")
    rows+=("$name|original|$value|-")
    for method in $METHODS; do
        folder=$OUT/$name-$method
        order=none
        [ "$method" != gptq ] || order=group
        if [ ! -d "$folder" ]; then
            echo "== foem quantize $model, $method" >&2
            "$FOEM" quantize "$model" "$folder" --method "$method" --bits 4 --group-size 128 --act-order "$order" \
                --calibration "$CALIBRATION" --samples "$SAMPLES" --seq-len "$SEQ_LEN" --seed 0 --quiet
        fi
        value=$(evaluate "$folder" "$folder.eval.txt")
        rows+=("$name|$method|$value|$(published "$model" "$method")")
    done
done

{
    echo "$TASK word perplexity, W4 g128, $SAMPLES x $SEQ_LEN tokens of $CALIBRATION, context $CONTEXT${LIMIT:+, $LIMIT documents}"
    printf '%-20s %-12s %12s %12s\n' model method measured published
    for row in "${rows[@]}"; do
        IFS='|' read -r name method measured paper <<< "$row"
        printf '%-20s %-12s %12s %12s\n' "$name" "$method" "$measured" "$paper"
    done
} | tee "$OUT/table.txt"
