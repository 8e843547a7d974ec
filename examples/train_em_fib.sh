#!/bin/sh
# Trains weights like em-fib-v14: an hour on two CPU cores with units for bfloat16 where nothing else runs. Takes the path or
# URL of FIB-25 sample 1 as OME-Zarr (janelia-flyem/neuroproof_examples, CC BY), the file to write, and a folder for checkpoints,
# from which a run that was cut off goes on. How em-fib-v1, which it starts from, was made is in its card. With sample 2 as
# a fourth argument, weights like em-fib-v15 come out: they learn from both volumes.
set -eu
[ -e "$2.plain" ] || ucray train "$1" "$2.plain" --init em-fib-v1 --keep-stream --train-steps 0 --student-steps 1 --learning-rate 1e-5
# em-fib-v2
[ -e "$2.filtered" ] || ucray train "$1" "$2.filtered" --init "$2.plain" --keep-stream --student-filter 16,2,160 \
  --teacher-filter 16,6,160 --train-steps 1100 --student-steps 450 --learning-rate 1e-3 --seed 4 --storage "$3"
# Without --keep-stream the first group is interlaced from here on, symbols come to lie on paths through 256 states, and are counted
# anew. The student's filter starts anew, and goes beyond the teacher's.
if [ $# -lt 4 ]; then
  [ -e "$2.narrow" ] || ucray train "$1" "$2.narrow" --init "$2.filtered" --student-filter 32,6,224,2,4,4 --untaught --train-steps 0 --student-steps 8500 \
    --learning-rate 1e-3 --seed 20 --storage "$3"
else
  [ -e "$2.both" ] || ucray train "$1" "$2.both" --also "$4" --init "$2.filtered" --train-steps 500 --student-steps 150 \
    --learning-rate 1.5e-3 --storage "$3"
  [ -e "$2.narrow" ] || ucray train "$1" "$2.narrow" --also "$4" --init "$2.both" --student-filter 32,6,224,2,4,4 --untaught \
    --train-steps 0 --student-steps 5500 --learning-rate 1e-3 --seed 21 --storage "$3"
fi
# em-fib-v12, or with both volumes em-fib-v13; latents for finer qualities take a minute more.
ucray train "$1" "$2" ${4:+--also "$4"} --init "$2.narrow" --keep-stream --more-latents 128 --student-filter 32,6,176,2,4,4 \
  --train-steps 0 --student-steps 1 --learning-rate 1e-9 --seed 14
