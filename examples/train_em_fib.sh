#!/bin/sh
# Trains weights like em-fib-v1 from nothing: about 75 minutes on two CPU cores where nothing else runs. Takes
# the path or URL of FIB-25 sample 1 as OME-Zarr (janelia-flyem/neuroproof_examples, CC BY), the file to write,
# and a folder for checkpoints, from which a run that was cut off goes on.
set -eu
ucray train "$1" "$2" --train-steps 6200 --student-steps 30 --seed 0 --storage "$3"
