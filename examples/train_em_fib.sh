#!/bin/sh
# Trains em-fib-v1, a few minutes on two CPU cores. Takes the path or URL of FIB-25 sample 1 as OME-Zarr
# (janelia-flyem/neuroproof_examples, CC BY) and the file to write.
set -eu
ucray train "$1" "$2" --train-steps 320 --student-steps 40 --learning-rate 5e-3 --seed 0
