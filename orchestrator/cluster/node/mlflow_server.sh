#!/usr/bin/env bash
# MLflow's server on the head. Run by orchestrator.cluster.node.supervisor, which starts it again when it dies or is deaf.
#
# Only this machine reaches it: read it through `ray attach cluster.yaml --port-forward 5000`.
# It hands artifacts on itself, so that nobody else needs rights on the bucket.
set -euo pipefail

artifacts=$(python -m orchestrator.cluster.node.ssm_parameter artifacts)
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # seven more processes that nothing here needs
exec mlflow server --host 127.0.0.1 --port "${LORA_MLFLOW_PORT:-5000}" --workers 2 \
    --backend-store-uri 'postgresql+psycopg2:///mlflow?host=/var/run/postgresql' \
    --artifacts-destination "${artifacts:-/shared/results/mlflow-artifacts}"
