#!/bin/sh
# Trains the weights that ship as em-fib-v1. Takes the path or URL of FIB-25 sample 1 as OME-Zarr
# (janelia-flyem/neuroproof_examples, CC BY), the file to write, and a folder for what lies between;
# about an hour of two CPU cores. The first run alone gives weights that serve every ratio.
set -eu
ucray train "$1" "$3/first.safetensors" --train-steps 2800 --student-steps 600 --seed 0
ucray train "$1" "$3/second.safetensors" --init "$3/first.safetensors" \
  --train-steps 6500 --student-steps 1000 --seed 1
ucray train "$1" "$2" --init "$3/second.safetensors" --train-steps 0 --student-steps 400 --seed 2
