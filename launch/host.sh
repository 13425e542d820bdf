#!/usr/bin/env bash
# What runs on the machine that trains. tpu.sh and gpu.sh call it there, on every host of a slice alike; its
# place is the home folder: the code in sync_jax/, what it must remember in .sync_jax/.
#   unpack                             sync_jax.tar.gz into sync_jax/; what an earlier one left there goes
#   setup EXTRA [BUCKET:FOLDER]...     Python, the pinned packages (EXTRA: tpu or cuda), the mounts
#   run [lasting] [BUCKET:FOLDER]... -- ARG...
#                                      starts python -m sync_jax.main ARG..., detached, unless that runs
#                                      already; sync_jax.env, with lines NAME=value, is for its environment,
#                                      and goes; lasting: no workdir on a disk that goes with the machine
#   status [WORKDIR]                   one line: worker, state, exit status, step of the last checkpoint
#   logs LINES [follow]                the log, each line after the worker's number
#   stop SECONDS                       TERM to the run, once; KILL after so long; a setup is ended at once
#   unlock                             removes libtpu's lock, if nobody holds the accelerator
set -euo pipefail
script=$(cd "$(dirname "$0")" && pwd)/${0##*/}
cd # names below are relative to it

state=.sync_jax
# Pinned, as constraints.txt pins what they install; this Python is the one that the tests run on.
uv=0.13.9 python=3.11 gcsfuse=3.2.0
# Tests have neither the file nor the devices.
lock_file=${SYNC_JAX_LIBTPU_LOCK:-/tmp/libtpu_lockfile}
# Every user's the same; where others can make files, but none can replace another's. The system sweeps /tmp.
if [ -k /run/lock ]; then machine_lock=/run/lock/sync_jax; else machine_lock=/tmp/sync_jax.lock; fi
machine_lock=${SYNC_JAX_LOCK:-$machine_lock}
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

open_lock() { # for reading, which every user may
  if [ ! -e "$machine_lock" ] && [ ! -L "$machine_lock" ]; then
    (umask 022 && set -C && : >"$machine_lock") 2>/dev/null || true # not through a link made meanwhile
  fi
  # A link may lead anywhere, and who opens a pipe waits.
  [ -f "$machine_lock" ] && [ ! -L "$machine_lock" ] && [ -r "$machine_lock" ] ||
    die "$machine_lock, by which users share this machine, is no file that all may read: remove it"
  exec 9<"$machine_lock"
}

held() { # whether anybody has the lock; two that ask do not see each other
  open_lock
  if flock -s -n 9; then
    exec 9<&-
    return 1
  fi
  exec 9<&-
}

theirs() { # whether somebody else has it
  local try
  for try in {1..15}; do # who has just taken it is noted in a moment, or on a busy machine in some
    held && [ -z "$(ours)$(at_work)" ] || return 1
    [ "$try" = 15 ] || sleep 0.2
  done
}

holder() { # whose processes of this script may have it: others' open files only root sees
  local file words user users='' me
  me=$(id -un)
  for file in /proc/[0-9]*/cmdline; do
    { mapfile -d '' -t words <"$file"; } 2>/dev/null || continue
    case ${words[1]:-}:${words[2]:-} in
      *host.sh:attempt | *host.sh:setup | *host.sh:run | *sync_jax.unpack.*:unpack) ;;
      *) continue ;;
    esac
    user=$(stat -c %U "${file%/cmdline}" 2>/dev/null) || continue
    if [ "$user" != "$me" ]; then users=$users$user$'\n'; fi
  done
  users=$(sort -u <<<"${users%$'\n'}")
  echo "${users//$'\n'/,}"
}

