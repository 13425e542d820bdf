#!/usr/bin/env bash
# What runs on the machine that trains. tpu.sh and gpu.sh call it there, on every host of a slice alike; its
# place is the home folder: the code in sync_jax/, what it must remember in .sync_jax/.
#   unpack                             sync_jax.tar.gz into sync_jax/; what an earlier one left there goes
#   setup EXTRA [BUCKET:FOLDER]...     Python, the pinned packages (EXTRA: tpu or cuda), the mounts
#   run [BUCKET:FOLDER]... -- ARG...   starts python -m sync_jax.main ARG..., detached; sync_jax.env, with
#                                      lines NAME=value, is for its environment, and goes
#   status [WORKDIR]                   one line: worker, state, exit status, step of the last checkpoint
#   logs LINES [follow]                the log, each line after the worker's number
#   stop SECONDS                       TERM to the run, once; KILL after so long
#   unlock                             removes libtpu's lock, if nobody holds the accelerator
set -euo pipefail
script=$(cd "$(dirname "$0")" && pwd)/${0##*/}
cd # names below are relative to it

state=.sync_jax
# Pinned, as constraints.txt pins what they install; this Python is the one that the tests run on.
uv=0.13.9 python=3.11 gcsfuse=3.2.0
# Tests have neither the file nor the devices.
lock_file=${SYNC_JAX_LIBTPU_LOCK:-/tmp/libtpu_lockfile}
devices=${SYNC_JAX_DEVICES:-/dev/accel* /dev/vfio/*}
poll=${SYNC_JAX_HOST_POLL:-0.5}
limit=${SYNC_JAX_HOST_LIMIT:-30} # seconds that a bucket's mount is given to answer

die() {
  echo "worker $worker: $*" >&2
  exit 1
}

case $HOSTNAME in # a slice's hosts are named after it and their number: t1v-n-0123abcd-w-3
  *-w-[0-9]*) worker=${HOSTNAME##*-w-} ;;
  *) worker=0 ;;
esac

# What asks a bucket's mount, which may hang: it is killed then, with status 137. No other signal reaches
# what waits for a mount.
within() { timeout -s KILL "$limit" "$@"; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# One run per machine, nor new code or packages under one. The run inherits the lock, and with it all
# that it starts: the machine is free when the last of them is gone.
take_lock() {
  mkdir -p $state
  exec 9>>$state/lock
  # A run that has noted its end is about to let go of it.
  flock -w 0.5 9 || die "a run, or its setup, is going on here; stop ends it"
}

whole() { # whether there is code, all of one version
  [ -f sync_jax/setup.cfg ] || die "no code here: push brings it"
  [ ! -e $state/unpacking ] || die "the code here is a part of what was pushed: push it again"
}

unpack() {
  take_lock
  # To its end: one that was cut off on the way here would leave a mixture of two versions.
  tar --quoting-style=literal -tzf sync_jax.tar.gz >$state/listed ||
    die "sync_jax.tar.gz is not whole: push it again"
  grep -v '/$' $state/listed >$state/files.new
  : >$state/unpacking # as long as it is there, no run starts
  mkdir -p sync_jax
  # Only what an earlier archive brought is removed: runs and data may lie there too.
  if [ -f $state/files ]; then
    sort $state/files.new | comm -13 - <(sort $state/files) |
      while IFS= read -r file; do rm -f -- "sync_jax/$file"; done
  fi
  tar -xzf sync_jax.tar.gz -C sync_jax
  mv $state/files.new $state/files
  rm -f $state/listed $state/unpacking sync_jax.tar.gz sync_jax.unpack
}

find_python() { # 3.11 or newer; TPU images have 3.10, so uv brings one, which needs no root
  local name
  for name in python3.11 python3.12 python3.13 python3; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  python3 -m pip --version >/dev/null 2>&1 ||
    die "no Python 3.11 here, and no pip that could bring one: apt-get install python3-pip"
  export UV_PYTHON_PREFERENCE=only-managed
  python3 -m pip install --quiet --target $state/uv --upgrade "uv==$uv" >&2 &&
    $state/uv/bin/uv python install --quiet $python >&2 &&
    $state/uv/bin/uv python find $python
}

# Removing a checkpoint's temporary name renames a folder: atomic in a bucket with a hierarchical
# namespace, file by file in others. No cache of names: other hosts must see what one has written.
mount_bucket() { # BUCKET:FOLDER
  local bucket=${1%%:*} folder=${1#*:} said status=0
  said=$(LC_ALL=C within stat "$folder" 2>&1 >/dev/null) || status=$?
  case $status:$said in
    137:*) die "gs://$bucket, mounted at $folder, does not answer within $limit s" ;;
    *"endpoint is not connected"*)
      echo "worker $worker: the mount of gs://$bucket is dead, for its gcsfuse has ended: mounting it anew" >&2
      fusermount -uz "$folder" 2>/dev/null || as_root umount -l "$folder" ||
        die "the dead mount at $folder cannot be removed: umount -l $folder"
      ;;
  esac
  if ! mountpoint -q "$folder"; then
    command -v gcsfuse >/dev/null || install_gcsfuse
    if ! mkdir -p "$folder" 2>/dev/null; then
      as_root mkdir -p "$folder" && as_root chown "$(id -u):$(id -g)" "$folder"
    fi
    # It stays, must not keep the lock, and must outlive what ends a session: see attempt.
    (trap '' HUP && gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 \
      --metadata-cache-negative-ttl-secs=0 "$bucket" "$folder" 9>&-) ||
      die "gs://$bucket cannot be mounted: does it exist, and may this machine's service account use it?"
  fi
  status=0
  said=$(within mktemp "$folder/.sync_jax-XXXXXX" 2>&1) || status=$?
  case $status in
    0) within rm -f "$said" ;;
    137) die "gs://$bucket, mounted at $folder, does not answer within $limit s" ;;
    *) die "gs://$bucket cannot be written (${said##*: }): give this machine's service account the role Storage Object User" ;;
  esac
}

install_gcsfuse() {
  local file=gcsfuse_${gcsfuse}_amd64.deb
  echo "Installing gcsfuse $gcsfuse"
  if ! curl -fsSL -o "$state/$file" \
    "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$gcsfuse/$file" ||
    ! as_root apt-get -o DPkg::Lock::Timeout=300 install -qq -y "./$state/$file" >/dev/null; then
    die "gcsfuse cannot be installed; put it on PATH, see Cloud Storage FUSE's documentation"
  fi
}

identity() { # of an installation: what it was made from
  echo "$1 $(cd sync_jax && cat setup.cfg pyproject.toml constraints.txt launch/venv.sh launch/host.sh | cksum)"
}

setup() { # EXTRA [BUCKET:FOLDER]...
  local extra=$1 mount interpreter
  shift
  take_lock
  rm -f $state/ready
  whole
  for mount; do mount_bucket "$mount"; done
  interpreter=$(find_python) || die "uv cannot bring Python $python"
  PYTHON=$interpreter sh sync_jax/launch/venv.sh "$extra" 9>&- ||
    die "the packages cannot be installed"
  # Last: an installation that failed half-way is never run.
  identity "$extra" >$state/ready.new
  mv $state/ready.new $state/ready
  echo "worker $worker: ready"
}

run() { # [BUCKET:FOLDER]... -- ARG...
  local extra mount argument folder held mounted=() workdir=
  trap 'rm -f sync_jax.env' EXIT # also where the run is refused
  take_lock
  whole
  extra=$(cut -d' ' -f1 $state/ready 2>/dev/null || true)
  [ -n "$extra" ] && [ "$(<$state/ready)" = "$(identity "$extra")" ] ||
    die "not set up, or not for this code: setup does it"
  while [ "$1" != -- ]; do
    mount=$1 folder=${1#*:}
    shift
    mount_bucket "$mount"
    mounted+=("$folder")
    for argument; do # workers that all prepared the data at once would write over one another
      case $argument in
        --config.data.data_dir="$folder" | --config.data.data_dir="$folder"/*)
          [ -n "$(within ls -A "${argument#*=}" 2>/dev/null)" ] ||
            die "${argument#*=} is empty: prepare the data once and copy it there, see launch/README.md"
          ;;
      esac
    done
  done
  shift
  for argument; do
    case $argument in --workdir=*) workdir=${argument#*=} ;; esac
  done
  printf '%s\n' "$workdir" >$state/workdir
  rm -f $state/exit $state/asked $state/env
  if [ -f sync_jax.env ]; then mv sync_jax.env $state/env; fi
  # A shutdown's TERM has gcsfuse unmount what nobody uses. The run inherits these, until its log is copied.
  for folder in "${mounted[@]}"; do
    # shellcheck disable=SC2034 # a number that nobody needs
    exec {held}<"$folder"
  done
  # By it stop knows this run's processes again, whatever became of their parents or numbers.
  id=$(cat /proc/sys/kernel/random/uuid)
  printf '%s\n' "$id" >$state/run
  echo "=== $(date -u +%Y-%m-%dT%H:%M:%SZ) starts" >>$state/log
  JAX_PLATFORMS=${JAX_PLATFORMS:-$extra,cpu} SYNC_JAX_RUN=$id \
    setsid bash "$script" attempt "$@" </dev/null >>$state/log 2>&1 &
  for _ in $(seq 200); do
    [ "$(wc -l <$state/run)" = 2 ] || [ -f $state/exit ] && break
    sleep 0.05
  done
  echo "worker $worker: started"
}

# The run's own session. At a preemption the system sends TERM to all in it: to the run it means save, here
# that it was asked. And at once HUP to all that a login left behind (systemd's sessions have
# SendSIGHUP), which the run inherits as ignored.
attempt() {
  trap ': >$state/asked' TERM INT
  trap '' HUP
  watch_trainer "$@" &
  while kill -0 $! 2>/dev/null; do wait $! || true; done
}

watch_trainer() { # and notes how it ended
  local status=0 trainer
  if [ -f $state/env ]; then
    while IFS= read -r line; do export "${line?}"; done <$state/env
    rm $state/env # the next run brings its own
  fi
  # Not ignored yet, which the trainer would inherit.
  trap : TERM INT
  # JAX_PLATFORMS names the accelerator: without, a chip that is locked means a run on the CPU.
  (cd sync_jax && exec .venv/bin/python -u -m sync_jax.main "$@") &
  trainer=$!
  # Ignored, not handled: bash's wait may lose the status of what ends as a handled signal comes.
  trap '' TERM INT
  echo $trainer >>$state/run
  wait $trainer || status=$?
  echo "=== $(date -u +%Y-%m-%dT%H:%M:%SZ) ended with exit status $status"
  keep_log || true
  echo $status >$state/exit.new
  mv $state/exit.new $state/exit
}

keep_log() { # in the workdir: a machine that is gone has no logs
  local folder
  folder=$(<$state/workdir)
  [ -n "$folder" ] || return 0
  folder=$(from_home "$folder")
  # Not -p: where the workdir is gone, it is not made.
  within mkdir "$folder/logs" 2>/dev/null || [ $? != 137 ] || return 0
  within cp $state/log "$folder/logs/worker-$worker.log" 2>/dev/null
}

from_home() { # the run's working directory is sync_jax
  case $1 in
    /*) echo "$1" ;;
    *) echo "sync_jax/$1" ;;
  esac
}

ours() { # the recorded run's processes, its parent among them
  local id='' file
  if [ -f $state/run ]; then read -r id <$state/run || true; fi
  [ -n "$id" ] || return 0
  { grep -lzsxF "SYNC_JAX_RUN=$id" /proc/[0-9]*/environ || true; } |
    while IFS=/ read -r _ _ file _; do echo "$file"; done
}

