#!/bin/sh
# Trains weights like em-fib-v2: 15 minutes on two CPU cores where nothing else runs. Takes the path or URL of FIB-25
# sample 1 as OME-Zarr (janelia-flyem/neuroproof_examples, CC BY), the file to write, and a folder for checkpoints,
# from which a run that was cut off goes on. How em-fib-v1, which it starts from, was made is in its card. With sample 2 as
# a fourth argument, weights like em-fib-v3 come out: trained on on both volumes, another 10 minutes.
set -eu
[ -e "$2.plain" ] || ucray train "$1" "$2.plain" --init em-fib-v1 --keep-stream --train-steps 0 --student-steps 1 --learning-rate 1e-5
second=$2
[ $# -lt 4 ] || second=$2.second
[ -e "$second" ] || ucray train "$1" "$second" --init "$2.plain" --keep-stream --student-filter 16,2,160 --teacher-filter 16,6,160 \
  --train-steps 1100 --student-steps 450 --learning-rate 1e-3 --seed 4 --storage "$3"
[ $# -lt 4 ] || ucray train "$1" "$2" --also "$4" --init "$second" --train-steps 500 --student-steps 150 \
  --learning-rate 1.5e-3 --storage "$3"
