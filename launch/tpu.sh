#!/usr/bin/env bash
# From a laptop to a Cloud TPU slice: creates the machine, installs, runs, watches, deletes.
#   usage: launch/tpu.sh VERB --name=N --project=P --zone=Z [OPTION...] [-- --config.x=y...]
#   create     requests the machine and waits for it
#   setup      push, then Python, the pinned packages and the bucket's mount on every host
#   push       copies the code
#   run        starts the run on every host; it goes on when the laptop sleeps
#   logs       the last 100 lines of every worker; --follow: and what comes
#   status     machine, and run on every worker
#   stop       SIGTERM, which saves; SIGKILL after --grace seconds
#   unlock     removes a stale lock of libtpu, if nobody holds the accelerator
#   delete     the machine, never the workdir
#   supervise  all of it: creates, sets up, runs, and does so again after preemptions and failures
#   --name=N --project=P --zone=Z   which machine
#   --type=T                   as v2-8, v4-32, v5litepod-16, v5p-8, v6e-64 (create, supervise)
#   --version=auto             the runtime; auto: the one for the type
#   --spot                     cheaper, and may be taken away at any time; a queued resource
#   --valid-until=6h           how long the request may wait; a queued resource
#   --workdir=gs://BUCKET/DIR  where the run saves and resumes, or a path that all hosts mount
#   --config=FILE              of the trainer; after -- come more of its options
#   --env=NAME                 passes a variable on; repeatable; its value is shown nowhere
#   --preemptions=100 --failures=3  what supervise puts up with
#   --grace=120                for stop
#   --dry-run                  prints every command instead
#   --yes                      asks nothing
# SYNC_JAX_POLL=60, in the environment: seconds between looks; SYNC_JAX_PATIENCE=15: how many looks in a
# row may find no answer, or a machine that is neither in the queue nor ready; SYNC_JAX_TIMEOUT=300:
# seconds that create and supervise wait for each answer, and SYNC_JAX_LONG_TIMEOUT=1800 for each copy,
# installation, start, creation and deletion; SYNC_JAX_PUSH_MB=100: as much is copied.
# Exit status: 0 done, 2 bad usage or no account, 75 preempted and saved, 1 anything else.
set -uo pipefail
self=launch/tpu.sh
verbs='create setup push run logs status stop unlock delete supervise'
extra=tpu
creates=1
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' project='' zone='' type='' version=auto spot=0 valid_until=''
machine='' detail='' queued='' words='' expected=1 listed_spot=''

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

option() {
  case $1 in
    --name=?*) name=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --version=?*) version=${1#*=} ;;
    --spot) spot=1 ;;
    --valid-until=?*) valid_until=${1#*=} ;;
    *) return 1 ;;
  esac
}

check() {
  local option
  for option in name project zone; do
    [ -n "${!option}" ] || die 2 "--$option is missing"
    case ${!option} in
      [!a-z]* | *[!a-z0-9:.-]*) die 2 "--$option=${!option} is none: small letters, digits and hyphens" ;;
    esac
  done
  case $verb in
    create | supervise) [ -n "$type" ] || die 2 "--type is missing; for example --type=v5litepod-16" ;;
  esac
  [[ $valid_until =~ ^([0-9]+[smhd])*$ ]] || die 2 "--valid-until=$valid_until is no duration such as 6h or 1d12h"
  case $workdir in
    '' | gs://* | /*) ;;
    *) die 2 "--workdir=$workdir would lie on each host's own disk and go with it; say gs://BUCKET/PATH" ;;
  esac
  [ -z "$type" ] || describe_type
}

describe_type() { # sets runtime and words, its size
  local size=${type##*-} generation=${type%-*} chips per_host
  case $type in
    *-*[!0-9]* | *-) size='' ;;
  esac
  runtime=$version chips=0 per_host=4
  case $generation in # the number counts cores up to v3, and in v4 and v5p, chips in v5e and v6e
    v2 | v3 | v4) runtime=tpu-ubuntu2204-base chips=$((${size:-0} / 2)) ;;
    v5p) runtime=v2-alpha-tpuv5 chips=$((${size:-0} / 2)) ;;
    v5litepod) runtime=v2-alpha-tpuv5-lite chips=${size:-0} ;;
    v6e) runtime=v2-alpha-tpuv6e chips=${size:-0} ;;
  esac
  case $generation-$chips in
    v5litepod-8 | v6e-8) per_host=8 ;;
  esac
  if [ "$version" != auto ]; then
    runtime=$version
  elif [ "$chips" = 0 ]; then
    die 2 "--type=$type is not known here: v2-8, v3-8, v4-8, v5litepod-4, v5p-8, v6e-4 and larger are; or say --version"
  fi
  if [ "$chips" -gt 0 ]; then
    expected=$(((chips + per_host - 1) / per_host))
    words=", chips: $chips, hosts: $expected"
  fi
}