is_ours() { # not by grep -q, which ends at once: what still writes to it fails then, and so does the pipe
  case $'\n'$(ours)$'\n' in *$'\n'"${1:-none}"$'\n'*) ;; *) return 1 ;; esac
}

status() { # [WORKDIR]
  local word exit=- step=0 folder listed name found=0 mount=
  folder=${1:-}
  if [ -z "$folder" ] && [ -f $state/workdir ]; then folder=$(<$state/workdir); fi
  if [ -n "$(ours)" ] && [ ! -f $state/exit ]; then
    word=running
    [ "$folder" = "$(<$state/workdir)" ] || word=other
  elif [ -f $state/exit ]; then
    word=exited exit=$(<$state/exit)
  elif [ -f $state/run ]; then
    word=lost # killed, or the machine was restarted under it
  elif [ -f $state/ready ]; then
    word=ready
  else
    word=new
  fi
  listed=$(LC_ALL=C within ls "$(from_home "$folder")/checkpoints" 2>&1) || found=$?
  case $found:$listed in
    0:*)
      for name in $listed; do
        case $name in
          *[!0-9]*) ;; # being written, or put aside
          *) if [ "$name" -gt "$step" ]; then step=$name; fi ;;
        esac
      done
      ;;
    137:*) mount=' mount=hangs' ;;
    *"endpoint is not connected"*) mount=' mount=dead' ;;
  esac
  echo "worker=$worker state=$word exit=$exit step=$step$mount"
}

