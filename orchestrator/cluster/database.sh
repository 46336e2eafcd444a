#!/usr/bin/env bash
# PostgreSQL on the head, for MLflow alone: a role and a database of this user's, over the local socket.
#
# PostgreSQL knows the user from the system, so there is no password to hide, and it does not listen for other machines.
# Its disk goes with the head: MLflow's runs are a projection of the store, `python -m orchestrator sync` makes them anew.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
# From a folder that user postgres may enter.
as_postgres() { (cd / && as_root runuser -u postgres -- "$@"); }

command -v pg_ctlcluster >/dev/null || bash "$(dirname "$0")/packages.sh" postgresql
as_root service postgresql start
for _ in $(seq 60); do
    as_postgres psql -qc 'select 1' >/dev/null 2>&1 && break
    sleep 1
done
me=$(id -un)
known() { [ -n "$(as_postgres psql -Atc "$1")" ]; }
known "select 1 from pg_roles where rolname = '$me'" || as_postgres createuser "$me"
known "select 1 from pg_database where datname = 'mlflow'" || as_postgres createdb -O "$me" mlflow
