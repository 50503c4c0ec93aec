# What the sections of gpu.sh do; sourced by it.

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

# sources: one number for everything that a wheel is made of.
sources() {
    find csrc kernels der_fast CMakeLists.txt setup.py pyproject.toml -type f ! -name '*.so' ! -name '*.pyc' ! -path '*.egg-info/*' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-16
}

wheel() {
    local to=${wheels:-bench/wheels} copy status
    copy=$(mktemp -d)
    mkdir -p "$to"
    rm -f "$to"/der_fast-*.whl "$to/sources"
    # From a copy: setuptools keeps a build/ folder whose old files would end up in the next wheel.
    cp -R csrc kernels der_fast CMakeLists.txt MANIFEST.in LICENSE README.md constraints.txt pyproject.toml setup.py "$copy"
    find "$copy" -name '*.so' -delete
    DER_FAST_CUDA=ON CUDAARCHS=$arch-real "$python" -m pip wheel --quiet --no-deps --wheel-dir "$to" "$copy" && sources > "$to/sources"
    status=$?
    rm -rf "$copy"
    # Pure Python, and seldom in a machine's image for PyTorch.
    "$python" -m pip download --quiet --no-deps --dest "$to" platformdirs tomli-w || echo 'platformdirs and tomli-w: not fetched'
    ls -l "$to"
    return "$status"
}

pytest=(-p no:cacheprovider)
# use_wheels: for this run, put carried wheels beside Python's own packages; the package's own wins over the folder der_fast/ here.
use_wheels() {
    [[ -n $wheels || ! -d bench/wheels ]] || wheels=bench/wheels
    [[ -n $wheels ]] || return 0
    local site own=''
    [[ -f $wheels/sources && $(< "$wheels/sources") == $(sources) ]] && own=yes
    [[ -n $own || ! -f $wheels/sources ]] || say "$wheels holds a wheel of other sources, which is not used: make it again with 'gpu.sh wheel'"
    site=${TMPDIR:-/tmp}/der_fast-site-$(cat "$wheels"/*.whl | sha256sum | cut -c 1-16)-$own
    if [[ ! -d $site ]]; then
        local chosen=()
        for file in "$wheels"/*.whl; do [[ -z $own && ${file##*/} == der_fast-* ]] || chosen+=("$file"); done
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site.new" "${chosen[@]}" && mv "$site.new" "$site" ||
            { say 'wheels: not installed'; rm -rf "$site.new"; return 0; }
    fi
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    if [[ -n $own ]]; then
        export PYTHONPATH=$PYTHONPATH:$PWD PYTHONSAFEPATH=1
        pytest+=(-o pythonpath=)
    fi
}

# is_built: whether the extension is here, with CUDA unless this is a rehearsal.
is_built() { "$python" -c "from der_fast import native; raise SystemExit(not (native.build_info()['cuda'] or '$device' == 'cpu'))" 2> /dev/null; }

# ready SECONDS: say what is used, and build it where nothing is.
ready() {
    local begin=$SECONDS
    if is_built; then
        statuses+=("ready: exit status 0, $((SECONDS - begin)) s")
        return 0
    fi
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -1 | tr -d '. ')
    # One architecture takes a third of the time of all.
    CUDAARCHS=${capability:-90}-real section build "$1" bash -c build
}

build() { DER_FAST_CUDA=ON "$python" -m pip install --no-deps --no-build-isolation -e . && "$python" -m der_fast.cli.main doctor; }

# A test's largest tensors would not fit beside those of the others; `test` runs them.
fit="not two_to_the_31 and not 32_bits and not two_gib"
families=(
    "replay tests/training/test_engine_gpu.py -k 'test_replays_do_what_launches_do and resnet18 and bf16 and not preact'"
    "feeds tests/training/test_engine_gpu.py -k 'classifier_stage or kept_features or handful'"
    "agreement tests/training/test_agreement.py"
    "masked_bn tests/kernels/test_masked_bn_gpu.py -k '$fit'"
    "conv tests/kernels/test_conv_gpu.py -k '$fit'"
    "bank tests/kernels/test_grouped_conv_gpu.py tests/compaction/bank/test_grouped.py tests/compaction/bank/test_graphs.py -k '$fit'"
    "augment tests/kernels/test_augment_backends.py tests/kernels/test_augment.py -k '$fit'"
    "channel_masks tests/kernels/test_channel_masks_gpu.py"
    "chain tests/model/test_fused_kernels.py"
    "compact tests/kernels/test_compact.py tests/compaction/test_pack.py"
    "capture tests/kernels/test_capture.py tests/kernels/test_choices.py"
)

