#!/usr/bin/env bash
# PostgreSQL on the head for MLflow's server: a role and a database of this user, reached over the local socket.
#
#   database.sh          install PostgreSQL, start it, create role and database
#   database.sh watch    start it again whenever it has died; run by orchestrator.cluster.node.supervisor
#
# PostgreSQL takes the name of the user from the operating system (peer), so there is no password to hide. Other
# machines cannot connect.
# The data is lost with the head's disk: `python -m orchestrator sync` creates MLflow's runs again from the store.
#
# PostgreSQL replaces its child processes when they die. Nothing replaces its main process: the systemd unit of Debian
# and Ubuntu has no Restart=, and a second `service postgresql start` does nothing there.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
# Runs in a folder that the user postgres may enter.
as_postgres() { (cd / && as_root runuser -u postgres -- "$@"); }
is_gone() { # a server that is starting or busy is not gone
    local code=0
    pg_isready -q -h /var/run/postgresql || code=$?
    [ $code = 2 ]
}
start() { # for a server that runs already, pg_ctlcluster changes nothing and fails, which is ignored
    pg_lsclusters -h | while read -r version name _; do
        # Without LORA_SUPERVISOR_LOG: the supervisor of this script ends all processes that have it.
        as_root env -u LORA_SUPERVISOR_LOG pg_ctlcluster "$version" "$name" start </dev/null || true
    done
}

if [ "${1:-}" = watch ]; then
    while sleep 2; do
        if is_gone; then
            echo "$(date -u '+%F %T') PostgreSQL is gone: starting it"
            start
        fi
    done
fi

command -v pg_ctlcluster >/dev/null || bash "$(dirname "$0")/packages.sh" postgresql
as_root service postgresql start
if is_gone; then start; fi
for _ in $(seq 60); do
    as_postgres psql -qc 'select 1' >/dev/null 2>&1 && break
    sleep 1
done
me=$(id -un)
exists() { [ -n "$(as_postgres psql -Atc "$1")" ]; }
exists "select 1 from pg_roles where rolname = '$me'" || as_postgres createuser "$me"
exists "select 1 from pg_database where datname = 'mlflow'" || as_postgres createdb -O "$me" mlflow
