#!/bin/sh
# Trains weights like em-fib-v8: 80 minutes on two CPU cores where nothing else runs. Takes the path or URL of FIB-25
# sample 1 as OME-Zarr (janelia-flyem/neuroproof_examples, CC BY), the file to write, and a folder for checkpoints,
# from which a run that was cut off goes on. How em-fib-v1, which it starts from, was made is in its card. With sample 2 as
# a fourth argument, weights like em-fib-v9 come out: they learn from both volumes.
set -eu
[ -e "$2.plain" ] || ucray train "$1" "$2.plain" --init em-fib-v1 --keep-stream --train-steps 0 --student-steps 1 --learning-rate 1e-5
# em-fib-v2
[ -e "$2.filtered" ] || ucray train "$1" "$2.filtered" --init "$2.plain" --keep-stream --student-filter 16,2,160 \
  --teacher-filter 16,6,160 --train-steps 1100 --student-steps 450 --learning-rate 1e-3 --seed 4 --storage "$3"
if [ $# -lt 4 ]; then
  [ -e "$2.taught" ] || ucray train "$1" "$2.taught" --init "$2.filtered" --keep-stream --train-steps 0 --student-steps 6000 \
    --learning-rate 1e-3 --seed 5 --storage "$3"
  # em-fib-v4, but for its order and its trellis. Without --keep-stream the first group is interlaced from here on, symbols come to
  # lie on paths through 256 states, and are counted anew.
  ucray train "$1" "$2" --init "$2.taught" --train-steps 0 --student-steps 5000 --learning-rate 1e-3 --seed 6 --storage "$3"
else
  # em-fib-v3, when symbols were rounded one by one.
  [ -e "$2.both" ] || ucray train "$1" "$2.both" --also "$4" --init "$2.filtered" --train-steps 500 --student-steps 150 \
    --learning-rate 1.5e-3 --storage "$3"
  ucray train "$1" "$2" --also "$4" --init "$2.both" --train-steps 0 --student-steps 7000 --learning-rate 1e-3 --seed 5 \
    --storage "$3"
fi
