#!/bin/sh
# Builds the fuzz test of the page pool under AddressSanitizer with UndefinedBehaviorSanitizer and under
# ThreadSanitizer, and runs it. Usage: sanitize.sh [BUILD_DIRECTORY]; CXX chooses the compiler.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$root/build/sanitize}
cxx=${CXX:-g++}
mkdir -p "$build"

compile() { # NAME SANITIZERS
    echo "building $1"
    "$cxx" -std=c++17 -O1 -g -Wall -Wextra -Wshadow -Werror -D_GLIBCXX_ASSERTIONS -fno-omit-frame-pointer \
        -fsanitize="$2" -fno-sanitize-recover=all -I"$root/csrc" -pthread -o "$build/$1" \
        "$root/tests/csrc/fuzz_page_pool.cpp" "$root/csrc/page_pool.cpp" "$root/csrc/run_store.cpp" \
        "$root/csrc/copy_log.cpp" "$root/csrc/free_space.cpp"
}

# ThreadSanitizer of older compilers cannot work with the address randomisation of newer kernels.
fixed_addresses=""
if setarch "$(uname -m)" -R true 2>/dev/null; then fixed_addresses="setarch $(uname -m) -R"; fi

compile fuzz_address address,undefined &
address_build=$!
compile fuzz_thread thread
wait $address_build
for seed in 1 2 3; do
    echo "address, undefined: alone, seed $seed"
    "$build/fuzz_address" alone 120000 $seed
done
echo "address, undefined: together"
"$build/fuzz_address" together 120000 1
for seed in 1 2; do
    echo "thread: together, seed $seed"
    $fixed_addresses "$build/fuzz_thread" together 120000 $seed
done
