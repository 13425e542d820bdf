# shellcheck shell=bash disable=SC2154
# What tpu.sh and gpu.sh share: the command line, the plan, and the verbs that need no cloud. Of them it
# wants
#   usage                  prints what the script does
#   option ARG             takes an option of its own, or returns 1
#   check                  refuses what does not fit together
#   account                refuses to begin where nobody is logged in
#   on_hosts COMMAND       runs a shell command on every host; its status is not 0 where one's is not
#   copy FILE              copies a file into every host's home folder
#   look                   sets detail, hosts, their number, and machine: ready; waiting, in a queue;
#                          between, which passes or not; unknown, for nobody answers; gone; or of a
#                          request that was not served: refused, or expired with its --valid-until
#   create, remove         the machine
#   plan                   prints a line for each thing that will be used
#   farewell               prints how to be rid of the machine
#   goes_with_machine      whether a workdir on a host's own disk would be lost or seen by that host alone
# and the variables self, verbs, extra (see setup in host.sh) and creates (1: the machine is ours to
# make). Written for bash 3.2, which macOS has.

repo=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd -P)
# shellcheck source=launch/supervise.sh
. "$repo/launch/supervise.sh"
mounts=${SYNC_JAX_MOUNTS:-/mnt/sync_jax} # where hosts mount buckets, each below by its name
interval=${SYNC_JAX_POLL:-60}            # seconds between looks
patience=${SYNC_JAX_PATIENCE:-15}        # so many looks in a row are given to anything that may pass
timeout=${SYNC_JAX_TIMEOUT:-300}         # seconds for what is answered at once, if at all
long=${SYNC_JAX_LONG_TIMEOUT:-1800}      # for what takes its time: copies, installations, creation, deletion
megabytes=${SYNC_JAX_PUSH_MB:-100}       # that push copies at most, before they are packed

dry=0 yes=0 follow=0 workdir='' config='' grace=120 preemptions=100 failures=3
trainer=() names=() buckets=()
hosts=1 sent=0
waiting='' # the process that is waited for
owed=0     # 1: something may exist that costs money, and the last word is how to be rid of it

die() { # STATUS MESSAGE
  echo "$self: $2" >&2
  exit "$1"
}

quote() { # words, as a line that any shell reads back as the same words
  local word prefix line='' inner="'\\''"
  for word; do
    prefix=''
    case $word in
      --[a-z]*=*)
        prefix=${word%%=*}=
        case $prefix in *[!a-z_.=-]*) prefix='' ;; *) word=${word#*=} ;; esac
        ;;
    esac
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word=\'${word//\'/$inner}\' ;;
    esac
    line="$line $prefix$word"
  done
  printf '%s' "${line# }"
}

do_() { # runs a command, or prints it
  if [ $dry = 1 ]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# What should be answered in time, while nobody watches: its status, or 137 where it had to be killed. Else
# somebody is there, who can end it, and whom ssh may ask for a passphrase, for which it wants the
# terminal. In the background: bash minds a signal only when what is in front of it has ended.
within() { # SECONDS COMMAND...
  local status=0
  case $dry:$verb in
    0:supervise | 0:create) ;;
    *)
      shift
      "$@"
      return
      ;;
  esac
  limited "$@" &
  waiting=$!
  wait $waiting || status=$?
  waiting=''
  return $status
}

limited() { # SECONDS COMMAND..., as a process of its own; macOS has no timeout(1)
  local seconds=$1 status=0 asked='' watch=''
  shift
  trap 'for group in $asked $watch; do kill -KILL -- -$group; done 2>/dev/null; exit 1' INT TERM HUP
  set -m # each in a group of its own, with all that it starts
  "$@" </dev/null &
  asked=$!
  (sleep "$seconds" && kill -KILL -- -$asked) >/dev/null 2>&1 &
  watch=$!
  set +m
  { wait $asked; } 2>/dev/null || status=$?
  kill -KILL -- -$watch 2>/dev/null
  if [ $status != 137 ]; then exit $status; fi
  if [ "$1" = quietly ]; then exec 2>>"$chatter"; fi
  echo "no answer within $seconds s" >&2
  exit 137
}