# One run per machine, nor new code or packages under one. The run inherits the lock, and with it all
# that it starts: the machine is free when the last of them is gone. What wants the lock begins anew with
# a mark in its environment, which all that it starts inherits: by it stop finds what hangs.
take_lock() { # VERB ARG...
  local busy tries=0
  if [ -z "${SYNC_JAX_TASK:-}" ]; then # before it has the lock: who finds it held finds who has it
    SYNC_JAX_TASK=$(cat /proc/sys/kernel/random/uuid) exec bash "$script" "$@"
  fi
  mkdir -p $state
  open_lock
  until flock -w 0.5 9; do
    busy=$(at_work) # before is_up: a start that ends between the two is up
    if is_up; then
      # gcloud runs again what lost its connection; and two may watch one run.
      if [ "$1" = run ] && is_recorded "$@"; then
        echo "worker $worker: already running"
        exit 0
      fi
    elif [ "$1" = run ] && [ -n "$busy" ] && is_recorded "$@"; then # on its start
      continue
    # Who looks has it for a moment. Who has just taken it is noted in one, and who has noted its end lets
    # go of it in one, or on a busy machine in some.
    elif [ $((tries += 1)) -lt 6 ]; then
      continue
    fi
    exec 9<&-
    if [ -z "$busy$(ours)" ] && theirs; then die "$(whose) goes on here; only they or root can end it"; fi
    die "a run, or its setup, is going on here; stop ends it"
  done
  [ "$(stat -c %d:%i "$machine_lock")" = "$(stat -L -c %d:%i /proc/self/fd/9)" ] ||
    die "$machine_lock was replaced just now: try again"
  if [ "$1" = run ]; then record_arguments "$@"; fi
  printf '%s\n' "$SYNC_JAX_TASK" >$state/task
}

whose() {
  local user
  user=$(holder)
  echo "a run of ${user:-another user, or of another home folder,}"
}

record_arguments() { # [WORD]... -- ARG...
  trainers "$@" >$state/arguments.new
  mv $state/arguments.new $state/arguments
}

is_recorded() { cmp -s $state/arguments <(trainers "$@"); } # [WORD]... -- ARG...

trainers() { # its part of a command line
  while [ "$1" != -- ]; do shift; done
  printf '%s\0' "$@"
}

is_up() { [ ! -f $state/exit ] && is_ours "$(sed -n 2p $state/run 2>/dev/null)"; }

whole() { # whether there is code, all of one version
  [ -f sync_jax/setup.cfg ] || die "no code here: push brings it"
  [ ! -e $state/unpacking ] || die "the code here is a part of what was pushed: push it again"
}

unpack() {
  local archive=$state/pushed.tar.gz # not the name under which another may begin to copy meanwhile
  case $script in */sync_jax.unpack.*) trap 'rm -f "$script"' EXIT ;; esac
  take_lock unpack
  if [ -e sync_jax.tar.gz ]; then mv sync_jax.tar.gz "$archive"; fi
  # To its end: one that was cut off on the way here would leave a mixture of two versions.
  tar --quoting-style=literal -tzf "$archive" >$state/listed ||
    die "sync_jax.tar.gz is not whole: push it again"
  grep -v '/$' $state/listed >$state/files.new
  : >$state/unpacking # as long as it is there, no run starts
  mkdir -p sync_jax/launch
  # Only what an earlier archive brought is removed: runs and data may lie there too.
  if [ -f $state/files ]; then
    sort $state/files.new | comm -13 - <(sort $state/files) |
      while IFS= read -r file; do rm -f -- "sync_jax/$file"; done
  fi
  tar -xzf "$archive" -C sync_jax --anchored --exclude=launch/host.sh
  # By renaming: who asks how a run stands calls it meanwhile, and tar would remove it first.
  tar -xzOf "$archive" launch/host.sh >sync_jax/launch/host.sh.new
  chmod +x sync_jax/launch/host.sh.new
  mv sync_jax/launch/host.sh.new sync_jax/launch/host.sh
  mv $state/files.new $state/files
  rm -f $state/listed $state/unpacking "$archive"
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
    # It stays, must not keep the lock, and must outlive what ends a session, see attempt, or a setup.
    (unset SYNC_JAX_TASK && trap '' HUP && gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 \
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
  if ! curl -fsSL --connect-timeout 20 --max-time 600 -o "$state/$file" \
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
  take_lock setup "$@"
  shift
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

# What no second try mends, noted as the trainer's own refusals are: supervise ends there.
refuse() {
  rm -f $state/run
  printf '%s\n' "$workdir" >$state/workdir
  echo "=== $(date -u +%Y-%m-%dT%H:%M:%SZ) refused: $*" >>$state/log
  echo 2 >$state/exit
  echo "worker $worker: $*" >&2
  exit 2
}

check_prepared() { # FOLDER, in a bucket
  local said status=0
  said=$(LC_ALL=C within ls -A "$1" 2>&1) || status=$?
  case $status:$said in
    0:?*) ;;
    0: | *"No such file or directory")
      refuse "$1 is empty: prepare the data once and copy it there, see launch/README.md"
      ;;
    *) die "$1 cannot be listed: ${said:-no answer within $limit s}" ;; # which may pass
  esac
}

