#!/usr/bin/env bash
# Build, test, check and measure on a GPU. One command, from anywhere:
#
#   bash bench/gpu.sh [options] [section ...]
#
# Two lines for a machine that is lent for a quarter of an hour:
#   first           facts ready checks time-step time-bank time-masked-bn time-conv time-augment time-epoch time-compile: at most 7 minutes
#   second [DATA]   ready paper: the paper's benchmark on CIFAR-100 as strips in the folder DATA, at most 6 minutes
# and before them, on a machine with nvcc but no GPU, with the other machine's Python as PYTHON:
#   wheel           the package with CUDA code for that GPU (--arch), and small packages that are often missing, into the folder of --wheels
#
# Sections, in the order in which they run; NAME=SECONDS gives one a limit of its own:
#   facts           machine, driver, compilers, packages that are missing
#   keep            copy CIFAR-100's strips from --data to --store, where a later call finds them beside its own
#   ready           the carried wheel, or the extension built here for this GPU; done anyway where nothing is there yet
#   build           the extension with CUDA (DER_FAST_CUDA=ON), for every GPU that is supported
#   checks          side by side, a process each: GPU tests of every kernel, one replayed graph, fifty batches of both backends; meanwhile
#                   the variants that are timed later are compiled. Nothing is timed
#   time-step       training steps at batch 128 and 512 against eager PyTorch
#   time-bank       the frozen bank at t = 10
#   time-masked-bn  masked_bn at batch 512
#   time-conv       convolutions at batch 128
#   time-augment    augmentation
#   time-epoch      an epoch at t = 1 and t = 10
#   time-compile    the training step at batch 128 against torch.compile
#   paper           CIFAR-100 B0-10 within the section's limit, beside the paper's curve; needs --data, or what keep has kept
#   test            tests marked gpu
#   test-kernels    the kernels' other tests, which run on the GPU where there is one
#   agree           reference and fused backend train the same model, briefly
#   sanitize        compute-sanitizer: memcheck and racecheck over every kernel and fused training steps, without CUDA graphs
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
# Without sections: first.
#
# Options:
#   --out FOLDER      where gpu.jsonl, paper.jsonl, log.txt and table.md go (default: bench/results/gpu-run); results are appended
#   --wheels FOLDER   wheels to put beside Python's own packages for this run (default: bench/wheels, where it is)
#   --arch NUMBER     compute capability for which `wheel` builds (default: 90)
#   --data FOLDER     CIFAR-100 as strips (docs/data.md): cifar100_strips_*.tar, or one of them, or unpacked
#   --store FOLDER    where they are kept between calls (default: der_fast-data in the folder for temporary files)
#   --cifar10 PATH    CIFAR-10 as class folders with train/ and test/, or a tar of that
#   --limit SECONDS   for everything together (default: 415 for first, 350 for second, else 570); a section gets what is left at most
#   --commit NAME     the commit's name, where this is a copy without its repository
#   --quick           fewer shapes and samples in the bench sections
#   --rehearse        the same commands on the CPU with tiny shapes, to see that they run; what is measured so says nothing
#
# A section that fails or runs out of time does not stop the others; every section's exit status is listed at the end (124: out of time),
# and this script's own is 0 only if all were 0. Every result is written as it ends, and the tables come last whatever happened.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
out=bench/results/gpu-run
limit='' wheels='' arch=90 data='' store=${TMPDIR:-/tmp}/der_fast-data cifar10='' commit='' quick='' rehearse=''
first='facts=20 ready=150 checks=100 time-step=60 time-bank=30 time-masked-bn=45 time-conv=40 time-augment=20 time-epoch=45 time-compile=60'
second='ready=150 paper'
known=' first second wheel facts keep ready build checks time-step time-bank time-masked-bn time-conv time-augment time-epoch time-compile paper test test-kernels agree sanitize bench-kernels bench-conv tiles bench-chain bench-bank bench-inference bench-step bench-step-512 bench-epoch schedule schedule-full cifar10 '
sections=()
usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
is_section() { [[ $known == *" ${1%%=*} "* && $1 =~ ^[a-z0-9-]+(=[0-9]+)?$ ]]; }
while (($#)); do
    case $1 in
        --out | --wheels | --arch | --data | --store | --cifar10 | --limit | --commit)
            (($# > 1)) || { echo "$1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        --quick) quick=--quick ;;
        --rehearse) rehearse=yes ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "unknown option $1; --help lists them" >&2; exit 2 ;;
        first) read -ra words <<< "$first"; sections+=("${words[@]}"); limit=${limit:-415} ;;
        second)
            read -ra words <<< "$second"
            sections+=("${words[@]}")
            limit=${limit:-350}
            if (($# > 1)) && [[ $2 != -* ]] && ! is_section "$2"; then data=$2; shift; fi
            ;;
        *) is_section "$1" || { echo "unknown section $1; --help lists them" >&2; exit 2; }; sections+=("$1") ;;
    esac
    shift
done
if ((${#sections[@]} == 0)); then read -ra sections <<< "$first"; limit=${limit:-415}; fi
limit=${limit:-570}
if [[ -n $wheels && ! -d $wheels && " ${sections[*]} " != *' wheel '* ]]; then echo "--wheels: there is no folder $wheels" >&2; exit 2; fi
if [[ -n $data ]]; then
    [[ -e $data ]] || { echo "--data: there is no $data" >&2; exit 2; }
    sections=(keep "${sections[@]}")
fi

mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
results=$out/gpu.jsonl
log=$out/log.txt
started=$SECONDS
# For the tables.
reserve=15
scratch=$(mktemp -d)
mkfifo "$scratch/pipe"
export PYTHONUNBUFFERED=1
# Tiles are tried for as long as one section can spare; a run of one's own tries them for a minute.
export DER_FAST_TILE_SECONDS=${DER_FAST_TILE_SECONDS:-10}
naming=()
[[ -n $commit ]] && naming=(--commit "$commit")
device=cuda small='' fewer=--quick big=512
if [[ -n $rehearse ]]; then device=cpu small=--smoke fewer=--smoke quick=--smoke big='*'; fi
statuses=()
running=()
# shellcheck source=bench/gpu_sections.sh
source bench/gpu_sections.sh

left() { echo $((limit - reserve - (SECONDS - started))); }
say() { echo "$*" | tee -a "$log"; }

# within SECONDS: these, or what is left where that is less.
within() { local all; all=$(left); echo $(($1 > 0 && $1 < all ? $1 : all)); }

# section NAME SECONDS COMMAND...: run for at most SECONDS (0: what is left of all), keep its output and its exit status.
section() {
    local name=$1 most status begin=$SECONDS writer
    most=$(within "$2")
    shift 2
    say "== $name"
    if ((most < 5)); then
        status=124
        say "no time is left; give this section to another run"
    else
        tee -a "$log" < "$scratch/pipe" & writer=$!
        # In the background, so that a signal to this script is heard at once and the tables come out.
        timeout --kill-after=10 "$most" "$@" > "$scratch/pipe" 2>&1 & running=($!)
        wait "${running[0]}"
        status=$?
        running=()
        # Something that a section left running may hold the pipe open.
        timeout 5 tail --pid="$writer" -f /dev/null
    fi
    statuses+=("$name: exit status $status, $((SECONDS - begin)) s")
    return "$status"
}

report() {
    trap - EXIT INT TERM
    ((${#running[@]})) && kill "${running[@]}" 2> /dev/null
    local file
    for file in "$scratch"/*.txt; do [[ -f $file ]] && { echo "== ${file##*/}, not ended"; cat "$file"; } >> "$log"; done
    if [[ -s $results ]]; then
        timeout 60 "$python" -m bench table "$results" > "$out/table.md" && { echo "== results in $results"; cat "$out/table.md"; }
    fi
    [[ -s $out/paper.jsonl ]] && { echo "== the paper's benchmark, in $out/paper.jsonl"; timeout 60 "$python" -m bench paper --table "$out/paper.jsonl"; }
    rm -rf "$scratch"
    say "== sections"
    ((${#statuses[@]})) && printf '%s\n' "${statuses[@]}" | tee -a "$log"
    say "$((SECONDS - started)) s"
    for line in "${statuses[@]}"; do [[ $line == *'exit status 0,'* ]] || exit 1; done
    exit "${1:-0}"
}
trap 'report 0' EXIT
trap 'say stopped; report 1' INT TERM

export -f facts keep build wheel sanitize cifar10_runs bench_groups sources
export python out results quick commit device scratch data store wheels arch small

[[ " ${sections[*]} " == *' wheel '* ]] || use_wheels
is_ready=''
for word in "${sections[@]}"; do
    name=${word%%=*} most=0
    [[ $word == *=* ]] && most=${word#*=}
    case $name in
        facts | keep | ready | build | wheel) ;;
        *) if [[ -z $is_ready ]]; then ready 0; is_ready=yes; fi ;;
    esac
    case $name in
        facts | keep | build | wheel) section "$name" "$most" bash -c "$name" ;;
        ready) ready "$most"; is_ready=yes ;;
        checks) checks "$most" ;;
        time-*) timing "$name"; section "$name" "$most" "$python" -m bench run "${case[@]}" --device "$device" --json "$results" "${naming[@]}" ;;
        paper) paper "$most" ;;
        test) section test "$most" "$python" -m pytest "${pytest[@]}" -m gpu tests ;;
        test-kernels) section test-kernels "$most" "$python" -m pytest "${pytest[@]}" tests/kernels tests/compaction tests/bench ;;
        agree) section agree "$most" "$python" -m bench agreement --device "$device" ;;
        sanitize) section sanitize "$most" bash -c sanitize ;;
        bench-kernels) run_bench bench-kernels "$most" '' masked_bn channel_masks augment compact ;;
        bench-conv) run_bench bench-conv "$most" '' conv ;;
        tiles) section tiles "$most" "$python" -m bench tiles --device "$device" --json "$out/tiles.jsonl" $quick "${naming[@]}" ;;
        bench-chain) run_bench bench-chain "$most" '' conv_chain ;;
        bench-bank) run_bench bench-bank "$most" '' bank ;;
        bench-inference) run_bench bench-inference "$most" '' inference ;;
        bench-step) run_bench bench-step "$most" 'step.*batch=128*' step ;;
        bench-step-512) run_bench bench-step-512 "$most" 'step.*batch=512*' step ;;
        bench-epoch) run_bench bench-epoch "$most" '' epoch ;;
        schedule) section schedule "$most" "$python" -m bench schedule --device "$device" --json "$results" "${naming[@]}" ;;
        schedule-full) section schedule-full "$most" "$python" -m bench schedule --device "$device" --full --json "$results" "${naming[@]}" ;;
        cifar10)
            if [[ -n $cifar10 ]]; then
                section cifar10 "$most" bash -c 'cifar10_runs "$@"' cifar10 "$cifar10" "${naming[@]}"
            else
                statuses+=("cifar10: not run, --cifar10 is missing")
            fi
            ;;
    esac
done