# Within, not around: what a trap prints meanwhile is for the terminal.
quietly() { "$@" >"$answer" 2>"$chatter"; }

pause() { # between looks
  sleep "$interval" &
  waiting=$!
  wait $waiting
  waiting=''
}

in_folder() ( # FOLDER COMMAND...
  cd "$1" || exit 1
  shift
  "$@"
)

note() { # what a dry run cannot show as a command
  if [ $dry = 1 ]; then echo "# $*"; fi
}

comment() { if [ $dry = 1 ]; then sed 's/^/# /'; else cat; fi; } # a dry run prints a script

say() { echo "$self: $*" >&2; }

# gs://bucket/path as the hosts see it, in $place. The trainer needs a file system for its workdir
# and data: locks, renames, appended lines.
translate() {
  local bucket known
  case $1 in
    gs://*) ;;
    *)
      place=$1
      return
      ;;
  esac
  place=${1#gs://}
  place=${place%/}
  bucket=${place%%/*}
  case $bucket in
    '' | *[!a-z0-9._-]*) die 2 "$1 names no bucket; say gs://BUCKET/PATH" ;;
  esac
  place=$mounts/$place
  for known in ${buckets[@]+"${buckets[@]}"}; do
    if [ "$known" = "$bucket:$mounts/$bucket" ]; then return; fi
  done
  buckets+=("$bucket:$mounts/$bucket")
}

parse() {
  local argument place
  verb=${1:-help}
  [ $# = 0 ] || shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    argument=$1
    shift
    case $argument in
      --workdir=?*) workdir=${argument#*=} ;;
      --config=?*) config=${argument#*=} ;;
      --env=?*) names+=("${argument#*=}") ;;
      --grace=?*) grace=${argument#*=} ;;
      --preemptions=?*) preemptions=${argument#*=} ;;
      --failures=?*) failures=${argument#*=} ;;
      --follow) follow=1 ;;
      --dry-run) dry=1 ;;
      --yes) yes=1 ;;
      --help) verb=help ;;
      --config.*) die 2 "$argument belongs after a --" ;;
      *) option "$argument" || die 2 "$argument is no option; options are --NAME=VALUE, see $self help" ;;
    esac
  done
  case " $verbs help " in
    *" $verb "*) ;;
    *) die 2 "$verb is no verb; choose from $verbs" ;;
  esac
  if [ "$verb" = help ]; then
    usage
    exit 0
  fi
  for argument in "$grace" "$preemptions" "$failures"; do
    case $argument in *[!0-9]*) die 2 "$argument is no number" ;; esac
  done
  for argument in ${names[@]+"${names[@]}"}; do
    case $argument in
      [!A-Za-z_]* | *[!A-Za-z0-9_]*) die 2 "--env=NAME takes the name of a variable, not its value" ;;
    esac
    [ -n "${!argument+set}" ] || die 2 "--env=$argument: there is no such variable here"
    case ${!argument} in *$'\n'*) die 2 "--env=$argument: its value has more than one line" ;; esac
  done
  if [ $# -gt 0 ]; then shift; fi # the --
  case $verb in
    run | supervise)
      [ -n "$config" ] || die 2 "--config is missing; for example --config=configs/quickstart.py"
      # Else the trainer would say so, on a machine that is paid for.
      [ -f "$repo/${config%%:*}" ] || die 2 "--config=$config is no file of this checkout, which is what push copies"
      [ -n "$workdir" ] || die 2 "--workdir is missing: where the run saves and resumes, such as gs://BUCKET/PATH"
      ;;
  esac
  if [ -n "$config" ]; then trainer+=("--config=$config"); fi
  if [ -n "$workdir" ]; then
    translate "$workdir"
    trainer+=("--workdir=$place")
    folder=$place
  else
    folder=''
  fi
  for argument; do
    case $argument in
      --workdir=* | --config=*) die 2 "$argument belongs before the --" ;;
      --*=gs://*)
        translate "${argument#*=}"
        argument=${argument%%=*}=$place
        ;;
      -*) ;;
      *) die 2 "$argument after -- is no option of sync_jax.main" ;;
    esac
    trainer+=("$argument")
  done
  check
}

show_plan() {
  local bucket
  plan
  if [ -n "$config" ]; then
    echo "  runs      python -m sync_jax.main $(quote ${trainer[@]+"${trainer[@]}"})"
  fi
  for bucket in ${buckets[@]+"${buckets[@]}"}; do
    echo "  mounts    gs://${bucket%%:*} at ${bucket#*:}, on every host"
  done
  if [ "$verb" = supervise ]; then
    echo "  goes on   after at most $preemptions preemptions and $failures failures, and 3 restarts without progress"
  fi
}

confirm() { # QUESTION
  local answer=''
  if [ $yes = 1 ]; then return; fi
  if [ $dry = 1 ]; then
    note "asks: $1?"
    return
  fi
  printf '%s? [y/N] ' "$1" >&2
  read -r answer || echo >&2
  case $answer in
    y | Y | yes) ;;
    *) die 1 "nothing was done" ;;
  esac
}

host() { # a command line for host.sh
  quote bash sync_jax/launch/host.sh "$@"
}

list_files() { # FILE: for the names of what push packs, a NUL after each
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do # what git knows may be deleted here
      if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
    done >"$1" || die 1 "$repo is no git checkout"
}

# A dataset that lies in the checkout would go to every host, each time anew.
check_size() { # FILE, of list_files
  local found
  # shellcheck disable=SC2016 # awk's
  found=$(xargs -0 sh -c 'LC_ALL=C find "$@" ! -type d -exec ls -dln {} +' find <"$1" | awk -v limit="$megabytes" '
    {
      name = $0
      for (i = 0; i < 8; i++) sub(/^[^ ]* +/, "", name)
      folder = name
      if (sub(/\/.*/, "", folder)) folder = folder "/"
      total += $5; sizes[folder] += $5
      if ($5 > size) { size = $5; largest = name }
    }
    END {
      if (total <= limit * 1e6) exit
      for (folder in sizes) if (sizes[folder] > sizes[most]) most = folder
      printf "%.0f MB, most of it in %s (%.0f MB; the largest file: %s, %.0f MB)", \
        total / 1e6, most, sizes[most] / 1e6, largest, size / 1e6
    }')
  [ -z "$found" ] ||
    die 2 "to every host would go $found: data belong outside the checkout or into .gitignore; SYNC_JAX_PUSH_MB=$megabytes is the limit"
}

