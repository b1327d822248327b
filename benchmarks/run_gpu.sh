#!/usr/bin/env bash
# Everything that needs a GPU, in steps of less than 10 minutes each:
#
#     benchmarks/run_gpu.sh            all of it
#     benchmarks/run_gpu.sh bench      one of: check tests sanitize tune bench
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
unset TRITON_INTERPRET
failed=0

step() { # name, command: at most 9.5 minutes
    local name=$1
    shift
    if [ "$wanted" != all ] && [ "$wanted" != "$name" ]; then return; fi
    echo "== $name: $*"
    timeout 570 "$@" || { echo "== $name failed ($?)"; failed=1; }
}

wanted=${1:-all}
"$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || {
    echo "no GPU here: benchmarks/bench_kernels.py runs the ahead-of-time report instead"
    exec "$PYTHON" -m benchmarks.bench_kernels
}
step check "$PYTHON" -m benchmarks.check_gpu 400
step tests "$PYTHON" -m pytest -q tests/kernels
if command -v compute-sanitizer >/dev/null; then
    step sanitize compute-sanitizer --error-exitcode 1 "$PYTHON" -m benchmarks.check_gpu 12
fi
step tune "$PYTHON" -m qtk tune --minutes 8
step bench "$PYTHON" -m benchmarks.bench_kernels --minutes 8
if [ "$wanted" = all ]; then "$PYTHON" benchmarks/readme_tables.py; fi
exit $failed
