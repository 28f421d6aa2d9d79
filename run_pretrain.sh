#!/usr/bin/env bash
# From text to a pre-trained PMLM on this machine, in one command:
#
#   ./run_pretrain.sh                                         the sample corpus, a tiny model, two ranks
#   ./run_pretrain.sh --corpus my_texts/ --model small        your own text
#
# It sets up .venv, trains a tokenizer, builds the data set, trains, and says what came of it. Run again, it does only
# what is not done yet: an interrupted training is taken up from its newest whole checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'USAGE'
usage: ./run_pretrain.sh [flags] [flags of run_pretrain.py]

  --corpus PATH...         text, JSON lines, Parquet, Arrow; files, folders (default: sample_corpus)
  --mixture YAML           several corpora, instead of --corpus; see docs/data.md
  --document_per WHAT      file or blank_line: a document of a .txt file    (default: file)
  --text_field NAME        where JSON lines and tables keep the text        (default: text)
  --name NAME              data go to data/NAME, the run to runs/NAME       (default: the corpus's name)
  --vocab_size N           entries of the tokenizer                         (default: 4000)
  --max_length_tokens N    tokens of a sample                               (default: 128)
  --mask_sets N            mask sets drawn for each sample                  (default: 4)
  --ranks N                processes                                        (default: the GPUs, or 2 without any)
  --deepspeed_config PATH  batch, precision, steps, learning rate           (default: ds_configs/zero2_local.json)

Any other flag goes to run_pretrain.py; what it takes: .venv/bin/python run_pretrain.py --help
USAGE
}

corpus=() mixture="" name="" document_per=file text_field=text vocab_size=4000 max_length_tokens=128 mask_sets=4 ranks=""
deepspeed_config=ds_configs/zero2_local.json
training_flags=() has_model=no
while [ $# -gt 0 ]; do
    flag=$1
    [[ $flag == --* ]] && flag=--$(printf %s "${1#--}" | tr - _)
    case $flag in
        -h | --help) usage; exit 0 ;;
        --corpus) shift; while [ $# -gt 0 ] && [[ $1 != --* ]]; do corpus+=("$1"); shift; done; continue ;;
        --mixture | --name | --document_per | --text_field | --vocab_size | --max_length_tokens | --mask_sets | --ranks | --deepspeed_config)
            [ $# -ge 2 ] || { echo "run_pretrain.sh: error: $1 needs a value" >&2; exit 2; }
            printf -v "${flag#--}" %s "$2"; shift 2; continue ;;
        --model | --model=*) has_model=yes ;;
    esac
    training_flags+=("$1"); shift
done
texts=(--corpus "${corpus[@]}") given=${corpus[0]-}
if [ -n "$mixture" ]; then
    [ ${#corpus[@]} -eq 0 ] || { echo "run_pretrain.sh: error: give --corpus or --mixture, not both" >&2; exit 2; }
    texts=(--mixture "$mixture") given=$mixture
elif [ ${#corpus[@]} -eq 0 ]; then
    texts=(--corpus sample_corpus) given=sample_corpus
fi
[ -n "$name" ] || { name=$(basename "$given"); name=${name%.*}; }
[ $has_model = yes ] || training_flags+=(--model tiny)

started=$SECONDS
./setup.sh
export PATH="$PWD/.venv/bin:$PATH"

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
[ -n "$ranks" ] || { [ "$gpus" -gt 0 ] && ranks=$gpus || ranks=2; }
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu

reading=(--document_per "$document_per" --text_field "$text_field")
tokenizer=data/$name-$vocab_size.model
if [ ! -e "$tokenizer" ]; then
    python -m data_prep train-tokenizer "${texts[@]}" "${reading[@]}" \
        --tokenizer "$tokenizer" --vocab_size "$vocab_size"
fi
python -m data_prep build "${texts[@]}" "${reading[@]}" --tokenizer "$tokenizer" \
    --data "data/$name" --max_length_tokens "$max_length_tokens" --mask_sets "$mask_sets"

# --quiet: the launcher's own messages; each rank's log is in runs/NAME/logs.
deepspeed --quiet --num_accelerators "$ranks" run_pretrain.py --deepspeed_config "$deepspeed_config" \
    --data "data/$name" --run "runs/$name" --validate_every_steps 100 --save_every_steps 100 "${training_flags[@]}"
echo "done in $((SECONDS - started)) s"