check_push() ( # before a machine is made for it
  cd "$repo" || exit 1
  list_files "$scratch/files"
  check_size "$scratch/files"
)

pack() ( # into $scratch/push
  mkdir -p "$scratch/push" && cd "$repo" || exit 1
  list_files "$scratch/files"
  check_size "$scratch/files"
  # Without macOS's own attributes; it would store them as files.
  COPYFILE_DISABLE=1 tar -czf "$scratch/push/sync_jax.tar.gz" --null -T "$scratch/files"
)

push() {
  local from=.
  note "packs what git tracks or does not ignore into sync_jax.tar.gz"
  if [ $dry = 0 ]; then
    pack || return
    from=$scratch/push
  fi
  # Through a file: a pipe's last command would run, and end well, with half of it or nothing. It has a name
  # of its own: another may push too.
  # shellcheck disable=SC2016 # for the hosts
  {
    within "$long" in_folder "$from" copy sync_jax.tar.gz &&
      within "$long" on_hosts 'tar -xzOf sync_jax.tar.gz launch/host.sh >sync_jax.unpack.$$ && bash sync_jax.unpack.$$ unpack || { rm -f sync_jax.unpack.$$; false; }'
  } || failed_there $?
}

failed_there() { # STATUS: 2 of a tar there is not bad usage here
  [ "$1" = 137 ] || return 1
  return 137
}

