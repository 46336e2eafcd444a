#!/usr/bin/env bash
# PostgreSQL on the head, for MLflow alone: a role and a database of this user's, over the local socket.
#
#   database.sh          installs it, starts it, makes both
#   database.sh watch    starts it again whenever it has died; run by orchestrator.cluster.node.supervisor
#
# PostgreSQL knows the user from the system, so there is no password to hide, and it does not listen for other machines.
# Its disk goes with the head: MLflow's runs are a projection of the store, `python -m orchestrator sync` makes them anew.
#
# It replaces those of its processes that die, but for the first. Nobody replaces that: Debian's and Ubuntu's unit of
# systemd has no Restart=, and `service postgresql start` does nothing there when it has been called before.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
# From a folder that user postgres may enter.
as_postgres() { (cd / && as_root runuser -u postgres -- "$@"); }
gone() { # there is no server; one that starts, or is busy, is there
    local code=0
    pg_isready -q -h /var/run/postgresql || code=$?
    [ $code = 2 ]
}
start() { # one that runs after all is left alone, with an error
    pg_lsclusters -h | while read -r version name _; do
        as_root pg_ctlcluster "$version" "$name" start </dev/null || true
    done
}

if [ "${1:-}" = watch ]; then
    while sleep 2; do
        if gone; then
            echo "$(date -u '+%F %T') PostgreSQL is gone: started again"
            start
        fi
    done
fi

command -v pg_ctlcluster >/dev/null || bash "$(dirname "$0")/packages.sh" postgresql
as_root service postgresql start
if gone; then start; fi
for _ in $(seq 60); do
    as_postgres psql -qc 'select 1' >/dev/null 2>&1 && break
    sleep 1
done
me=$(id -un)
known() { [ -n "$(as_postgres psql -Atc "$1")" ]; }
known "select 1 from pg_roles where rolname = '$me'" || as_postgres createuser "$me"
known "select 1 from pg_database where datname = 'mlflow'" || as_postgres createdb -O "$me" mlflow
