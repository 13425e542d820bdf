#!/bin/sh
# Makes .venv and installs sync_jax into it, without root; does nothing when .venv is up to date.
#   usage: launch/venv.sh [EXTRA]      EXTRA: a set of optional requirements in setup.cfg, as test
#   PYTHON   the interpreter, 3.11 or newer; unset: the one that .venv has, else python3
#   PINNED   1 (default): the versions in constraints.txt; 0: the newest
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
extra=${1:-}
pinned=${PINNED:-1}
python=${PYTHON:-python3}
stamp=.venv/.installed # "incomplete", or what is installed (written last)

die() { echo "launch/venv.sh: $*" >&2 && exit 1; }

identity() { # which Python this is, the same from outside a virtual environment and inside
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.base_prefix)'
}

check_python() {
  version=$("$python" -V 2>&1) || die "no Python at '$python': name one, as in PYTHON=python3.12 make quickstart"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "'$python' is $version, and 3.11 or newer is needed: name one, as in PYTHON=python3.12 make quickstart"
}

usable() { # pip is not found by a Python that was upgraded under .venv
  [ "$(cat "$stamp" 2>/dev/null)" != incomplete ] && .venv/bin/python -c 'import pip' 2>/dev/null
}

# Debian and Ubuntu keep ensurepip in a package that only root can install. The wheel of pip itself
# needs nobody's leave: apt fetches and dpkg unpacks it with lists and caches of our own.
bootstrap_pip() (
  mkdir -p .venv/apt/lists/partial .venv/apt/archives/partial
  cd .venv/apt # names below are relative: the path of the checkout may hold spaces
  apt() {
    apt-get -qq -o Dir::State::lists=./lists/ -o Dir::Cache=./ -o Acquire::Languages=none \
      -o APT::Sandbox::User=root "$@"
  }
  exec >log 2>&1
  apt update && apt download python3-pip-whl && dpkg -x python3-pip-whl_*.deb . || exit 1
  wheel=$(echo usr/share/python-wheels/pip-*.whl)
  ../bin/python "$wheel/pip" install --no-index --no-compile "$wheel"
)

create() {
  check_python
  echo "Creating .venv with $version"
  mkdir -p .venv
  echo incomplete >$stamp
  find .venv/ -mindepth 1 ! -path .venv/.installed -delete
  place=$(cd .venv && pwd -P) # .venv may be a link to a larger disk
  if "$python" -c 'from ensurepip import bootstrap' 2>/dev/null; then
    "$python" -m venv "$place"
  else
    "$python" -m venv --without-pip "$place"
    minor=$(identity "$python" | cut -d' ' -f1)
    bootstrap_pip || die "'$python' has no ensurepip, nor could apt fetch pip (see .venv/apt/log): apt-get install python$minor-venv"
    rm -r .venv/apt
  fi
}

# One at a time: make -j, or a second terminal, waits for the first.
exec 9<launch/venv.sh
if command -v flock >/dev/null; then flock 9; fi

if [ ! -f $stamp ] && [ -n "$(ls -A .venv 2>/dev/null)" ]; then
  die ".venv is not one that this script made: move it away or remove it"
fi
if [ -n "${PYTHON:-}" ]; then check_python; fi
if ! usable; then
  create
elif [ -n "${PYTHON:-}" ] && [ "$(identity "$python")" != "$(identity .venv/bin/python)" ]; then
  create
fi

# The folder belongs to it because an editable install points there.
state="pinned=$pinned $(identity .venv/bin/python) $PWD $(cat setup.cfg pyproject.toml constraints.txt launch/venv.sh | cksum)"
installed() { [ "$(cat $stamp)" = "$state $1" ]; }
if installed "$extra" || { [ -z "$extra" ] && grep -qF -- "$state " $stamp; }; then exit 0; fi

echo "Installing into .venv (half a minute, more on a slow network; log: .venv/install.log)"
echo incomplete >$stamp
# No bytecode: the first run compiles the part of it that is used. PEP 517: without it, an older pip
# builds packages that have no wheel with setuptools, which a new .venv may lack.
export PIP_USE_PEP517=1 PIP_USER=0
set -- --no-compile --no-input
if [ "$pinned" = 0 ]; then
  set -- "$@" --upgrade --upgrade-strategy eager
else
  set -- "$@" -c constraints.txt
fi
if ! .venv/bin/python -m pip install "$@" -e ".${extra:+[$extra]}" >.venv/install.log 2>&1; then
  tail -n 20 .venv/install.log >&2
  die "pip failed; the whole of what it said is in .venv/install.log"
fi
echo "$state $extra" >.venv/.installed.new
mv .venv/.installed.new $stamp