send_env() { # in a file: a command line can be read by all on the machine, and stands in logs
  local variable from=. status=0
  [ ${#names[@]} -gt 0 ] || return 0
  note "sync_jax.env: the values of ${names[*]}, for the user's eyes; the run takes it away"
  if [ $dry = 0 ]; then
    from=$scratch/env # which the user alone can read
    mkdir -p "$from" || return
    for variable in "${names[@]}"; do
      printf '%s=%s\n' "$variable" "${!variable}"
    done >"$from/sync_jax.env"
    chmod 600 "$from/sync_jax.env"
  fi
  within "$long" in_folder "$from" copy sync_jax.env || status=$?
  if [ $dry = 0 ]; then rm -f "$from/sync_jax.env"; fi
  return $status
}

setup() {
  push || return
  within "$long" on_hosts "$(host setup "$extra" ${buckets[@]+"${buckets[@]}"})" || failed_there $?
}

start() { # each way out takes the values away, which host.sh may not have been there to do
  local call=(run) status=0
  if goes_with_machine; then call+=(lasting); fi
  call+=(${buckets[@]+"${buckets[@]}"} -- "${trainer[@]}")
  [ ${#names[@]} = 0 ] || sent=1
  if send_env; then
    within "$long" on_hosts "$(host "${call[@]}")" || status=$?
  else
    status=1
  fi
  if [ $status = 0 ]; then sent=0; else forget_env; fi
  return $status
}

forget_env() {
  [ $sent = 1 ] || return 0
  sent=0
  within "$timeout" quietly on_hosts 'rm -f sync_jax.env' ||
    say "the values of ${names[*]} may still lie in sync_jax.env on a host: the next run there, or stop, removes it"
}

status_command() {
  # New machines have no host.sh yet.
  printf 'if [ -f sync_jax/launch/host.sh ]; then %s; else echo worker=0 state=new exit=- step=0; fi' \
    "$(host status ${folder:+"$folder"})"
}

# How the run stands, over all workers, in $run: new, busy (being set up), running, other, done, saved,
# failed, mixed (some have ended, others not) or unknown; in $why the reason, in $step the last checkpoint's.
survey() {
  local word value worker state exit mount user count=0 running=0 finished=0 saved=0 new=0 other=0
  local broken='' hangs='' busy=''
  run=unknown why='' step=0 code=1 lines=''
  if ! within "$timeout" quietly on_hosts "$(status_command)"; then
    why=$(grep -v '^$' "$chatter" | tail -n 1)
    return 0
  fi
  lines=$(grep '^worker=' "$answer" | sort -t= -k2n || true)
  while read -r line; do
    worker='' state='' exit='' mount='' user=''
    for word in $line; do
      value=${word#*=}
      case $word in
        worker=*) worker=$value ;;
        state=*) state=$value ;;
        exit=*) exit=$value ;;
        mount=*) mount=$value ;;
        user=*) user=$value ;;
        step=*) if [ "$value" -gt "$step" ]; then step=$value; fi ;;
      esac
    done
    count=$((count + 1))
    case $state:$exit in
      running:*) running=$((running + 1)) ;;
      other:*)
        other=$((other + 1))
        if [ -n "$user" ]; then why="worker $worker has a run of another user's, ${user/unknown/or of another home folder}"; fi
        ;;
      busy:*) busy="$busy, worker $worker is being set up" ;;
      exited:0) finished=$((finished + 1)) ;;
      exited:75) saved=$((saved + 1)) ;;
      exited:*)
        broken="$broken, worker $worker ended with exit status $exit"
        if [ "$exit" = 2 ]; then code=2; fi
        ;;
      lost:*) broken="$broken, worker $worker lost its run" ;;
      *) new=$((new + 1)) ;;
    esac
    case $mount:$state:$exit in
      dead:exited:0 | dead:exited:75 | :*) ;;
      hangs:*) hangs="$hangs, worker $worker has a bucket that does not answer" ;;
      *) broken="$broken, worker $worker has lost its bucket, for gcsfuse has ended there" ;;
    esac
  done <<<"$lines"
  if [ $other -gt 0 ]; then
    run=other
  elif [ $count -lt "$hosts" ]; then
    why="$count of $hosts workers answered"
  elif [ -n "$hangs" ]; then # which step was saved last is not known; and it may pass
    why=${hangs#, }
  elif [ -n "$broken" ]; then
    run=failed why=${broken#, }
  elif [ -n "$busy" ]; then
    run=busy why=${busy#, }
  elif [ $running -eq $count ]; then
    run=running
  elif [ $finished -eq $count ]; then
    run='done'
  elif [ $((finished + saved)) -eq $count ]; then
    run=saved
  elif [ $new -eq $count ]; then
    run=new
  else
    run=mixed why="$running of $count workers still run"
  fi
}

show_status() {
  if [ $dry = 1 ]; then
    look
    on_hosts "$(status_command)"
    return
  fi
  look
  echo "machine $machine${detail:+ ($detail)}"
  if [ "$machine" != ready ]; then exit 1; fi
  survey
  if [ -n "$lines" ]; then echo "$lines"; fi
  echo "run $run${why:+: $why}"
  case $run in
    running | done | mixed | busy) exit 0 ;;
    saved) exit 75 ;;
    *) exit 1 ;;
  esac
}