# timing NAME: set `case` to what `python -m bench run` takes for a section.
timing() {
    case $1 in
        time-step) case=(step.train --groups step --without compile ours_fp32 $small) ;;
        time-bank) case=(bank.whole --groups bank $fewer) ;;
        time-masked-bn) case=("masked_bn.*batch=$big,residual=yes*" --groups masked_bn --without compile ours_fp16 ours_fp32 $small) ;;
        time-conv) case=(--groups conv --without compile ours_fp16 $fewer) ;;
        time-augment) case=(augment.batch --groups augment $fewer) ;;
        time-epoch)
            case=('epoch.train[t=1,*' 'epoch.train[t=10,*' --groups epoch --without eager_bf16 $small)
            [[ -z $small ]] || case[1]='*'
            ;;
        time-compile) case=('step.train[batch=128]' --groups step --variants compile ours $small); [[ -z $small ]] || case[0]=step.train ;;
    esac
}

# checks SECONDS: every family of tests at once. Beside them run the variants that are timed later, whose results are thrown away: what they
# compile is kept, and what `auto` measures beside so many others is not (XDG_CACHE_HOME).
checks() {
    local most begin=$SECONDS line name status said beside=() own=() names=() compiled=()
    most=$(within "$1")
    # On few cores the tests would take longer by more than is won.
    if (($(nproc) >= 8)) || [[ -n $rehearse ]]; then
        compiled=(time-step time-compile time-bank time-masked-bn time-conv time-epoch)
    fi
    say "== checks"
    ((most < 5)) && { statuses+=("checks: exit status 124, 0 s"); return; }
    for name in "${compiled[@]}"; do
        timing "$name"
        OMP_NUM_THREADS=2 XDG_CACHE_HOME=$scratch/cache-$name timeout --kill-after=5 "$most" "$python" -m bench run "${case[@]}" --device "$device" \
            > "$scratch/beside-$name.txt" 2>&1 &
        beside+=($!) names+=("beside-$name")
    done
    for line in "${families[@]}"; do
        eval "set -- $line"
        name=$1
        shift
        OMP_NUM_THREADS=2 timeout --kill-after=5 "$most" "$python" -m pytest "${pytest[@]}" -vv --tb=short -rfE --session-timeout=$((most - 10)) -m gpu "$@" \
            > "$scratch/$name.txt" 2>&1 &
        own+=($!) names+=("$name")
    done
    running=("${beside[@]}" "${own[@]}")
    local number
    for number in "${!names[@]}"; do
        # The tests first.
        local at=$(((number + ${#beside[@]}) % ${#names[@]}))
        wait "${running[at]}"
        status=$?
        name=${names[at]}
        said=$(tail -n 1 "$scratch/$name.txt")
        # Where time runs out pytest says that something failed.
        ((status == 1)) && grep -q 'session-timeout: ' "$scratch/$name.txt" && [[ $said != *failed* && $said != *error* ]] && status=124
        # Without a GPU all are skipped, which proves nothing.
        [[ $status$device == 0cuda && $name != beside-* && $said != *passed* ]] && status=5
        { echo "== checks: $name"; cat "$scratch/$name.txt"; } >> "$log"
        rm "$scratch/$name.txt"
        say "$name, $((SECONDS - begin)) s: exit status $status, $said"
        [[ $name == beside-* ]] || statuses+=("checks, $name: exit status $status, $((SECONDS - begin)) s")
    done
    running=()
}

# keep: copy what is given of CIFAR-100 to where a later call finds it.
keep() {
    mkdir -p "$store" || return 1
    if [[ -d $data ]]; then find "$data" -maxdepth 1 -name 'cifar100*' -exec cp -R -t "$store" {} +; else cp -t "$store" "$data"; fi && ls -l "$store"
}

paper() {
    local most little=()
    most=$(within "$1")
    # On the CPU a share of the images and a narrow network.
    [[ -z $rehearse ]] || little=(--per-class 20 --width 4 --epochs 2 --precision fp32)
    section paper "$most" "$python" -m bench paper "$store" --seconds $((most - 10)) --device "$device" --measured "$results" \
        --json "$out/paper.jsonl" "${little[@]}" "${naming[@]}"
}

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
    "$python" -m bench cifar10-gpu "$data" --device "$device" --out "$out/cifar10-gpu.jsonl" "${@:2}"
}

# One process per group: a kernel that breaks the GPU's context takes only its own group with it.
bench_groups() {
    local pattern=$1 status=0 group
    shift
    for group; do
        "$python" -m bench run ${pattern:+"$pattern"} --groups "$group" --device "$device" --json "$results" $quick ${commit:+--commit "$commit"} || status=$?
    done
    return "$status"
}
# run_bench SECTION SECONDS PATTERN GROUP...
run_bench() { section "$1" "$2" bash -c 'bench_groups "$@"' bench "${@:3}"; }
