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

fail() { echo "run_pretrain.sh: error: $1" >&2; exit 2; }
[ -e run_pretrain.py ] || fail "submit from the repository's folder: cd REPOSITORY && sbatch ..."

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
  --model SIZE             tiny, small, base or large                       (default: tiny)
  --ranks N                processes a host                                 (default: its visible GPUs, or 2 without any)
  --master_port N          where the ranks meet                             (default: a free port)
  --deepspeed_config PATH  batch, precision, steps, learning rate           (default: ds_configs/zero2_local.json)

In a Slurm job the defaults are --data data/pretrain, --deepspeed_config ds_configs/zero2.json and --model base, and in a job
array %a in a flag is the task's number.
Any other flag goes to run_pretrain.py, which checks them before the data are made: .venv/bin/python run_pretrain.py --help
USAGE
}

[ -z "${SLURM_ARRAY_TASK_ID-}" ] || set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
in_job=no
[ -z "${SLURM_JOB_ID-}" ] || in_job=yes
corpus=() mixture="" data="" name="" run="" document_per=file text_field=text vocab_size=4000 max_length_tokens=128 mask_sets=4
ranks="" master_port="" deepspeed_config=ds_configs/zero2_local.json model=tiny
[ $in_job = no ] || { deepspeed_config=ds_configs/zero2.json model=base; }
training_flags=() making_flags=()
while [ $# -gt 0 ]; do
    word=$1
    shift
    [[ $word != -h && $word != --help ]] || { usage; exit 0; }
    [[ $word == --?* ]] || fail "$word belongs to no flag; your text is given by --corpus PATH (--help: all flags)"
    flag=${word%%=*}
    flag=${flag#--}
    flag=${flag//-/_}
    values=()
    if [[ $word == *=* ]]; then
        values=("${word#*=}")
    elif [ "$flag" = corpus ]; then
        while [ $# -gt 0 ] && [[ $1 != --* ]]; do values+=("$1"); shift; done
    elif [ $# -gt 0 ] && [[ $1 != --* ]]; then
        values=("$1")
        shift
    fi
    case $flag in
        corpus | mixture | data | name | run | document_per | text_field | vocab_size | max_length_tokens | mask_sets | ranks | master_port | deepspeed_config | model)
            [ -n "${values[0]-}" ] || fail "--$flag needs a value" ;;
    esac
    case $flag in
        corpus) corpus+=("${values[@]}") ;;
        document_per | text_field | vocab_size | max_length_tokens | mask_sets) making_flags+=("--$flag"); printf -v "$flag" %s "${values[0]}" ;;
        mixture | data | name | run | ranks | master_port | deepspeed_config | model) printf -v "$flag" %s "${values[0]}" ;;
        *) training_flags+=("$word"); [[ $word == *=* ]] || training_flags+=(${values[@]+"${values[@]}"}) ;;
    esac
done

num_given=$(( (${#corpus[@]} > 0) + (${#mixture} > 0) + (${#data} > 0) ))
[ $num_given -le 1 ] || fail "give one of --corpus, --mixture and --data"
if [ $num_given = 0 ]; then
    [ $in_job = no ] && corpus=(sample_corpus) || data=data/pretrain
fi
for path in ${corpus[@]+"${corpus[@]}"}; do
    [[ $path == *://* ]] || [ -e "$path" ] || fail "--corpus: $path: no such file or folder"
done
[ -z "$mixture" ] || [ -f "$mixture" ] || fail "--mixture: $mixture: no such file"
if [ -n "$data" ]; then
    [ ${#making_flags[@]} = 0 ] || fail "${making_flags[*]}: for making a data set of a text, and $data is one; give --corpus, or leave them out"
    [ -f "$data/manifest.json" ] || fail "$data: no data set there; --corpus makes one of a text, and so does: python -m data_prep build"
fi
[ -f "$deepspeed_config" ] || fail "--deepspeed_config: $deepspeed_config: no such file; ds_configs/ has some"
[[ $document_per =~ ^(file|blank_line)$ ]] || fail "--document_per is $document_per, expected file or blank_line"
for flag in vocab_size max_length_tokens mask_sets ${ranks:+ranks} ${master_port:+master_port}; do
    [[ ${!flag} =~ ^[1-9][0-9]{0,8}$ ]] || fail "--$flag is ${!flag}, expected a whole number of at least 1"
done
[ -z "$master_port" ] || [ "$master_port" -lt 65536 ] || fail "--master_port is $master_port, expected at most 65535"
texts=(--corpus ${corpus[@]+"${corpus[@]}"}) given=${corpus[0]:-$data}
[ -z "$mixture" ] || { texts=(--mixture "$mixture"); given=$mixture; }
[ -n "$name" ] || { name=$(basename "$given"); name=${name%.*}; }

started=$SECONDS
./setup.sh
export PATH="$PWD/.venv/bin:$PATH"

ranks=${ranks:-${SLURM_NTASKS_PER_NODE-}}
ranks_and_accelerator=$(python -m pretrain.local_ranks --count ${ranks:+--ranks "$ranks"} ${master_port:+--master_port "$master_port"})
read -r ranks accelerator <<<"$ranks_and_accelerator"
[ "$accelerator" = cuda ] || export DS_ACCELERATOR=cpu

make_data=no
[ -n "$data" ] || { make_data=yes; data=data/$name; }
run=${run:-runs/$name}
training=(run_pretrain.py --deepspeed_config "$deepspeed_config" --data "$data" --run "$run" --model "$model")
[ $in_job = yes ] || training+=(--validate_every_steps 100 --save_every_steps 100)
training+=(${training_flags[@]+"${training_flags[@]}"})
checking=(--check_for_ranks $((${SLURM_JOB_NUM_NODES:-1} * ranks)))
[ $make_data = no ] || checking+=(--check_for_tokens "$max_length_tokens")
python "${training[@]}" "${checking[@]}"

if [ $make_data = yes ]; then
    reading=(--document_per "$document_per" --text_field "$text_field")
    tokenizer=data/$name-$vocab_size.model
    if [ ! -e "$tokenizer" ]; then
        python -m data_prep train-tokenizer "${texts[@]}" "${reading[@]}" \
            --tokenizer "$tokenizer" --vocab_size "$vocab_size"
    fi
    python -m data_prep build "${texts[@]}" "${reading[@]}" --tokenizer "$tokenizer" \
        --data "$data" --max_length_tokens "$max_length_tokens" --mask_sets "$mask_sets"
fi

if [ $in_job = no ]; then
    python -m pretrain.local_ranks --ranks "$ranks" ${master_port:+--master_port "$master_port"} "${training[@]}"
    echo "done in $((SECONDS - started)) s"
    exit
fi

newest_checkpoint() { compgen -G "$run/checkpoints/step*" | tail -n 1 || true; }

# The address by which Slurm itself reaches the first node; ranks and port follow from Slurm's variables (pretrain/launchers.py).
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol show node "$first_node" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
export MASTER_ADDR ${master_port:+MASTER_PORT="$master_port"}
before=$(newest_checkpoint) status=0
# --cpu-bind=none: a rank's threads may use all cores of the node, not only one.
srun --kill-on-bad-exit=1 --mpi=none --cpu-bind=none --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$ranks" \
    --ntasks=$((SLURM_JOB_NUM_NODES * ranks)) python "${training[@]}" || status=$?

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
