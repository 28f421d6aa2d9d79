#!/usr/bin/env bash
# The study of docs/results.md, from packages to tables, in one command: hours on two cores. Started again, it goes on.
#
#   benchmarks/study.sh [flags of python -m benchmarks.study]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"
python -m benchmarks.corpora --output data/corpora
python -m benchmarks.study --corpora data/corpora --output runs/study "$@"
