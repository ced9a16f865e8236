#!/usr/bin/env bash
# Runs everything that needs a GPU.  A failure does not stop the rest.  The last lines are a summary.
#
#   bench/gpu.sh DIR                       all sections, at most 65 minutes
#   bench/gpu.sh DIR parity recorded       only these sections, each below ten minutes
#
#   parity      every compiled kernel against float64; streams, threads and graph replays        parity.log
#   recorded    steps replayed from a recording, eager and compiled                              recorded.log
#   bench       the benchmarks, under nine minutes                                               bench.log, DEVICE-torch...csv
#   counters    each kernel of a compiled step: its time in a graph, and the bytes it reads from
#               and writes to device memory (ncu)                                                counters.log, .csv
#   device      misaligned slices, two GPUs where there are two, streams, threads, graphs,
#               10,000 steps without drift                                                       device.log
#   sanitizer   memcheck and racecheck of every kernel on small shapes (compute-sanitizer)       sanitizer.log
#   initcheck   initcheck and synccheck of the same                                              initcheck.log
#   first_call  the first step of a new process, with empty and with warm caches; the host's
#               time to start a step, its launches, the files it enters                          first_call.log
#
# Without a GPU every section is skipped.
# Logs and records appear in DIR as they are written.  DIR holds at most 11 files and 16 MB.  For a copy of the
# repository with another history or none, set BENCH_COMMIT to its commit.  BENCH_ARGS is passed to pytest bench/,
# such as "-k max_autotune" for what the time budget left out; its records are added to those in DIR.
set -u
usage="usage: bench/gpu.sh DIR [parity] [recorded] [bench] [counters] [device] [sanitizer] [initcheck] [first_call]"
out=${1:?$usage}
shift
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
cd "$(dirname "$0")/.." || exit
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET GGAM_FAST_BACKEND
# The profiler counts launches between replays of CUDA graphs.  torch.profiler warns of crashes there when CUPTI
# is torn down and set up again.
export TEARDOWN_CUPTI=0
python=$(command -v python3 || command -v python)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
all=(parity recorded bench counters device sanitizer initcheck first_call)
summary=()

# step SECTION LIMIT NAME COMMAND...: run COMMAND for at most LIMIT seconds, log it, note how it ended
step() {
    local section=$1 limit=$2 name=$3 began=$SECONDS status=0
    shift 3
    printf '\n== %s\n' "$name" | tee -a "$out/$section.log"
    local before
    before=$(wc -l <"$out/$section.log")
    timeout -k 10 "$limit" "$@" >>"$out/$section.log" 2>&1 || status=$?
    tail -n "+$((before + 1))" "$out/$section.log" | tail -n 40
    tail -c 1500000 "$out/$section.log" >"$scratch/log" && cp "$scratch/log" "$out/$section.log"
    local word=ok
    case $status in
        0) ;;
        3) [[ "$*" == *pytest* ]] && word="FAILED (3)" || word=MISSING ;; # a tool or a device is missing
        124 | 137) word="OUT OF TIME" ;;
        *) word="FAILED ($status)" ;;
    esac
    summary+=("$(printf '%-11s %-34s %-12s %4d s' "$section" "$name" "$word" $((SECONDS - began)))")
}

missing() { echo "$1 is not installed"; return 3; }
export -f missing

tests=("$python" -m pytest -q -p no:cacheprovider)
"$python" -c 'import xdist' 2>/dev/null && tests+=(-n 8)

parity() {
    step parity 160 kernels "${tests[@]}" tests/backends tests/kernels
    step parity 130 head "${tests[@]}" tests/head tests/test_{autograd,step,scale,interop}.py tests/classifier
    step parity 100 "marked gpu" "${tests[@]}" -m gpu tests/bench tests/kernels tests/backends tests/test_*.py
    step parity 60 "the measuring itself" "${tests[@]}" tests/bench/measure tests/bench/suite tests/bench/tools/test_{tune,kernel_times}.py
    step parity 120 compile "${tests[@]}" tests/test_compile.py
}

recorded() {
    step recorded 140 eager "${tests[@]}" tests/test_recorded.py
    step recorded 140 compiled "${tests[@]}" tests/test_compiled.py
}

bench() {
    local extra
    eval "extra=(${BENCH_ARGS:-})"
    [ -n "${BENCH_ARGS:-}" ] || rm -f "$out"/*-torch*.csv
    step bench 560 suite "$python" -m pytest -q -p no:cacheprovider bench/ --results "$out" "${extra[@]}"
}

counters() {
    step counters 120 "times in a graph" "$python" -m bench.kernel_times
    step counters 430 "bytes by ncu" "$python" -m bench.counters "$out/counters.csv" --limit 100
}

device() {
    step device 300 "slices, two GPUs, drift" "${tests[@]}" -rs tests/test_device.py
    step device 200 "streams, threads, graphs" "$python" -m pytest -q -p no:cacheprovider tests/bench/test_streams.py
}

# sanitize SECTION TOOL...
sanitize() {
    local section=$1 tool
    shift
    # Compiles the kernels first, because that takes long under a tool: memcheck of whole steps took over 130 s.
    step "$section" 150 "without a tool" "$python" -m bench.every_kernel
    for tool in "$@"; do
        if command -v compute-sanitizer >/dev/null; then
            # With torch's caching allocator, accesses past the end of a tensor would go unseen.
            step "$section" 205 "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m bench.every_kernel
        else
            step "$section" 10 "$tool" bash -c 'missing compute-sanitizer'
        fi
    done
}

sanitizer() { sanitize sanitizer memcheck racecheck; }
initcheck() { sanitize initcheck initcheck synccheck; }

first_call() {
    step first_call 110 eager "$python" -m bench.first_call
    step first_call 190 compiled "$python" -m bench.first_call --compile
    step first_call 110 "compiled, its graphs cached" env TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD=1 \
        "$python" -m bench.first_call --compile
    step first_call 120 host "$python" -m bench.host --compile
    step first_call 50 crossings "$python" -m bench.crossings
}

sections=("$@")
[ $# -gt 0 ] || sections=("${all[@]}")
gpu=$("$python" -c 'import torch; print(torch.cuda.is_available())')
for section in "${sections[@]}"; do
    case " ${all[*]} " in
        *" $section "*) [ "$gpu" = True ] || { summary+=("$(printf '%-11s skipped: no GPU' "$section")"); continue; } ;;&
        *" $section "*) rm -f "$out/$section".{log,csv} && "$section" ;;
        *) summary+=("$(printf '%-11s no such section; %s' "$section" "$usage")") ;;
    esac
done

{
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv,noheader 2>/dev/null ||
        echo "no GPU (nvidia-smi is missing or failed)"
    "$python" -c 'import sys, torch, triton
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)'
    printf '%s\n' "${summary[@]}"
    du -sh "$out" | cut -f1
} 2>&1 | tee -a "$out/summary.txt"
