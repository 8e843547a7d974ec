#!/bin/sh
# Trains weights like em-fib-v2: 15 minutes on two CPU cores where nothing else runs. Takes the path or URL of FIB-25
# sample 1 as OME-Zarr (janelia-flyem/neuroproof_examples, CC BY), the file to write, and a folder for checkpoints,
# from which a run that was cut off goes on. How em-fib-v1, which it starts from, was made is in its card.
set -eu
[ -e "$2.plain" ] || ucray train "$1" "$2.plain" --init em-fib-v1 --keep-stream --train-steps 0 --student-steps 1 --learning-rate 1e-5
ucray train "$1" "$2" --init "$2.plain" --keep-stream --student-filter 16,2,160 --teacher-filter 16,6,160 \
  --train-steps 1100 --student-steps 450 --learning-rate 1e-3 --seed 4 --storage "$3"