seconds() { # of a duration
  local rest=$1 number sum=0
  while [ -n "$rest" ]; do
    number=${rest%%[smhd]*}
    case ${rest:${#number}:1} in
      s) sum=$((sum + 10#$number)) ;;
      m) sum=$((sum + 10#$number * 60)) ;;
      h) sum=$((sum + 10#$number * 3600)) ;;
      d) sum=$((sum + 10#$number * 86400)) ;;
    esac
    rest=${rest:$((${#number} + 1))}
  done
  echo "$sum"
}

account() {
  command -v gcloud >/dev/null || die 2 "there is no gcloud here: install the Google Cloud CLI"
  [ -n "$(gcloud auth list --filter=status:ACTIVE '--format=value(account)' 2>/dev/null)" ] ||
    die 2 "gcloud has no account: gcloud auth login"
  case $verb in
    create) [ $expected = 1 ] || check_key ;; # one host: ssh may ask
    supervise) check_key ;;
  esac
}

# A passphrase that nobody enters holds up every command for ever; and where an agent has keys but not
# this one, gcloud refuses a slice of several hosts.
check_key() {
  local key=$HOME/.ssh/google_compute_engine print agent='' secret=0
  if [ -f "$key" ]; then
    print=$(ssh-keygen -lf "$key" 2>/dev/null | cut -d' ' -f2)
    ssh-keygen -y -P '' -f "$key" >/dev/null 2>&1 || secret=1
  fi # else gcloud makes one, without a passphrase
  agent=$(ssh-add -l 2>/dev/null) || agent=''
  case $agent in *"${print:-no such print}"*) return ;; esac
  [ $secret = 0 ] || die 2 "$key has a passphrase, and no ssh agent holds it: ssh-add $key"
  [ -z "$agent" ] || [ $expected = 1 ] ||
    die 2 "the ssh agent holds other keys, but not gcloud's: gcloud compute config-ssh; ssh-add $key"
}

wants_queue() { [ $spot = 1 ] || [ -n "$valid_until" ]; }

tpus() { # GROUP VERB ARG...
  local group=$1 action=$2
  shift 2
  do_ gcloud compute tpus "$group" "$action" "$@" --project="$project" --zone="$zone"
}

# --quiet: what gcloud asks for at night, such as a passphrase for the key that it makes, nobody answers.
# A host that no longer answers, as after the laptop has slept, is noticed.
on_hosts() {
  tpus tpu-vm ssh "$name" --worker=all --quiet --ssh-flag=-oConnectTimeout=20 \
    --ssh-flag=-oServerAliveInterval=30 --command="$1" </dev/null
}
copy() {
  tpus tpu-vm scp "$1" "$name:" --worker=all --quiet --scp-flag=-oConnectTimeout=20 \
    --scp-flag=-oServerAliveInterval=30 </dev/null
}

# What look asks for, separated by tabs: why a request failed is a sentence. The SDK too lists types without their path.
requests='--format=value(name.basename(),state.state,createTime,tpu.nodeSpec[0].node.acceleratorType.basename(),state.failedData.error.message)'
nodes='--format=value(name.basename(),state,networkEndpoints.len(),acceleratorType.basename(),schedulingConfig.spot)'
fields() { # LINES; sets field: of our line, among others, what follows the name
  local line
  field=()
  while IFS= read -r line; do
    case $line in "$name"$'\t'*) ;; *) continue ;; esac
    while :; do
      case $line in *$'\t'*) line=${line#*$'\t'} ;; *) break ;; esac
      field+=("${line%%$'\t'*}")
    done
  done <<<"$1"
}

epoch() { # of a time such as 2026-01-31T23:59:59.123Z; date(1) differs on macOS
  local year month
  [[ $1 =~ ^([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2}) ]] || return 1
  set -- "${BASH_REMATCH[@]}"
  # March comes first, so that a leap year's day is the last.
  month=$(((10#$3 + 9) % 12)) year=$((10#$2 - (10#$3 < 3)))
  echo $(((365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + 10#$4 - 719469) * 86400 \
    + 10#$5 * 3600 + 10#$6 * 60 + 10#$7))
}

# Whether a request that failed had waited its time, by when it was made, which also another call of supervise
# knows; the clocks may differ a little.
is_expired() { # CREATED
  local made
  [ -n "$valid_until" ] && made=$(epoch "$1") || return 1
  [ $((($(date +%s) - made) * 20)) -ge $(($(seconds "$valid_until") * 19)) ]
}

look() {
  local listed state reason count node created kind
  machine=unknown
  if [ $dry = 1 ]; then
    tpus queued-resources list "$requests"
    tpus tpu-vm list "$nodes"
    return
  fi
  if ! within "$timeout" quietly tpus queued-resources list "$requests" ||
    ! listed=$(<"$answer") || ! within "$timeout" quietly tpus tpu-vm list "$nodes"; then
    detail=$(grep -v '^$' "$chatter" | tail -n 1)
    return 1
  fi
  fields "$listed"
  queued=${field[0]:-} created=${field[1]:-} kind=${field[2]:-} reason=${field[3]:-}
  fields "$(<"$answer")"
  node=${field[0]:-} count=${field[1]:-} kind=${field[2]:-$kind} listed_spot=${field[3]:-}
  case $queued in
    ACTIVE) state=${node:-LOST} ;;
    ?*) state=$queued ;;
    *) state=$node ;;
  esac
  case $state in
    '') machine=gone ;;
    READY) machine=ready hosts=${count:-1} ;;
    ACCEPTED | WAITING_FOR_RESOURCES) machine=waiting ;;
    # A request is not served again once suspended, and a spot machine cannot be restarted.
    SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | LOST) machine=gone ;;
    FAILED)
      machine=refused
      if [ -z "$node" ] && is_expired "$created"; then machine=expired; fi
      ;;
    *) machine=between ;; # PROVISIONING, CREATING, REPAIRING, UNKNOWN, STOPPED, DELETING ...
  esac
  state=$state${reason:+ ($reason)}
  if [ "$state" != "$detail" ] && [ -n "$state" ]; then say "machine $name: $state"; fi
  detail=$state
  case $verb:${kind:-$type} in
    supervise:"$type") ;;
    supervise:*) leave 2 "there is a machine $name already, and it is a $kind: say --type=$kind, another --name, or delete it" ;;
  esac
}