check_lasting() { # WORKDIR
  local place=$1 type='' status
  # Where it is to be made, what it will lie in.
  while :; do
    status=0
    type=$(within stat -f -c %T "${place:-/}" 2>/dev/null) || status=$?
    case $status:$place in 0:* | 137:* | *:) break ;; esac
    place=${place%/*}
  done
  case $type in
    ext* | xfs | btrfs | zfs | f2fs | jfs | reiserfs | tmpfs | ramfs | overlayfs)
      refuse "--workdir=$1 lies on this host's own disk ($type), which no other host sees and which goes with it; say gs://BUCKET/PATH, or a path that all hosts mount"
      ;;
  esac
}

run() { # [lasting] [BUCKET:FOLDER]... -- ARG...
  local extra mount argument folder held lasting=0 mounted=() workdir=
  trap 'rm -f sync_jax.env' EXIT # also where the run is refused
  take_lock run "$@"
  whole
  extra=$(cut -d' ' -f1 $state/ready 2>/dev/null || true)
  [ -n "$extra" ] && [ "$(<$state/ready)" = "$(identity "$extra")" ] ||
    die "not set up, or not for this code: setup does it"
  for argument; do
    case $argument in --workdir=*) workdir=${argument#*=} ;; esac
  done
  if [ "$1" = lasting ]; then
    lasting=1
    shift
  fi
  while [ "$1" != -- ]; do
    mount=$1 folder=${1#*:}
    shift
    mount_bucket "$mount"
    mounted+=("$folder")
    for argument; do # workers that all prepared the data at once would write over one another
      case $argument in
        --config.data.data_dir="$folder" | --config.data.data_dir="$folder"/*)
          check_prepared "${argument#*=}"
          ;;
      esac
    done
  done
  if [ $lasting = 1 ]; then check_lasting "$workdir"; fi
  shift
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
  unset SYNC_JAX_TASK # it is no longer on its start
  echo "=== $(date -u +%Y-%m-%dT%H:%M:%SZ) starts" >>$state/log
  JAX_PLATFORMS=${JAX_PLATFORMS:-$extra,cpu} SYNC_JAX_RUN=$id \
    setsid bash "$script" attempt "$@" </dev/null >>$state/log 2>&1 &
  # Until the trainer's number is noted: who looks meanwhile finds a start that is under way.
  while kill -0 $! 2>/dev/null; do
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

# In the workdir: a machine that is gone has no logs. The next one has another name for its own.
keep_log() {
  local folder begun
  begun=$(sed -n '1s/^=== \([0-9TZ:-]*\) .*/\1/p' $state/log | tr -d :-)
  folder=$(<$state/workdir)
  [ -n "$folder" ] || return 0
  folder=$(from_home "$folder")
  # Not -p: where the workdir is gone, it is not made.
  within mkdir "$folder/logs" 2>/dev/null || [ $? != 137 ] || return 0
  within cp $state/log "$folder/logs/worker-$worker-$begun.log" 2>/dev/null
}

from_home() { # the run's working directory is sync_jax
  case $1 in
    /*) echo "$1" ;;
    *) echo "sync_jax/$1" ;;
  esac
}

ours() { marked SYNC_JAX_RUN run; } # the recorded run's processes, its parent among them

at_work() { marked SYNC_JAX_TASK task; } # those of the recorded unpacking, setup or start

marked() { # VARIABLE RECORD
  local id='' file
  if [ -f "$state/$2" ]; then read -r id <"$state/$2" || true; fi
  [ -n "$id" ] || return 0
  { grep -lzsxF "$1=$id" /proc/[0-9]*/environ || true; } |
    while IFS=/ read -r _ _ file _; do echo "$file"; done
}

is_ours() { # not by grep -q, which ends at once: what still writes to it fails then, and so does the pipe
  case $'\n'$(ours)$'\n' in *$'\n'"${1:-none}"$'\n'*) ;; *) return 1 ;; esac
}

