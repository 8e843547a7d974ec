#!/bin/sh
# Trains weights of em-fib-v1's shape on a GPU (the card of em-fib-v1 says how that one came about). Takes the path
# or URL of FIB-25 sample 1 as OME-Zarr (janelia-flyem/neuroproof_examples, CC BY) and the file to write.
set -eu
ucray train "$1" "$2" --large --gpu --batch 16 --train-steps 20000 --student-steps 5000 --learning-rate 2e-3 --seed 0
