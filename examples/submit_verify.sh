#!/usr/bin/env bash
# Check an archive on a Ray cluster: submit_verify.sh ARCHIVE [options of ucray verify]
#
#   export RAY_ADDRESS=http://head:8265
#   examples/submit_verify.sh s3://lab/em.ucray --source s3://lab/em.zarr --workers 32
#
# Ends with 1 if anything is missing or damaged.
set -euo pipefail
: "${RAY_ADDRESS:?where the cluster takes jobs, as http://head:8265}"
exec ray job submit -- ucray verify "$@"
