#!/usr/bin/env bash
# Everything a GPU is needed for, in one call: parity of the compiled kernels, then the timings.
#   bench/gpu.sh DIR      leaves logs and pytest-benchmark JSON in DIR; no failure stops the rest
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh DIR}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
run() {
    local name=$1
    shift
    if "$@" >"$out/$name.log" 2>&1; then echo "ok      $name"; else echo "FAILED  $name ($?)"; fi
    tail -n 3 "$out/$name.log"
}
run device nvidia-smi
run ops timeout 200 python3 -m pytest -q tests/test_ops.py
run head timeout 200 python3 -m pytest -q tests/test_head.py tests/test_contractions.py tests/test_compile.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        run "$tool" timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            python3 -m pytest -q tests/test_ops.py -k "sliced or tile"
    done
fi
run bench timeout 540 python3 -m pytest -q bench/ --benchmark-json="$out/benchmark.json"