show_logs() {
  local follows=()
  if [ $follow = 1 ]; then follows=(follow); fi
  on_hosts "$(host logs 100 ${follows[@]+"${follows[@]}"})"
}

stop() { within $((grace + timeout)) on_hosts "$(host stop "$grace")"; }

unlock() { within "$timeout" on_hosts "$(host unlock)"; }

start_by_hand() {
  local status=0
  start || status=$?
  case $status in
    0) ;;
    2) exit 2 ;; # a host has said why
    *) die 1 "not started on every worker; stop ends it on the others" ;;
  esac
}

leave() { # STATUS MESSAGE
  say "$2"
  exit "$1"
}

# On every way out, but for SIGKILL.
bye() {
  trap : INT TERM HUP # a second one ends what is waited for below, not this
  [ -z "$waiting" ] || kill "$waiting" 2>/dev/null
  forget_env
  [ -z "$waiting" ] || kill "$waiting" 2>/dev/null
  rm -rf "$scratch"
  if [ $owed = 1 ]; then farewell; fi
}

main() {
  scratch=$(mktemp -d)
  chatter=$scratch/chatter # what commands say on stderr, shown where they fail
  answer=$scratch/answer
  trap bye EXIT
  parse "$@"
  if [ $dry = 0 ]; then account; fi
  case $dry:$verb in 0:supervise) check_push || exit ;; esac
  case $verb in
    create | delete | run | supervise)
      show_plan | comment
      ;;
  esac
  case $verb in
    create) create_and_wait ;;
    setup) setup ;;
    push) push ;;
    run) look_for_hosts && start_by_hand ;;
    logs) show_logs ;;
    status) show_status ;;
    stop) stop ;;
    unlock) unlock ;;
    supervise)
      if [ "$creates" = 1 ]; then confirm "Create what is not there"; else confirm "Set it up and start"; fi
      if [ $dry = 1 ]; then supervise_dry; else supervise; fi
      ;;
    delete) delete ;;
  esac || exit $(($? == 2 ? 2 : 1))
}
