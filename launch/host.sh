#!/usr/bin/env bash
# Runs on every host of a TPU slice, called by launch/tpu.sh. The code lies in ~/sync_jax, notes in ~/.sync_jax.
#   setup [BUCKET:FOLDER]...                   takes ~/sync_jax.new as the code, mounts the buckets, installs the packages
#   run WORKDIR [BUCKET:FOLDER]... -- ARG...   starts python -m sync_jax.main ARG..., which outlives the connection
#   status                                     prints one line: how the run stands, and its last checkpoint
#   stop SECONDS                               sends SIGTERM, once, and SIGKILL after so long
set -euo pipefail
script=$(realpath "$0")
cd # all names below are relative to the home folder
notes=$PWD/.sync_jax
mkdir -p "$notes"
worker=${HOSTNAME##*-w-} # t1v-n-0123abcd-w-3 is worker 3

say() { echo "worker $worker: $*"; }
die() { say "$*" >&2 && exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

# One lock tells what is going on. setup and run take it and what they start inherits it, so it is held for as long as
# the trainer lives, however it ends. A noted process number counts only while that process holds the lock.
take_lock() { exec 9>>"$notes/lock" && flock -w 2 9; } # whoever looks at it holds it for a moment
is_free() { flock -s -n "$notes/lock" true; }
holders() { { find /proc/[0-9]*/fd -lname "$notes/lock" 2>/dev/null || true; } | cut -d/ -f3 | sort -u; }
trainer() { if [ -s "$notes/pid" ]; then grep -x "$(<"$notes/pid")" <<<"$(holders)" || true; fi; }

mount_bucket() { # BUCKET:FOLDER; without a cache of names, so that every host sees at once what another has written
  local bucket=${1%%:*} folder=${1#*:} package=gcsfuse_3.2.0_amd64.deb
  ls "$folder" >/dev/null 2>&1 || fusermount -uz "$folder" 2>/dev/null || true # a mount whose gcsfuse has ended
  if ! mountpoint -q "$folder"; then
    if ! command -v gcsfuse >/dev/null; then
      curl -fsSLo "$notes/$package" "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v3.2.0/$package"
      as_root apt-get -o DPkg::Lock::Timeout=300 install -qq -y "$notes/$package" >/dev/null
    fi
    as_root mkdir -p "$folder" && as_root chown "$(id -u):$(id -g)" "$folder"
    gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 \
      --metadata-cache-negative-ttl-secs=0 "$bucket" "$folder" 9>&- || # it must not keep the lock
      die "gs://$bucket cannot be mounted: does it exist, and may this machine's service account use it?"
  fi
  rm "$(mktemp "$folder/.sync_jax-XXXXXX")" ||
    die "gs://$bucket cannot be written: give this machine's service account the role Storage Object User"
  # shellcheck disable=SC2034 # in use while the run lives, so that a shutdown unmounts it after the last checkpoint
  exec {held}<"$folder"
}

setup() { # [BUCKET:FOLDER]...
  local uv=$notes/uv/bin/uv
  take_lock || die "a run, or a setup, is going on here; stop ends it"
  rm -f "$notes/ready" "$notes/pid" "$notes/exit"
  if [ -d sync_jax/.venv ]; then mv sync_jax/.venv sync_jax.new/; fi
  rm -rf sync_jax && mv sync_jax.new sync_jax
  for bucket; do mount_bucket "$bucket"; done
  # The images of TPUs have Python 3.10. uv brings a newer one and needs no root.
  python3 -m pip install --quiet --target "$notes/uv" --upgrade uv==0.13.9
  "$uv" python install --quiet 3.11
  PYTHON=$("$uv" python find --managed-python 3.11) sh sync_jax/launch/venv.sh tpu
  touch "$notes/ready" # last, so that what was installed half-way is never run
  say "ready"
}

run() {
  local all=("$@") workdir=$1
  if ! take_lock; then
    if [ -n "$(trainer)" ] && printf '%s\0' "$@" | cmp -s - "$notes/arguments"; then say "already running" && exit; fi
    die "another run, or a setup, is going on here; stop ends it"
  fi
  [ -f "$notes/ready" ] || die "not set up: launch/tpu.sh setup does it"
  while shift && [ "$1" != -- ]; do mount_bucket "$1"; done
  shift
  mkdir -p "$workdir"
  [ "$(df --output=target "$workdir" | tail -n 1)" != / ] ||
    die "--workdir=$workdir is on this host's own disk, which goes with the machine: name gs://BUCKET/DIR or a shared path"
  (cd sync_jax && .venv/bin/python -m sync_jax.main "$@" --mode=check >/dev/null) || die "not started"
  # shellcheck disable=SC1091 # lines "export NAME=VALUE" from tpu.sh
  if [ -f sync_jax.env ]; then . ./sync_jax.env; fi
  printf '%s\0' "${all[@]}" >"$notes/arguments"
  printf '%s\n' "$workdir" >"$notes/workdir"
  rm -f "$notes/pid" "$notes/exit" "$notes/asked"
  setsid bash "$script" watch "$@" </dev/null >>"$notes/log" 2>&1 &
  until [ -s "$notes/pid" ] || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
  say "started"
}

watch() { # starts the trainer and notes how it ended
  local status=0 pid
  trap '' HUP
  trap : TERM # a machine that is taken away sends it to every process, of which the trainer alone obeys
  (cd sync_jax && JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} exec .venv/bin/python -u -m sync_jax.main "$@") &
  pid=$!
  trap '' TERM
  echo $pid >"$notes/pid"
  wait $pid || status=$?
  echo "=== $(date -u +%FT%TZ): ended with exit status $status"
  echo $status >"$notes/exit"
  # A machine that is gone has no log; the lock's time tells the logs of one machine from those of the next.
  timeout -s KILL 60 install -D -m 644 "$notes/log" \
    "$(<"$notes/workdir")/logs/worker-$worker-$(stat -c %Y "$notes/lock").log"
}

status() {
  local word="no run" step
  if [ -n "$(trainer)" ]; then
    word=running
  elif [ -s "$notes/exit" ]; then
    word="ended with exit status $(<"$notes/exit")"
  elif ! is_free; then
    word="being set up"
  elif [ -s "$notes/pid" ]; then
    word="lost, for it was killed or the host restarted"
  fi
  step=$(find "$(cat "$notes/workdir" 2>/dev/null)/checkpoints" -mindepth 1 -maxdepth 1 -name '*[0-9]' -printf '%f\n' \
    2>/dev/null | grep -x '[0-9]*' | sort -n | tail -n 1) || step=none
  say "$word; last checkpoint: $step"
}

stop() {
  local end=$((SECONDS + $1)) pid
  rm -f sync_jax.env
  pid=$(trainer)
  [ -n "$pid" ] || end=$SECONDS # a setup has nothing to save
  if [ -n "$pid" ] && [ ! -e "$notes/asked" ]; then # a second SIGTERM would end a trainer that is saving
    touch "$notes/asked" && kill -TERM "$pid" || true
  fi
  until is_free; do
    sleep 0.5
    [ $SECONDS -ge $end ] || continue
    # shellcheck disable=SC2046 # numbers; first the trainer alone, so that its end is noted
    kill -KILL $(trainer) 2>/dev/null || kill -KILL $(holders) 2>/dev/null || true
    end=$((SECONDS + 5))
  done
  rm -f /tmp/libtpu_lockfile 2>/dev/null || true # a killed trainer leaves it; another user's cannot be removed
  say "stopped"
}

"$@" # a function's name and its arguments
