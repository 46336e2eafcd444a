#!/usr/bin/env bash
# Install Debian packages on a node: packages.sh NAME ...
#
# Suppresses questions, which Ubuntu's tools ask in the terminal of Ray's SSH, and waits for apt's lock, which the
# updates of a new machine hold for minutes.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
apt() { as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a apt-get -q -o DPkg::Lock::Timeout=900 "$@"; }

apt update
apt install -y --no-install-recommends "$@"
