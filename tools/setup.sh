#!/usr/bin/env bash
# Prepare this computer for agentvm: system packages, libvirtd, .venv, guest image, kernelspec.
# Every step looks first and does nothing when its work is done already, so a second run takes moments and no network.
# Needs root or sudo only for what is missing. AGENTVM_PYTHON names the Python to use (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(
  qemu-system-x86 qemu-utils libvirt-daemon-system libvirt-clients # machines
  libvirt-dev pkg-config gcc libc6-dev                             # libvirt-python is built from source
  mmdebstrap debian-archive-keyring e2fsprogs zstd xz-utils        # guest images
  tini procps ca-certificates
)

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "this needs root: $*. Run it as root or install sudo."
  fi
}

find_python() {
  local candidate
  for candidate in ${AGENTVM_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return 0
    fi
  done
  return 1
}

missing_packages() {
  local package
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || printf '%s\n' "$package"
  done
}

install_missing() {
  local missing
  mapfile -t missing < <(missing_packages "$@")
  [ "${#missing[@]}" = 0 ] && return 0
  say "installing ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$log" 2>&1 ||
    { tail -n 30 "$log" >&2; die "apt-get could not install the packages above."; }
}

install_packages() {
  if ! command -v dpkg-query >/dev/null; then
    local tool
    for tool in qemu-system-x86_64 qemu-img libvirtd virsh mmdebstrap mkfs.ext4 gcc pkg-config; do
      command -v "$tool" >/dev/null || die "$tool is missing, and this system has no apt: install it with your package manager."
    done
    return 0
  fi
  local wanted=("${packages[@]}") found
  if ! found=$(find_python); then
    wanted+=(python3 python3-venv python3-dev)
  elif found=$(readlink -f "$found"); [[ $found == /usr/bin/* ]]; then
    wanted+=("${found##*/}-venv" "${found##*/}-dev")
  fi
  install_missing "${wanted[@]}"
}

# Where only root may open /dev/kvm, libvirt's QEMU user cannot, and libvirt then forgets what QEMU can do at every call:
# defining a machine takes 80 s instead of 0.1 s. Packages' udev rules set this right, but containers run no udev.
mend_kvm() {
  [ "$(id -u)" = 0 ] && [ -c /dev/kvm ] || return 0
  if [ "$(stat -c %a /dev/kvm)" = 600 ] && getent group kvm >/dev/null; then
    say "giving the group kvm access to /dev/kvm"
    chgrp kvm /dev/kvm && chmod 660 /dev/kvm || say "/dev/kvm cannot be changed here; agentvm doctor tells more"
  fi
}

libvirt_answers() { timeout 10 virsh --quiet --connect qemu:///system uri >/dev/null 2>&1; }

# A normal user needs no daemon: libvirt starts qemu:///session by itself.
start_libvirtd() {
  [ "$(id -u)" = 0 ] && [ -z "${AGENTVM_URI:-}" ] || return 0
  libvirt_answers && return 0
  if [ -d /run/systemd/system ]; then
    say "starting libvirtd"
    systemctl enable --quiet --now libvirtd
  else
    say "starting libvirtd and virtlogd in the background (no systemd here), logs in /var/log/agentvm"
    mkdir -p /var/log/agentvm
    local daemon
    for daemon in virtlogd libvirtd; do
      pgrep -x "$daemon" >/dev/null && continue
      # tini adopts and reaps the orphans that libvirtd makes; some containers' PID 1 is slow at it or never does.
      setsid tini -s -- "$daemon" </dev/null >>"/var/log/agentvm/$daemon.log" 2>&1 9>&- &
    done
  fi
  local try
  for try in $(seq 100); do
    libvirt_answers && return 0
    sleep 0.2
  done
  die "libvirtd does not answer at qemu:///system. See /var/log/agentvm/libvirtd.log or: journalctl -u libvirtd"
}

make_venv() {
  local python stamp
  python=$(find_python) || die "no Python 3.11 or newer found. Install one and name it: AGENTVM_PYTHON=/path/to/python3 make setup"
  stamp=$({ "$python" --version && pwd && cat pyproject.toml; } | sha256sum)
  [ "$(cat .venv/.setup-stamp 2>/dev/null)" = "$stamp" ] && [ -x .venv/bin/agentvm ] && return 0
  say "making .venv with $("$python" --version) (a few minutes the first time)"
  "$python" -m venv .venv
  .venv/bin/python -m pip install --disable-pip-version-check -qq --editable '.[test]' 2>&1 | tee "$log" ||
    die "pip could not install agentvm; what it said is above."
  printf '%s\n' "$stamp" >.venv/.setup-stamp
}

build_image() {
  [ -d agentvm_kernel/image ] && .venv/bin/agentvm image build
}

register_kernel() {
  .venv/bin/agentvm install --sys-prefix
}

main() {
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  exec 9>".setup-lock"
  flock 9 || die "another make setup is running."
  install_packages
  mend_kvm
  start_libvirtd
  make_venv
  build_image
  register_kernel
  say "ready: try 'make demo', or '.venv/bin/jupyter lab' and the kernel \"Python 3 (agentvm)\""
}

main "$@"
