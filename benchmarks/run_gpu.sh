#!/usr/bin/env bash
# Everything that needs a GPU, in steps of less than 10 minutes each:
#
#     benchmarks/run_gpu.sh             all of it
#     benchmarks/run_gpu.sh bench       one step: check tests sanitize tune bench packages attention
#                                       BERT-base ViT-B OPT-1.3b
#
# tune, bench and packages stop when their time is over and go on where they stopped: run them again.
# Results, with device, driver and versions, go to benchmarks/results/ and into the README's tables.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
unset TRITON_INTERPRET
wanted=${1:-all}
failed=0

step() { # name, command
    local name=$1
    shift
    if [ "$wanted" != all ] && [ "$wanted" != "$name" ]; then return; fi
    echo "== $name: $*"
    timeout -k 10 580 "$@" || { echo "== $name failed ($?)"; failed=1; }
}

check() { # every op beside the others: most of the time goes into compiling, on one core each
    local jobs=() status=0
    for op in shift_scale activation layer_norm hadamard W8A8 W4A8 W4A4 fp8 weight_only \
        attention; do
        "$PYTHON" -m tests.gpu.check "${1:-200}" --only "$op" --minutes 8 &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || status=1; done
    return $status
}
export -f check
export PYTHON

"$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || {
    echo "no GPU here: nothing is measured. What the compiler makes of the kernels instead:"
    exec "$PYTHON" -m benchmarks.speed.gpu_kernels
}
step check bash -c check
step tests "$PYTHON" -m pytest -q tests/kernels --ignore tests/kernels/test_random_shapes.py
if command -v compute-sanitizer >/dev/null; then
    # without the allocator's cache, or what lies behind a tensor is memory like any other
    step sanitize env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --error-exitcode 1 "$PYTHON" -m tests.gpu.check 2 --minutes 8
else
    echo "== sanitize: not run, there is no compute-sanitizer"
fi
step tune "$PYTHON" -m qtk tune --minutes 8
step bench "$PYTHON" -m benchmarks.speed.gpu_kernels --minutes 8
step packages "$PYTHON" -m benchmarks.speed.gpu_kernels --packages --minutes 7
step attention "$PYTHON" -m benchmarks.speed.gpu_attention --minutes 7
for model in BERT-base ViT-B OPT-1.3b; do
    step "$model" "$PYTHON" -m benchmarks.speed.gpu_models --model "$model" --minutes 7
done
"$PYTHON" benchmarks/readme_tables.py || failed=1
exit $failed
