#!/usr/bin/env bash
# ---- Slurm: what a site must look at. By hand these lines mean nothing; a flag of sbatch replaces the one here.
#SBATCH --job-name=pmlm
#SBATCH --nodes=1
#SBATCH --time=1-00:00:00          # at most the partition's limit; a job that is stopped by it is requeued and goes on
##SBATCH --partition=gpu           # yours, with one # less; so, too, --account and --qos
##SBATCH --gpus-per-node=8         # only where the site asks for it: whole nodes, as below, come with their GPUs
#SBATCH --exclusive                # whole nodes ...
#SBATCH --mem=0                    # ... and all of their memory
#SBATCH --signal=USR1@120          # 120 s before the limit the ranks are told to save; more, if a checkpoint takes longer
#SBATCH --requeue                  # after a node failed or another job went first
#SBATCH --open-mode=append         # a requeued job writes on in the same slurm-ID.out
# ----
#
# From text to a pre-trained PMLM, in one command. On this machine:
#
#   ./run_pretrain.sh                                         the sample corpus, a tiny model, two ranks
#   ./run_pretrain.sh --corpus my_texts/ --model small        your own text
#
# It sets up .venv, trains a tokenizer, builds the data set, trains, and says what came of it. Run again, it does only
# what is not done yet: an interrupted training is taken up from its newest whole checkpoint.
#
# On a cluster, from the repository's folder on a file system that all nodes share:
#
#   sbatch --nodes=8 run_pretrain.sh                          the paper's recipe on data/pretrain, a rank a GPU
#
# The first node sets up and builds; srun starts the training on all, without ssh. See docs/clusters.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ -e run_pretrain.py ] || cd "${SLURM_SUBMIT_DIR:-.}"  # Slurm runs a copy of this file elsewhere
[ -e run_pretrain.py ] || { echo "run_pretrain.sh: error: submit from the repository's folder: cd REPOSITORY && sbatch ..." >&2; exit 2; }

usage() {
    cat <<'USAGE'
usage: ./run_pretrain.sh [flags] [flags of run_pretrain.py]

  --corpus PATH...         text, JSON lines, Parquet, Arrow; files, folders (default: sample_corpus)
  --mixture YAML           several corpora, instead of --corpus; see docs/data.md
  --data DATA              a data set that is there already, instead of a corpus
  --document_per WHAT      file or blank_line: a document of a .txt file    (default: file)
  --text_field NAME        where JSON lines and tables keep the text        (default: text)
  --name NAME              data go to data/NAME, the run to runs/NAME       (default: the corpus's name)
  --run RUN                another folder for the run
  --vocab_size N           entries of the tokenizer                         (default: 4000)
  --max_length_tokens N    tokens of a sample                               (default: 128)
  --mask_sets N            mask sets drawn for each sample                  (default: 4)
  --ranks N                processes a host                                 (default: its GPUs, or 2 without any)
  --deepspeed_config PATH  batch, precision, steps, learning rate           (default: ds_configs/zero2_local.json)

In a Slurm job the defaults are --data data/pretrain, --deepspeed_config ds_configs/zero2.json and --model base, and in a job
array %a in a flag is the task's number.
Any other flag goes to run_pretrain.py; what it takes: .venv/bin/python run_pretrain.py --help
USAGE
}

[ -z "${SLURM_ARRAY_TASK_ID-}" ] || set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
in_job=no
[ -z "${SLURM_JOB_ID-}" ] || in_job=yes
corpus=() mixture="" data="" name="" run="" document_per=file text_field=text vocab_size=4000 max_length_tokens=128 mask_sets=4 ranks=""
deepspeed_config=ds_configs/zero2_local.json
[ $in_job = no ] || deepspeed_config=ds_configs/zero2.json
training_flags=() has_model=no
while [ $# -gt 0 ]; do
    flag=$1
    [[ $flag == --* ]] && flag=--$(printf %s "${1#--}" | tr - _)
    case $flag in
        -h | --help) usage; exit 0 ;;
        --corpus) shift; while [ $# -gt 0 ] && [[ $1 != --* ]]; do corpus+=("$1"); shift; done; continue ;;
        --mixture | --data | --name | --run | --document_per | --text_field | --vocab_size | --max_length_tokens | --mask_sets | --ranks | --deepspeed_config)
            [ $# -ge 2 ] || { echo "run_pretrain.sh: error: $1 needs a value" >&2; exit 2; }
            printf -v "${flag#--}" %s "$2"; shift 2; continue ;;
        --model | --model=*) has_model=yes ;;
    esac
    training_flags+=("$1"); shift