look_for_hosts() {
  look
  [ $dry = 1 ] || [ $machine = ready ] || die 1 "there is no machine $name that is ready${detail:+: $detail}"
}

goes_with_machine() {
  case $workdir in /*) ;; *) return 1 ;; esac
  [ $spot = 1 ] || [ "$listed_spot" = True ] || [ "$expected" -gt 1 ] || [ "$hosts" -gt 1 ]
}

create() {
  local options=()
  if wants_queue; then
    if [ $spot = 1 ]; then options+=(--spot); fi
    if [ -n "$valid_until" ]; then options+=("--valid-until-duration=$valid_until"); fi
    within "$long" tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
      --runtime-version="$runtime" "${options[@]}"
  else
    within "$long" tpus tpu-vm create "$name" --accelerator-type="$type" --version="$runtime"
  fi
}

remove() {
  if [ $dry = 1 ]; then queued=$(wants_queue && echo 1); fi
  if [ -n "$queued" ]; then
    within "$long" tpus queued-resources delete "$name" --force --quiet
  else
    within "$long" tpus tpu-vm delete "$name" --quiet
  fi
}

create_and_wait() {
  confirm "Create it"
  if [ $dry = 0 ]; then
    owed=1
    trap 'leave 1 "no longer waited for: what was requested may still come"' INT TERM HUP
    look || die 1 "it cannot be looked up, so nothing is created: $detail"
    [ $machine = gone ] && [ -z "$detail" ] || die 1 "there is a machine $name already: $detail"
  fi
  create || die 1 "it could not be created"
  note "until it is READY:"
  missed=0 between=0
  look
  while [ $dry = 0 ] && [ $machine != ready ]; do
    case $machine:$detail in
      gone: | gone:LOST) machine=unknown ;; # not listed yet
      expired:*) leave 1 "it was not served within $valid_until: $detail; delete the request" ;;
      gone:* | refused:*) leave 1 "it will not come: $detail; delete the request" ;;
    esac
    linger
    pause
    look
  done
  if [ $dry = 1 ]; then farewell | comment; fi
}

delete() {
  # Without knowing whether there is a request, its machine alone would be deleted.
  look || die 1 "it cannot be looked up, so nothing is deleted: $detail"
  if [ $dry = 0 ] && [ $machine = gone ] && [ -z "$detail" ]; then
    say "there is no machine $name"
    return
  fi
  confirm "Delete it"
  remove
}

plan() {
  echo "machine   $name${type:+: $type$words}"
  if [ -n "$type" ]; then
    echo "  runtime   $runtime"
    if [ $spot = 1 ]; then
      echo "  price     spot: may be taken away at any time"
    else
      echo "  price     on demand: paid until it is deleted"
    fi
    [ -z "$valid_until" ] || echo "  waits     at most $valid_until for it"
  fi
  echo "  where     project $project, zone $zone"
  echo "  delete    $(farewell_command)"
}

farewell_command() { quote "$self" delete --name="$name" --project="$project" --zone="$zone"; }

farewell() {
  echo "It costs money until it is deleted:"
  echo "  $(farewell_command)"
}

main "$@"
