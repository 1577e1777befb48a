#!/usr/bin/env bash
# The CPU kernel under sanitizers, with another compiler and for ARM, as far as these are installed:
#     tests/kernels/native_sanitizers.sh
# Takes some minutes, nearly all of them compiling. Debian: clang g++-aarch64-linux-gnu qemu-user.
set -e
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
source=$(dirname "$0")/native_driver.cpp

check() {  # name, how to run what comes out, compiler and its options
  echo "== $1"
  command -v "$3" >/dev/null || { echo "no $3: left out"; return; }
  "${@:3}" -std=c++17 -ffp-contract=fast -pthread "$source" -o "$folder/driver"
  $2 "$folder/driver"
}

check 'addresses and undefined behaviour' '' \
  g++ -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
check threads '' g++ -O1 -g -fsanitize=thread
check clang '' clang++ -O3
command -v qemu-aarch64 >/dev/null && check ARM qemu-aarch64 aarch64-linux-gnu-g++ -O3 -static
