#!/usr/bin/env bash
# From a laptop to a GPU server over ssh: installs, runs, watches.
#   usage: launch/gpu.sh VERB --host=USER@SERVER [OPTION...] [-- --config.x=y...]
#   setup      push, then Python, the pinned packages with CUDA, and the mount of a bucket, if any
#   push       copies the code
#   run        starts the run; it goes on when the laptop sleeps
#   logs       the last 100 lines; --follow: and what comes
#   status     the run
#   stop       SIGTERM, which saves; SIGKILL after --grace seconds
#   supervise  all of it, and again after a SIGTERM and after failures
#   --host=USER@SERVER         as for ssh; ports, keys and jumps belong into ~/.ssh/config
#   --workdir=DIR              where the run saves and resumes: a path there, or gs://BUCKET/DIR
#   --config=FILE              of the trainer; after -- come more of its options
#   --env=NAME                 passes a variable on; repeatable; its value is shown nowhere
#   --preemptions=100 --failures=3  what supervise puts up with
#   --grace=120                for stop
#   --dry-run                  prints every command instead
#   --yes                      asks nothing
# SYNC_JAX_POLL=60, in the environment: seconds between looks; SYNC_JAX_PATIENCE=15: how many looks in a
# row may find no answer; SYNC_JAX_TIMEOUT=300: seconds that supervise waits for each, and
# SYNC_JAX_LONG_TIMEOUT=1800 for each copy, installation and start; SYNC_JAX_PUSH_MB=100: as much is copied.
# Exit status: 0 done, 2 bad usage, 75 stopped and saved, 1 anything else.
set -uo pipefail
self=launch/gpu.sh
verbs='setup push run logs status stop supervise'
extra=cuda
creates=0
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

server='' detail='' machine=ready

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

option() {
  case $1 in
    --host=?*) server=${1#*=} ;;
    *) return 1 ;;
  esac
}

check() {
  [ -n "$server" ] || die 2 "--host is missing: USER@SERVER, as for ssh"
  case $server in -* | *[!A-Za-z0-9@:._-]*) die 2 "--host=$server is no name of a server" ;; esac
}

account() { command -v ssh >/dev/null || die 2 "there is no ssh here"; }

# No passwords: what supervise asks for at night nobody answers. A server that no longer answers, as after
# the laptop has slept, is noticed.
options=(-o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=30)
on_hosts() { do_ ssh "${options[@]}" "$server" "$1" </dev/null; }
copy() { do_ scp -q "${options[@]}" "$1" "$server:" </dev/null; }

look() { :; } # it is there; ssh says where not
look_for_hosts() { :; }
goes_with_machine() { return 1; }
create() { :; }
remove() { :; }

plan() { echo "machine   $server"; }

farewell() { echo "$server is left as it is; if you rent it by the hour, end it there."; }

main "$@"
