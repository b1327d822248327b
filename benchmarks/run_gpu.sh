#!/usr/bin/env bash
# Everything that needs a GPU, in calls of at most 9 minutes:  benchmarks/run_gpu.sh call1
# `benchmarks/run_gpu.sh --help` lists calls and steps; kernels/README.md says what they are for.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
exec "${PYTHON:-python3}" -m benchmarks.speed.gpu_run "$@"
