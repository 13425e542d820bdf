#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from a computer with gcloud. It does not watch the run: after a preemption, delete, create,
# setup and run resume it. SkyPilot does that by itself (launch/sky.yaml).
#   usage: launch/tpu.sh VERB --name=N --project=P --zone=Z [OPTION...] [-- --config.x=y...]
#   create   requests the slice and waits until it is there
#   setup    copies the code to every host, installs the pinned packages, mounts the bucket
#   run      starts the trainer on every host; it goes on when this computer sleeps
#   status   shows the slice, and on every host the run and its last checkpoint
#   logs     shows the last 100 lines of every host's log; --follow: and what comes
#   stop     sends SIGTERM, which saves, and SIGKILL after --grace=120 seconds
#   delete   deletes the slice, never the workdir; --yes: does not ask
#   create: --type=v2-8, v4-32, v5litepod-16, v5p-8, v6e-64 or another; --version=V, the runtime, by default that of the type;
#           --spot is cheaper, and may be taken away at any time
#   setup:  --workdir=gs://BUCKET/DIR, where the run saves and resumes, or a path that all hosts share
#   run:    --workdir; --config=FILE, the trainer's, whose other options follow after --; --env=NAME passes a variable on
#           without showing its value, and may be repeated
#   all:    --dry-run prints every command instead
# Exit status: 0 done, 2 bad usage, 1 anything else. Of status: 0 running or done, 75 stopped and saved, 1 anything else.
set -uo pipefail
mounts=${SYNC_JAX_MOUNTS:-/mnt/sync_jax} # where every host mounts the buckets
interval=${SYNC_JAX_POLL:-60}            # seconds between looks at a request
name='' project='' zone='' type='' version='' workdir='' config='' grace=120 spot=0 follow='' yes=0 dry=0
trainer=() buckets=() variables=()

say() { echo "launch/tpu.sh: $*" >&2; }
die() { say "$2" && exit "$1"; } # STATUS MESSAGE
warn_of_own_disk() { say "warning: if $1 is on a host's own disk, what is there is lost with a spot machine"; } # OPTION

