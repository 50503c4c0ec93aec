#!/usr/bin/env bash
# Build, test, check and measure on a GPU. One command, from anywhere:
#
#   bash bench/gpu.sh [options] [section ...]
#
# Sections, in the order in which they run:
#   facts           machine, driver, compilers, packages that are missing
#   build           the extension with CUDA (DER_FAST_CUDA=ON); done anyway where it is not there yet
#   test            tests marked gpu
#   test-kernels    the kernels' other tests, which run on the GPU where there is one
#   agree           reference and fused backend train the same model, briefly
#   sanitize        compute-sanitizer: memcheck and racecheck over every kernel and one fused training step
#   bench-kernels   masked_bn, channel_masks, augment, compact
#   bench-conv      convolutions alone
#   tiles           the convolutions' default tiles against every candidate (OUT/tiles.jsonl)
#   bench-chain     a residual block as a chain
#   bench-bank      the frozen bank
#   bench-inference latency and throughput
#   bench-step      training steps at batch 128, DER steps at t = 1, 5, 10
#   bench-step-512  training steps at batch 512
#   bench-epoch     one epoch at t = 1, 5, 10
#   schedule        CIFAR-100 B0-10 on data of its shape, few epochs, extrapolated
#   schedule-full   the same with every epoch
#   cifar10         five steps of two classes, pruned and unpruned, fused and reference (needs --cifar10)
# Without sections: facts build test agree bench-kernels bench-bank bench-step. The table comes last in any case.
#
# Options:
#   --out FOLDER      where gpu.jsonl, log.txt and table.md go (default: bench/results/gpu-run); results are appended
#   --wheels FOLDER   wheels of missing packages; they are put beside Python's own for this run
#   --cifar10 PATH    CIFAR-10 as class folders with train/ and test/, or a tar of that
#   --limit SECONDS   for everything together (default 570); a section gets what is left, the table comes out in any case
#   --commit NAME     the commit's name, where this is a copy without its repository
#   --quick           fewer shapes and samples in the bench sections
#
# A section that fails or runs out of time does not stop the others; every section's exit status is listed at the end (124: out of time),
# and this script's own is 0 only if all were 0.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
out=bench/results/gpu-run
limit=570
wheels='' cifar10='' commit='' quick=''
sections=()
usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
while (($#)); do
    case $1 in
        --out | --wheels | --cifar10 | --limit | --commit)
            (($# > 1)) || { echo "$1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        --quick) quick=--quick ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "unknown option $1; --help lists them" >&2; exit 2 ;;
        *) sections+=("$1") ;;
    esac
    shift
done
((${#sections[@]})) || sections=(facts build test agree bench-kernels bench-bank bench-step)
known=' facts build test test-kernels agree sanitize bench-kernels bench-conv tiles bench-chain bench-bank bench-inference bench-step bench-step-512 bench-epoch schedule schedule-full cifar10 '
for name in "${sections[@]}"; do
    [[ $known == *" $name "* ]] || { echo "unknown section $name; --help lists them" >&2; exit 2; }
done

mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
results=$out/gpu.jsonl
log=$out/log.txt
started=$SECONDS
reserve=25
export PYTHONUNBUFFERED=1
naming=()
[[ -n $commit ]] && naming=(--commit "$commit")
statuses=()

left() { echo $((limit - reserve - (SECONDS - started))); }

# section NAME COMMAND...: run with what is left of the time, keep its output and its exit status.
section() {
    local name=$1 status begin=$SECONDS
    shift
    echo "== $name" | tee -a "$log"
    if (($(left) < 5)); then
        status=124
        echo "no time is left; give this section to another run" | tee -a "$log"
    else
        timeout --kill-after=10 "$(left)" "$@" 2>&1 | tee -a "$log"
        status=${PIPESTATUS[0]}
    fi
    statuses+=("$name: exit status $status, $((SECONDS - begin)) s")
    return "$status"
}

# One process per group: a kernel that breaks the GPU's context takes only its own group with it.
bench_groups() {
    local pattern=$1 status=0 group
    shift
    for group; do
        "$python" -m bench run ${pattern:+"$pattern"} --groups "$group" --device cuda --json "$results" $quick ${commit:+--commit "$commit"} || status=$?
    done
    return "$status"
}
# run_bench SECTION PATTERN GROUP...
run_bench() { section "$1" bash -c 'bench_groups "$@"' bench "${@:2}"; }

has_cuda_build() { "$python" -c 'from der_fast import native; raise SystemExit(not native.build_info()["cuda"])' 2>/dev/null; }

facts() {
    nvidia-smi 2>&1 || echo 'nvidia-smi is not here'
    nvcc --version 2>&1 | tail -2 || echo 'nvcc is not here'
    for tool in compute-sanitizer cmake ninja g++; do printf '%-18s %s\n' "$tool" "$(command -v "$tool" || echo 'not here')"; done
    "$python" --version
    "$python" - <<'EOF' || true
import torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version(), "GPU", torch.cuda.is_available())
EOF
    "$python" -m bench needed
}

build() { DER_FAST_CUDA=ON "$python" -m pip install --no-deps --no-build-isolation -e . && "$python" -m der_fast.cli.main doctor; }

sanitize() {
    local status=0 tool
    for tool in memcheck racecheck; do
        # Not its children: those are compilers.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes application-only --error-exitcode 3 \
            "$python" -m bench sanitize || status=$?
    done
    return "$status"
}

cifar10_runs() {
    local data=$1 images
    if [[ -f $data ]]; then
        images=$(mktemp -d)
        "$python" -m tarfile -e "$data" "$images" || return 1
        data=$(find "$images" -maxdepth 3 -type d -name train -printf '%h\n' | head -1)
    fi
    "$python" -m bench cifar10-gpu "$data" --device cuda --out "$out/cifar10-gpu.jsonl" "${@:2}"
}

if [[ -n $wheels ]]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || echo 'wheels: not installed'
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export -f facts build sanitize cifar10_runs bench_groups
export python out results quick commit

needs_build=yes
for name in "${sections[@]}"; do
    if [[ $needs_build == yes && $name != facts && $name != build ]]; then
        has_cuda_build || section build bash -c build
        needs_build=no
    fi
    case $name in
        facts) section facts bash -c facts ;;
        build) section build bash -c build; needs_build=no ;;
        test) section test "$python" -m pytest -m gpu -p no:cacheprovider tests ;;
        test-kernels) section test-kernels "$python" -m pytest -p no:cacheprovider tests/kernels tests/compaction tests/bench ;;
        agree) section agree "$python" -m bench agreement --device cuda ;;
        sanitize) section sanitize bash -c sanitize ;;
        bench-kernels) run_bench bench-kernels '' masked_bn channel_masks augment compact ;;
        bench-conv) run_bench bench-conv '' conv ;;
        tiles) section tiles "$python" -m bench tiles --device cuda --json "$out/tiles.jsonl" $quick "${naming[@]}" ;;
        bench-chain) run_bench bench-chain '' conv_chain ;;
        bench-bank) run_bench bench-bank '' bank ;;
        bench-inference) run_bench bench-inference '' inference ;;
        bench-step) run_bench bench-step 'step.*batch=128*' step ;;
        bench-step-512) run_bench bench-step-512 'step.*batch=512*' step ;;
        bench-epoch) run_bench bench-epoch '' epoch ;;
        schedule) section schedule "$python" -m bench schedule --device cuda --json "$results" "${naming[@]}" ;;
        schedule-full) section schedule-full "$python" -m bench schedule --device cuda --full --json "$results" "${naming[@]}" ;;
        cifar10)
            if [[ -n $cifar10 ]]; then
                section cifar10 bash -c 'cifar10_runs "$@"' cifar10 "$cifar10" "${naming[@]}"
            else
                statuses+=("cifar10: not run, --cifar10 is missing")
            fi
            ;;
    esac
done

if [[ -s $results ]]; then
    "$python" -m bench table "$results" > "$out/table.md" && { echo "== results in $results"; cat "$out/table.md"; }
fi
echo "== sections"
printf '%s\n' "${statuses[@]}" | tee -a "$log"
for line in "${statuses[@]}"; do [[ $line == *'exit status 0,'* ]] || exit 1; done
