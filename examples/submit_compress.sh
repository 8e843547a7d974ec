#!/usr/bin/env bash
# Compress a volume on a Ray cluster: submit_compress.sh SOURCE ARCHIVE [options of ucray compress]
#
#   export RAY_ADDRESS=http://head:8265
#   examples/submit_compress.sh s3://lab/em.zarr s3://lab/em.ucray --ratio 64 --workers 32 --metrics-port 9464
#
# Submitted again, it does what is missing. JOB names the job, so that `ray job stop` and `ray job logs` find it;
# Ray takes a name once.
set -euo pipefail
: "${RAY_ADDRESS:?where the cluster takes jobs, as http://head:8265}"
exec ray job submit ${JOB:+--submission-id "$JOB"} -- ucray compress "$@"
