#!/usr/bin/env bash
# Makes everything `make demo` (demo) or `make test` (full) needs. Safe to run again: a second run takes no time.
set -euo pipefail
mode="${1:-full}"
cd "$(dirname "$0")/.."

say() { printf '\033[2m· %s\033[0m\n' "$*" >&2; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

case "$mode" in
    demo) extra=demo ;;
    full) extra=dev ;;
    *) fail "unknown mode '$mode': demo or full" ;;
esac

find_python() {
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.14 python; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found; install one (Debian, Ubuntu: apt-get install python3 python3-venv) or set PYTHON"
}

make_venv() {
    [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 && return
    local python
    python="$(find_python)"
    "$python" -c 'import ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments; install its venv package (Debian, Ubuntu: apt-get install python3-venv)"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --prompt sollol .venv
}

# The stamp names what was installed: the dependencies' description, and the extra. dev holds all of demo.
install_packages() {
    local wanted stamp=.venv/.sollol-setup
    wanted="$(cksum <pyproject.toml)"
    if [ -f "$stamp" ] && { [ "$(cat "$stamp")" = "$wanted dev" ] || [ "$(cat "$stamp")" = "$wanted $extra" ]; }; then
        return
    fi
    say "installing Python packages into .venv"
    .venv/bin/python -m pip install -qq --disable-pip-version-check -e ".[$extra]"
    printf '%s %s' "$wanted" "$extra" >"$stamp"
}

# Also where only root's PATH would look.
has_command() {
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null
}

missing_system_packages() {
    command -v redis-server >/dev/null || echo redis-server
    has_command mosquitto || echo mosquitto
    command -v mosquitto_pub >/dev/null || echo mosquitto-clients
    command -v g++ >/dev/null || echo g++
    command -v make >/dev/null || echo make
    # For the cluster of network namespaces: hosts and links, and packets that get lost.
    has_command ip || echo iproute2
    has_command nft || echo nftables
    has_command tcpdump || echo tcpdump
    # For the units: an analysis of them, and machines that boot with them.
    command -v systemd-analyze >/dev/null || echo systemd
    command -v systemd-nspawn >/dev/null || echo systemd-container
    has_command debootstrap || echo debootstrap
    # Virtual machines, for kernels of their own.
    [ "$(uname -m)" != x86_64 ] || has_command qemu-system-x86_64 || echo qemu-system-x86
    has_command mkfs.ext4 || echo e2fsprogs
    command -v ssh-keygen >/dev/null || echo openssh-client
}

# Packages that tests start themselves, on their own ports: the installed services must stay off.
install_system_packages() {
    local missing policy=/usr/sbin/policy-rc.d made=""
    missing="$(missing_system_packages | tr '\n' ' ')"
    [ -n "${missing// /}" ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "please install: $missing"
    fi
    say "installing $missing"
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        made="$policy"
    fi
    local status=0
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends $missing; } >/dev/null </dev/null || status=$?
    [ -z "$made" ] || rm -f "$made"
    [ "$status" = 0 ] || fail "apt-get could not install: $missing"
}

build_engine() {
    if .venv/bin/python -m agent.engine show --built >/dev/null 2>&1; then
        return
    fi
    say "building llama.cpp once into ${XDG_CACHE_HOME:-$HOME/.cache}/sollol (several minutes)"
    .venv/bin/python -m agent.engine build
}

# The file systems that the machines of tests/nspawn and tests/vm boot from; without root these tests are skipped.
make_machine_roots() {
    [ "$(id -u)" = 0 ] || return 0
    say "making the test machines' Debians, unless they are in ${XDG_CACHE_HOME:-$HOME/.cache}/sollol/nspawn (a minute or two each)"
    .venv/bin/python -m tests.nspawn.root
    [ "$(uname -m)" != x86_64 ] || .venv/bin/python -m tests.vm.machine
}

make_venv
[ "$mode" = demo ] || install_system_packages
install_packages
[ "$mode" = demo ] || build_engine
[ "$mode" = demo ] || make_machine_roots