done
num_given=$(( (${#corpus[@]} > 0) + (${#mixture} > 0) + (${#data} > 0) ))
[ $num_given -le 1 ] || { echo "run_pretrain.sh: error: give one of --corpus, --mixture and --data" >&2; exit 2; }
if [ $num_given = 0 ]; then
    [ $in_job = no ] && corpus=(sample_corpus) || data=data/pretrain
fi
texts=(--corpus "${corpus[@]}") given=${corpus[0]:-$data}
[ -z "$mixture" ] || { texts=(--mixture "$mixture"); given=$mixture; }
[ -n "$name" ] || { name=$(basename "$given"); name=${name%.*}; }
if [ $has_model = no ]; then
    [ $in_job = no ] && training_flags+=(--model tiny) || training_flags+=(--model base)
fi

started=$SECONDS
./setup.sh
export PATH="$PWD/.venv/bin:$PATH"

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
[ -n "$ranks" ] || ranks=${SLURM_NTASKS_PER_NODE-}
[ -n "$ranks" ] || { [ "$gpus" -gt 0 ] && ranks=$gpus || ranks=2; }
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu

if [ -z "$data" ]; then
    data=data/$name
    reading=(--document_per "$document_per" --text_field "$text_field")
    tokenizer=data/$name-$vocab_size.model
    if [ ! -e "$tokenizer" ]; then
        python -m data_prep train-tokenizer "${texts[@]}" "${reading[@]}" \
            --tokenizer "$tokenizer" --vocab_size "$vocab_size"
    fi
    python -m data_prep build "${texts[@]}" "${reading[@]}" --tokenizer "$tokenizer" \
        --data "$data" --max_length_tokens "$max_length_tokens" --mask_sets "$mask_sets"
fi

run=${run:-runs/$name}
training=(run_pretrain.py --deepspeed_config "$deepspeed_config" --data "$data" --run "$run")
if [ $in_job = no ]; then
    # --quiet: the launcher's own messages; each rank's log is in RUN/logs.
    deepspeed --quiet --num_accelerators "$ranks" "${training[@]}" --validate_every_steps 100 --save_every_steps 100 \
        "${training_flags[@]}"
    echo "done in $((SECONDS - started)) s"
    exit
fi

newest_checkpoint() { compgen -G "$run/checkpoints/step*" | tail -n 1 || true; }

# The address by which Slurm itself reaches the first node; ranks and port follow from Slurm's variables (pretrain/launchers.py).
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol show node "$first_node" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
export MASTER_ADDR
before=$(newest_checkpoint) status=0
# --cpu-bind=none: a rank's threads may use all cores of the node, not only one.
srun --kill-on-bad-exit=1 --mpi=none --cpu-bind=none --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$ranks" \
    --ntasks=$((SLURM_JOB_NUM_NODES * ranks)) python "${training[@]}" "${training_flags[@]}" || status=$?

finished=0
python -m pretrain.status --run "$run" || finished=$?
if [ $finished != 3 ]; then
    echo "ended with status $status after $((SECONDS - started)) s"
    exit $status
fi
# Not finished. It goes on by itself if it was told to stop, or failed after it had got on; not after scancel, and not
# where it would fail in the same way for ever.
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format=%T || true)
if [ "$state" = RUNNING ] && { [ $status = 0 ] || [ "$(newest_checkpoint)" != "$before" ]; }; then
    echo "not finished: requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" && exit
    echo "run_pretrain.sh: error: this site does not let a job requeue itself: submit it again" >&2
fi
exit $((status ? status : 3))