stands() { # sets word, exit and user of status
  if theirs; then
    word=other user=$(holder)
    user=" user=${user:-unknown}"
  elif [ -n "$(ours)" ] && [ ! -f $state/exit ]; then
    word=running
    [ "${folder%/}" = "${recorded%/}" ] || word=other
  elif [ -n "$(at_work)" ]; then
    word=busy # unpacking, being set up or on its start
  elif [ "${folder%/}" = "${recorded%/}" ] && [ -f $state/exit ]; then
    word=exited exit=$(<$state/exit)
  elif [ "${folder%/}" = "${recorded%/}" ] && [ -f $state/run ]; then
    word=lost # killed, or the machine was restarted under it
  elif [ -f $state/ready ]; then
    word=ready
  else
    word=new
  fi
}

# What tells how a run stands, but for its processes and `ready`. Whatever begins is noted first.
noted() { (cd $state 2>/dev/null && cat task run workdir exit 2>/dev/null) || true; }

status() { # [WORKDIR]
  local word exit folder step found=0 known=unread listed='' recorded='' mount='' user=''
  # Anew where a run, or its setup, has begun or ended meanwhile: else an earlier run's notes and a later
  # one's processes would be taken together.
  until [ "$known" = "$(noted)" ]; do
    known=$(noted) exit=- user=''
    if [ -f $state/workdir ]; then recorded=$(<$state/workdir); fi
    folder=${1:-$recorded}
    stands
  done
  if [ -n "$folder" ]; then
    # A sweep has its checkpoints in a folder for each run.
    # shellcheck disable=SC2016 # for the other shell
    listed=$(LC_ALL=C within sh -c 'ls "$1/checkpoints" "$1"/*/checkpoints 2>&1' - "$(from_home "$folder")") ||
      found=$?
  fi
  case $found:$listed in
    137:*) mount=' mount=hangs' ;;
    *"endpoint is not connected"*) mount=' mount=dead' ;;
  esac
  step=$(steps <<<"$listed")
  echo "worker=$worker state=$word exit=$exit step=$step$mount$user"
}

steps() { # each run's last, together; names that are no numbers are being written, or put aside
  local line last=0 sum=0
  while IFS= read -r line; do
    case $line in
      *:) sum=$((sum + last)) last=0 ;; # the next run's
      '' | *[!0-9]*) ;;
      *) if [ "$line" -gt "$last" ]; then last=$line; fi ;;
    esac
  done
  echo $((sum + last))
}

logs() { # LINES [follow]
  [ -f $state/log ] || die "no log yet"
  tail -n "$1" ${2:+-F} $state/log | sed -u "s/^/[worker $worker] /"
}

stop() { # SECONDS
  local end trainer
  if [ -n "$(at_work)" ]; then # it has nothing to save
    end_all TERM at_work
    end_all KILL at_work
    [ -z "$(at_work)" ] || die "process $(at_work | tr '\n' ' ')does not end"
  fi
  if [ -n "$(ours)" ]; then
    end=$((SECONDS + $1))
    while :; do
      trainer=$(sed -n 2p $state/run) # anew: it may be noted only now
      # Once: the trainer takes a second for an order to end at once, though it is saving.
      if [ ! -e $state/asked ] && is_ours "$trainer"; then
        : >$state/asked
        kill -TERM "$trainer" 2>/dev/null || true
      fi
      [ -n "$(ours)" ] && [ $SECONDS -lt $end ] || break
      sleep "$poll"
    done
    if is_ours "$trainer"; then # first it alone, so that its end is noted
      kill -KILL "$trainer" 2>/dev/null || true
      end=$((SECONDS + 2 * limit + 5)) # after its log is copied, for which keep_log has so long
      while [ -n "$(ours)" ] && [ ! -f $state/exit ] && [ $SECONDS -lt $end ]; do sleep "$poll"; done
    fi
    end_all KILL ours
    [ -z "$(ours)" ] || die "process $(ours | tr '\n' ' ')does not end"
  fi
  rm -f sync_jax.env $state/env
  if theirs; then die "$(whose) goes on here; only they or root can end it"; fi
  if [ -e "$lock_file" ]; then unlock; fi
  echo "worker $worker: stopped"
}

end_all() { # SIGNAL ours|at_work; and waits a little
  local found
  for _ in $(seq 20); do
    found=$("$2")
    [ -n "$found" ] || break
    # shellcheck disable=SC2086 # numbers
    kill "-$1" $found 2>/dev/null || true # anew: one may have started another meanwhile
    sleep "$poll"
  done
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
