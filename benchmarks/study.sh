#!/usr/bin/env bash
# The study of docs/results.md, from packages to tables, in one command: hours on two cores. Started again, it goes on.
# Of it alone a small model that is worth fine-tuning: benchmarks/study.sh --only ae_par-0 --tasks --jobs 1
#
#   benchmarks/study.sh [flags of python -m benchmarks.study]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"
needed=$(python -m benchmarks.study --list_corpora "$@")
update=()
[ "$(id -u)" = 0 ] && update=(--update)
# shellcheck disable=SC2086  # names, a word each
python -m benchmarks.corpora --output data/corpora "${update[@]}" $needed
python -m benchmarks.study --corpora data/corpora --output runs/study "$@"
