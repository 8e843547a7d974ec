#!/usr/bin/env bash
# Train weights on a Ray cluster: submit_train.sh SOURCE WEIGHTS [options of ucray train]
#
#   export RAY_ADDRESS=http://head:8265
#   examples/submit_train.sh s3://lab/em.zarr s3://lab/weights.safetensors --storage s3://lab/checkpoints
#
# With --storage a run that was cut off goes on from its last checkpoint when it is submitted again.
set -euo pipefail
: "${RAY_ADDRESS:?where the cluster takes jobs, as http://head:8265}"
exec ray job submit -- ucray train "$@"
