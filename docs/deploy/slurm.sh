#!/usr/bin/env bash
# A study on SLURM. Each node of the job becomes a node of a Ray cluster, and the command runs on the first one:
#
#   sbatch --nodes 4 --gpus-per-node 4 docs/deploy/slurm.sh lora-orchestrator study --output /shared/results
#
# The same line again continues a study that has been interrupted. slurm.md beside this file describes what is needed
# and what of it has been tried.
#SBATCH --job-name=lora-orchestrator
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

[ $# -gt 0 ] || { echo "error: no command; example: sbatch $0 lora-orchestrator study" >&2; exit 2; }
# Other users of the cluster's network reach Ray's ports; they do not have this token. Home folders are shared.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
[ -s ~/.ray/auth_token ] || ray get-auth-token --generate >/dev/null
chmod 600 ~/.ray/auth_token
# The address under which the other nodes reach this one, the first of the job.
address=${HEAD_ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}
# Nodes may need longer than the 30 s that Ray grants by default to import Ray from a shared file system.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
# `ray symmetric-run` returns 0 if Ray does not start, so the command itself leaves its exit code in a file.
result=$(mktemp)
trap 'rm -f "$result"' EXIT
# shellcheck disable=SC2016
record='"${@:2}"; code=$?; echo $code > "$1"; exit $code'

# Without --cpus-per-task, a step has one CPU of each node. The workers see that the head is gone within a minute or
# two of the end, and --wait ends them before.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --wait=20 \
    ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --object-store-memory=500000000 --disable-usage-stats \
    -- bash -c "$record" lora-orchestrator "$result" "$@" || true
code=$(cat "$result")
exit "${code:-1}"
