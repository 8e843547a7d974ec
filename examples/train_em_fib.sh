#!/bin/sh
# Trains weights as em-fib-v1 was trained (its card says at which commit, and what was done since). Takes the
# path or URL of FIB-25 sample 1 as OME-Zarr (janelia-flyem/neuroproof_examples, CC BY) and the file to
# write; about an hour of two CPU cores.
set -eu
ucray train "$1" "$2" --train-steps 8000 --student-steps 2000 --batch 2 --seed 0