logs() { # LINES [follow]
  [ -f $state/log ] || die "no log yet"
  tail -n "$1" ${2:+-F} $state/log | sed -u "s/^/[worker $worker] /"
}

stop() { # SECONDS
  local end trainer
  if [ -n "$(ours)" ]; then
    trainer=$(sed -n 2p $state/run)
    # Once: the trainer takes a second for an order to end at once, though it is saving.
    if is_ours "$trainer" && [ ! -e $state/asked ]; then
      : >$state/asked
      kill -TERM "$trainer" 2>/dev/null || true
    fi
    end=$((SECONDS + $1))
    while [ -n "$(ours)" ] && [ $SECONDS -lt $end ]; do sleep "$poll"; done
    if is_ours "$trainer"; then # first it alone, so that its end is noted
      kill -KILL "$trainer" 2>/dev/null || true
      sleep "$poll"
    fi
    # shellcheck disable=SC2046 # numbers
    kill -KILL $(ours) 2>/dev/null || true
    for _ in $(seq 20); do
      [ -n "$(ours)" ] || break
      sleep "$poll"
    done
    [ -z "$(ours)" ] || die "process $(ours | tr '\n' ' ')does not end"
  fi
  rm -f sync_jax.env $state/env
  if [ -e "$lock_file" ]; then unlock; fi
  echo "worker $worker: stopped"
}

holders() { # processes that have the accelerator open
  local device tests=()
  set -f
  for device in $devices; do tests+=(-o -lname "$device"); done
  set +f
  # Processes end while find looks: its status says nothing.
  { as_root find /proc/[0-9]*/fd "(" -false "${tests[@]}" ")" -print 2>/dev/null || true; } |
    cut -d/ -f3 | sort -un | tr '\n' ' '
}

unlock() {
  local found
  if [ ! -e "$lock_file" ]; then
    echo "worker $worker: no lock of libtpu here"
    return
  fi
  as_root true || die "only root sees who holds the accelerator: $lock_file is left"
  found=$(holders)
  [ -z "$found" ] || die "process ${found% } holds the accelerator: $lock_file is left"
  as_root rm -f "$lock_file"
  echo "worker $worker: removed a stale $lock_file"
}

verb=${1:-}
case $verb in
  unpack | setup | run | attempt | status | logs | stop | unlock) ;;
  *)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$script"
    exit 2
    ;;
esac
shift
"$verb" "$@"
