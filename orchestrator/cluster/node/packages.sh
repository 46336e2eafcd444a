#!/usr/bin/env bash
# Installs Debian packages on a node: packages.sh NAME ...
#
# Asks nothing (Ray's SSH has a terminal, where Ubuntu's tools would), and waits for whoever holds apt's lock: a new
# machine's own updates do for minutes.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
apt() { as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a apt-get -q -o DPkg::Lock::Timeout=900 "$@"; }

apt update
apt install -y --no-install-recommends "$@"
