#!/bin/sh
# Builds the tests of the C++ code under AddressSanitizer with UndefinedBehaviorSanitizer and under
# ThreadSanitizer, and runs them. Usage: sanitize.sh [BUILD_DIRECTORY]; CXX chooses the compiler.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$root/build/sanitize}
cxx=${CXX:-g++}
mkdir -p "$build"

admission="fuzz_admission.cpp admission.cpp"
pool="fuzz_page_pool.cpp page_pool.cpp page_pool_books.cpp page_pool_residency.cpp admission.cpp residency.cpp
    spill_space.cpp run_store.cpp copy_log.cpp free_space.cpp"
span="run_span.cpp span.cpp span_block.cpp attention_plan.cpp packed_linear.cpp layer_team.cpp layer_experts.cpp tiers.cpp
    amx_check.cpp thread_team.cpp weight_storage.cpp"
kernels=kernels_baseline.cpp

# A tier that this processor cannot run is only linked, for instrumenting each takes a good part of a minute.
processor=$("$cxx" -march=native -dM -E -x c++ /dev/null)
for tier in avx2:__AVX2__ avx512:__AVX512F__ avx512vnni:__AVX512VNNI__ avx512bf16:__AVX512BF16__ amx:__AVX512BF16__; do
    source=kernels_${tier%:*}.cpp
    case $processor in
    *" ${tier#*:} "*) kernels="$kernels $source" ;;
    *)
        object=$build/${source%.cpp}.o
        (cd "$root/csrc" && "$cxx" -std=c++17 -O0 -Wno-psabi -I. -c -o "$object" "$source")
        kernels="$kernels $object"
        ;;
    esac
done

# The sources go to the compiler as one: they share most of what they include and instantiate. Tiers each are their own.
compile() { # NAME SANITIZERS OPTIMISATION SOURCES [KERNELS...]
    name=$1 sanitizers=$2 optimisation=$3
    # shellcheck disable=SC2086 # a list of files
    printf '#include "%s"\n' $4 >"$build/$name.cpp"
    shift 4
    echo "building $name"
    (cd "$root/csrc" && "$cxx" -std=c++17 "$optimisation" -g1 -Wall -Wextra -Wshadow -Werror -D_GLIBCXX_ASSERTIONS -fno-omit-frame-pointer \
        -Wno-psabi -fsanitize="$sanitizers" -fno-sanitize=null,object-size -fno-sanitize-recover=all -I. -I"$root/tests/csrc" -pthread \
        -o "$build/$name" "$build/$name.cpp" "$@")
}

# ThreadSanitizer of older compilers cannot work with the address randomisation of newer kernels.
fixed_addresses=""
if setarch "$(uname -m)" -R true 2>/dev/null; then fixed_addresses="setarch $(uname -m) -R"; fi

# Most of the time goes into compiling: lines of code are all that a report needs, and only ThreadSanitizer's runs
# are long enough to be worth optimising. Null pointers and ends of objects are seen by the address sanitizer, too; to
# look for them twice takes a quarter longer. Bounds depend on tier, format and shape at once, how threads share on less.
# shellcheck disable=SC2086 # lists of files
{
    { compile fuzz_address address,undefined -Og "$pool"; compile admission_address address,undefined -Og "$admission"
        compile span_address address,undefined -Og "$span" $kernels; } &
    address_builds=$!
    compile fuzz_thread thread -O1 "$pool"
    compile span_thread thread -O1 "$span" $kernels
    wait $address_builds
}
echo "address, undefined: steps of blocks"
"$build/span_address" all
echo "thread: steps of blocks"
$fixed_addresses "$build/span_thread" pairs
for seed in 1 2 3; do
    echo "address, undefined: admission, seed $seed"
    "$build/admission_address" 100000 $seed
    echo "address, undefined: alone, seed $seed"
    "$build/fuzz_address" alone 120000 $seed
    echo "address, undefined: alone with a disk, seed $seed"
    "$build/fuzz_address" alone 30000 $seed $((600 * seed))
done
echo "address, undefined: together"
"$build/fuzz_address" together 120000 1
"$build/fuzz_address" together 30000 1 1500
for seed in 1 2; do
    echo "thread: together, seed $seed"
    $fixed_addresses "$build/fuzz_thread" together 120000 $seed
    echo "thread: together with a disk, seed $seed"
    $fixed_addresses "$build/fuzz_thread" together 20000 $seed 1500
done
