#!/usr/bin/env bash
# Mounts the storage that all nodes share at /shared and makes /shared/results, where studies write (--output).
#
# The store links and renames files and locks some (orchestrator/record/store.py, files.py): of AWS's storage that is
# EFS or FSx for Lustre. S3 has neither hard links nor locks, and no tool that mounts it adds them; a study refuses it.
# Nothing is done where /shared is mounted already: by an image, /etc/fstab, an administrator or an earlier `ray up`.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

if ! mountpoint -q /shared; then
    where=$(python -m orchestrator.cluster.node.ssm_parameter storage)
    if [ -z "$where" ]; then
        echo "storage: /shared is not mounted and nobody says what it is; mount it, or set LORA_STORAGE to HOST:/PATH (NFS)." >&2
        exit 1
    fi
    command -v mount.nfs4 >/dev/null || bash "$(dirname "$0")/packages.sh" nfs-common
    as_root mkdir -p /shared
    # AWS's options for EFS. `hard`: a server that is away delays a write and loses none.
    as_root mount -t nfs4 -o nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport "$where" /shared
fi
[ -d /shared/results ] || as_root install -d -o "$(id -u)" -g "$(id -g)" /shared/results
