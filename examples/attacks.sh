#!/usr/bin/env bash
# Try every attack on a defence that the attacks were published for, a Nasty Teacher, trained on digits.
#
#   examples/attacks.sh OUTPUT_FOLDER
#
# The report's table is examples/results/attacks.md: attacks made for nasty teachers must recover at least what the
# labels give, and plain distillation must suffer, or the defence is none.
set -euo pipefail
out=$1
mkdir -p "$out"
common="--data digits --transfer-size 128 --test-size 500"
# shellcheck disable=SC2086
{
    [ -e "$out/teacher.safetensors" ] || sdbctl train --arch cnn $common --epochs 40 --batch-size 64 \
        -o "$out/teacher.safetensors"
    [ -e "$out/k.bin" ] || sdbctl keygen "$out/k.bin"
    [ -e "$out/nasty.safetensors" ] || sdbctl box "$out/teacher.safetensors" --key-file "$out/k.bin" $common \
        --objective nasty --set omega="${OMEGA:-0.04}" --epochs 100 --batch-size 64 -o "$out/nasty.safetensors"
    sdbctl eval "$out/nasty.safetensors" --original "$out/teacher.safetensors" --key-file "$out/k.bin" $common \
        --attack --suite full --student cnn-tiny --epochs 120 --batch-size 32 --report "$out/report" --force
}
