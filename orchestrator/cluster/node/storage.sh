#!/usr/bin/env bash
# Mount the storage that all nodes share at /shared, and create /shared/results, where studies write (--output).
#
# The store needs renames, hard links and locks (orchestrator/record/store.py). On AWS, EFS and FSx for Lustre have
# them; S3 does not, mounted or not, and a study refuses it. If /shared is mounted already (by an image, /etc/fstab, an
# administrator or an earlier `ray up`), nothing is mounted.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

if ! mountpoint -q /shared; then
    source=$(python -m orchestrator.cluster.node.ssm_parameter storage)
    if [ -z "$source" ]; then
        echo "storage: /shared is not mounted and LORA_STORAGE is not set; mount it, or set LORA_STORAGE to HOST:/PATH (NFS)." >&2
        exit 1
    fi
    command -v mount.nfs4 >/dev/null || bash "$(dirname "$0")/packages.sh" nfs-common
    as_root mkdir -p /shared
    # AWS's options for EFS. `hard`: writes wait for a server that does not answer, and none is lost.
    as_root mount -t nfs4 -o nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport "$source" /shared
fi
[ -d /shared/results ] || as_root install -d -o "$(id -u)" -g "$(id -g)" /shared/results
