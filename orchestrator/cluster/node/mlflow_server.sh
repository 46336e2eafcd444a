#!/usr/bin/env bash
# MLflow's server on the head. orchestrator.cluster.node.supervisor restarts it when it ends or does not answer.
#
# It listens on this machine only; `ray attach cluster.yaml --port-forward 5000` forwards it to yours.
# It reads and writes artifacts itself, so that no other machine needs rights on the bucket.
set -euo pipefail

artifacts=$(python -m orchestrator.cluster.node.ssm_parameter artifacts)
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # saves seven processes that are not needed
exec mlflow server --host 127.0.0.1 --port "${LORA_MLFLOW_PORT:-5000}" --workers 2 \
    --backend-store-uri 'postgresql+psycopg2:///mlflow?host=/var/run/postgresql' \
    --artifacts-destination "${artifacts:-/shared/results/mlflow-artifacts}"