# A gs:// address becomes the folder where every host mounts the bucket, because the trainer needs a file system.
locate() { # VALUE; sets place, and adds to buckets
  place=$1
  [ "${1#gs://}" != "$1" ] || return 0
  local bucket=${1#gs://}
  bucket=${bucket%%/*}
  case $bucket in '' | *[!a-z0-9._-]*) die 2 "$1 names no bucket; write gs://BUCKET/DIR" ;; esac
  place=$mounts/${1#gs://}
  case " ${buckets[*]-} " in *" $bucket:"*) ;; *) buckets+=("$bucket:$mounts/$bucket") ;; esac
}

parse() {
  local argument option
  verb=${1:-help}
  [ $# = 0 ] || shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
      --name=?* | --project=?* | --zone=?* | --type=?* | --version=?* | --workdir=?* | --config=?* | --grace=?*)
        option=${1%%=*}
        printf -v "${option#--}" %s "${1#*=}" # sets the variable of that name
        ;;
      --env=?*) variables+=("${1#*=}") ;;
      --spot) spot=1 ;;
      --follow) follow=-F ;;
      --yes) yes=1 ;;
      --dry-run) dry=1 ;;
      *) die 2 "$1 is not an option; launch/tpu.sh help lists them, and the trainer's --config.x=y follow after --" ;;
    esac
    shift
  done
  case $verb in
    create | setup | run | status | logs | stop | delete) ;;
    help | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit ;;
    *) die 2 "$verb is not a verb; choose from create, setup, run, status, logs, stop, delete" ;;
  esac
  for argument in name project zone; do
    [ -n "${!argument}" ] || die 2 "--$argument is missing"
  done
  case $grace in *[!0-9]*) die 2 "--grace=$grace is not a number of seconds" ;; esac
  case $workdir in
    '' | gs://* | "$mounts"/*) ;;
    /*) [ $spot = 0 ] || warn_of_own_disk "--workdir=$workdir" ;;
    *) die 2 "--workdir=$workdir would be on each host's own disk; write gs://BUCKET/DIR or a path that all hosts share" ;;
  esac
  for argument in ${variables[@]+"${variables[@]}"}; do
    declare -p "$argument" >/dev/null 2>&1 || die 2 "--env=NAME takes the name of a variable that is set here"
  done
  if [ "$verb" = run ]; then
    [ -n "$config" ] || die 2 "--config is missing; for example --config=configs/quickstart.py"
    [ -n "$workdir" ] || die 2 "--workdir is missing; write gs://BUCKET/DIR"
  fi
  locate "$workdir"
  workdir=$place
  trainer=("--config=$config" "--workdir=$workdir")
  for argument in "${@:2}"; do # after the --
    case $argument in
      --config=* | --workdir=*) die 2 "$argument belongs before the --" ;;
      --*=gs://*) locate "${argument#*=}" && argument=${argument%%=*}=$place ;;
      --*="$mounts"/*) ;;
      --config.data.data_dir=*) warn_of_own_disk "$argument" ;;
      -*) ;;
      *) die 2 "$argument after -- is not an option of the trainer" ;;
    esac
    trainer+=("$argument")
  done
}

check() { # the options and the config, by the trainer itself, before a machine costs money
  local python message
  if [ -z "$config" ] && [ ${#trainer[@]} = 2 ]; then return; fi
  [ -n "$config" ] || die 2 "--config is missing, without which ${trainer[*]:2} is not checked"
  for python in ${PYTHON:-.venv/bin/python python3}; do
    message=$("$python" -m sync_jax.main "${trainer[@]}" --mode=check 2>&1 >/dev/null) && return
    [ $? != 2 ] || die 2 "$message"
  done
  say "warning: the config is not checked, because sync_jax is not installed here (sh launch/venv.sh)"
}

do_() { # runs a command, or prints it as a shell reads it back
  if [ $dry = 1 ]; then printf '%q ' "$@" && echo; else "$@"; fi
}
tpus() { do_ gcloud compute tpus "$@" --project="$project" --zone="$zone"; } # GROUP ACTION ARG...

# To all hosts at once: a slice of which one host alone runs the trainer waits for the others for ever.
on_hosts() { tpus tpu-vm ssh "$name" --worker=all --quiet --command="$1" </dev/null; }
copy() { tpus tpu-vm scp "$1" "$name:" --worker=all --quiet </dev/null; } # FILE, into the home folders
host() { printf '%q ' bash sync_jax/launch/host.sh "$@"; }                # a command line for the hosts

farewell() {
  printf '%s\n' "The slice costs money until it is deleted:" \
    "  launch/tpu.sh delete --name=$name --project=$project --zone=$zone"
}

create() {
  case $type in
    v[234]-[0-9]*) : "${version:=tpu-ubuntu2204-base}" ;;
    v5litepod-[0-9]*) : "${version:=v2-alpha-tpuv5-lite}" ;;
    v5p-[0-9]*) : "${version:=v2-alpha-tpuv5}" ;;
    v6e-[0-9]*) : "${version:=v2-alpha-tpuv6e}" ;;
    '') die 2 "--type is missing; for example --type=v5litepod-16" ;;
    *) [ -n "$version" ] || die 2 "--type=$type is not known here; say --version too" ;;
  esac
  owed=1 # also when this is interrupted: the slice may come nevertheless
  if [ $spot = 0 ]; then
    tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" || exit 1
    return
  fi
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
    --spot || exit 1
  local state=''
  until [ "$state" = ACTIVE ]; do
    case $state in FAILED | SUSPEND*) die 1 "the request is $state and will not be served: delete it" ;; esac
    [ -z "$state" ] || sleep "$interval"
    state=$(tpus queued-resources describe "$name" --format='value(state.state)') || state=unknown
    if [ $dry = 1 ]; then echo "$state" && return; fi
    say "the request is $state"
  done
}

setup() {
  local archive=sync_jax.tar.gz
  if [ $dry = 1 ]; then
    echo "# packs the files that git tracks or does not ignore into sync_jax.tar.gz"
  else
    archive=$scratch/$archive
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
      COPYFILE_DISABLE=1 tar -czf "$archive" --null -T - || die 1 "$PWD cannot be packed"
  fi
  copy "$archive" || die 1 "the code is not copied to every host"
  on_hosts "rm -rf sync_jax.new && mkdir sync_jax.new && tar -xzf sync_jax.tar.gz -C sync_jax.new && \
bash sync_jax.new/launch/host.sh setup ${buckets[*]-}" || die 1 "not every host is set up"
}

run() {
  local variable file=sync_jax.env
  if [ ${#variables[@]} -gt 0 ]; then # in a file that only its owner can read
    if [ $dry = 1 ]; then
      echo "# writes the values of ${variables[*]} to sync_jax.env"
    else
      file=$scratch/$file
      for variable in "${variables[@]}"; do printf 'export %s=%q\n' "$variable" "${!variable}"; done >"$file"
    fi
    copy "$file" || die 1 "not started; sync_jax.env may be on some hosts until the next run or stop"
  fi
  on_hosts "trap 'rm -f sync_jax.env' EXIT; $(host run "$workdir" ${buckets[@]+"${buckets[@]}"} -- "${trainer[@]}")" ||
    die 1 "not started on every host; status shows where it runs, stop ends it"
}

status() {
  local state lines line code=0
  state=$(tpus tpu-vm describe "$name" --format='value(state)' 2>"$scratch/error") ||
    state="requested: $(tpus queued-resources describe "$name" --format='value(state.state)' 2>/dev/null)" ||
    die 1 "$(cat "$scratch/error")"
  echo "$state"
  [ "$state" = READY ] || [ $dry = 1 ] || exit 1
  lines=$(on_hosts "$(host status)") || die 1 "not every host answers; setup comes before status"
  printf '%s\n' "$lines"
  while read -r line; do
    case $line in
      'worker '*': running;'* | 'worker '*'exit status 0;'*) ;;
      'worker '*'exit status 75;'*) [ $code = 1 ] || code=75 ;;
      'worker '*) code=1 ;;
    esac
  done <<<"$lines"
  exit $code
}

logs() { on_hosts "tail -n 100 $follow .sync_jax/log | sed -u \"s/^/worker \${HOSTNAME##*-w-}: /\""; }

stop() { on_hosts "$(host stop "$grace")" || die 1 "not stopped on every host"; }

delete() {
  local requests answer=y
  # A slice that was requested as spot must be deleted with its request.
  requests=$(tpus queued-resources list --format='value(name.basename())') || die 1 "nothing is deleted"
  if [ $dry = 1 ]; then
    printf '%s\n' "$requests" "# if the list has the name:"
    tpus queued-resources delete "$name" --force --quiet
    echo "# else:"
    tpus tpu-vm delete "$name" --quiet
    return
  fi
  [ $yes = 1 ] || read -rp "Delete $name? Its workdir stays. [y/N] " answer
  [ "$answer" = y ] || die 1 "nothing is deleted"
  if grep -qxF "$name" <<<"$requests"; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

parse "$@"
cd "$(dirname "$0")/.." || exit 1
command -v gcloud >/dev/null || [ $dry = 1 ] || die 2 "there is no gcloud here: install the Google Cloud CLI"
case $verb in create | setup | run) check ;; esac
umask 077
scratch=$(mktemp -d) owed=0
trap 'rm -rf "$scratch"; [ $owed = 0 ] || farewell' EXIT
"$verb"
