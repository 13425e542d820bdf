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
# and the variables self, verbs, extra (see setup in host.sh) and creates (1: the machine is ours to
# make). Written for bash 3.2, which macOS has.

repo=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd -P)
# shellcheck source=launch/supervise.sh
. "$repo/launch/supervise.sh"
mounts=${SYNC_JAX_MOUNTS:-/mnt/sync_jax} # where hosts mount buckets, each below by its name
interval=${SYNC_JAX_POLL:-60}            # seconds between looks
patience=${SYNC_JAX_PATIENCE:-15}        # so many looks in a row are given to anything that may pass
timeout=${SYNC_JAX_TIMEOUT:-300}         # seconds for what is answered at once, if at all

dry=0 yes=0 follow=0 workdir='' config='' grace=120 preemptions=100 failures=3
trainer=() names=() buckets=()
hosts=1 sent=0

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

# What should be answered at once, while nobody watches: its status, or 137 where it had to be killed. Else
# somebody is there, who can end it, and whom ssh may ask for a passphrase, for which it wants the
# terminal. macOS has no timeout(1).
within() ( # SECONDS COMMAND...
  seconds=$1 status=0
  shift
  case $dry:$verb in
    0:supervise | 0:create) ;;
    *)
      "$@"
      exit
      ;;
  esac
  set -m # each in a group of its own, with all that it starts
  "$@" </dev/null &
  asked=$!
  (sleep "$seconds" && kill -KILL -- -$asked) >/dev/null 2>&1 &
  watch=$!
  set +m
  trap 'kill -KILL -- -$asked -$watch 2>/dev/null; exit 1' INT TERM HUP
  { wait $asked; } 2>/dev/null || status=$?
  kill -KILL -- -$watch 2>/dev/null
  [ $status != 137 ] || echo "no answer within $seconds s" >&2
  exit $status
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

push() (
  note "packs what git tracks or does not ignore into sync_jax.tar.gz"
  if [ $dry = 0 ]; then
    packed=$(mktemp -d)
    trap 'rm -rf "$packed"' EXIT
    cd "$repo" || exit 1
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' file; do # what git knows may be deleted here
        if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
      done >"$packed/files" || die 1 "$repo is no git checkout"
    # Without macOS's own attributes; it would store them as files.
    COPYFILE_DISABLE=1 tar -czf "$packed/sync_jax.tar.gz" --null -T "$packed/files" || exit 1
    cd "$packed" || exit 1
  fi
  # Through a file: a pipe's last command would run, and end well, with half of it or nothing.
  copy sync_jax.tar.gz &&
    on_hosts 'tar -xzOf sync_jax.tar.gz launch/host.sh >sync_jax.unpack && bash sync_jax.unpack unpack'
)

send_env() ( # in a file: a command line can be read by all on the machine, and stands in logs
  [ ${#names[@]} -gt 0 ] || exit 0
  note "sync_jax.env: the values of ${names[*]}, for the user's eyes; the run takes it away"
  if [ $dry = 0 ]; then
    umask 077
    values=$(mktemp -d)
    trap 'rm -rf "$values"' EXIT
    for variable in "${names[@]}"; do
      printf '%s=%s\n' "$variable" "${!variable}"
    done >"$values/sync_jax.env"
    cd "$values" || exit 1
  fi
  copy sync_jax.env
)

setup() {
  push && on_hosts "$(host setup "$extra" ${buckets[@]+"${buckets[@]}"})"
}

start() { # each way out takes the values away, which host.sh may not have been there to do
  [ ${#names[@]} = 0 ] || sent=1
  if send_env && on_hosts "$(host run ${buckets[@]+"${buckets[@]}"} -- "${trainer[@]}")"; then
    sent=0
  else
    forget_env
    return 1
  fi
}

forget_env() {
  [ $sent = 1 ] || return 0
  sent=0
  within "$timeout" on_hosts 'rm -f sync_jax.env' >"$chatter" 2>&1 ||
    say "the values of ${names[*]} may still lie in sync_jax.env on a host: the next run there, or stop, removes it"
}

status_command() {
  # New machines have no host.sh yet.
  printf 'if [ -f sync_jax/launch/host.sh ]; then %s; else echo worker=0 state=new exit=- step=0; fi' \
    "$(host status ${folder:+"$folder"})"
}

# How the run stands, over all workers, in $run: new, running, other, done, saved, failed, mixed
# (some have ended, others not) or unknown; in $why the reason, in $step the last checkpoint's.
survey() {
  local word value worker state exit mount count=0 running=0 finished=0 saved=0 new=0 other=0
  local broken='' hangs=''
  run=unknown why='' step=0 code=1
  if ! lines=$(within "$timeout" on_hosts "$(status_command)" 2>"$chatter"); then
    why=$(grep -v '^$' "$chatter" | tail -n 1)
    return 0
  fi
  lines=$(grep '^worker=' <<<"$lines" | sort -t= -k2n || true)
  while read -r line; do
    worker='' state='' exit='' mount=''
    for word in $line; do
      value=${word#*=}
      case $word in
        worker=*) worker=$value ;;
        state=*) state=$value ;;
        exit=*) exit=$value ;;
        mount=*) mount=$value ;;
        step=*) if [ "$value" -gt "$step" ]; then step=$value; fi ;;
      esac
    done
    count=$((count + 1))
    case $state:$exit in
      running:*) running=$((running + 1)) ;;
      other:*) other=$((other + 1)) ;;
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
  if [ $count -lt "$hosts" ]; then
    why="$count of $hosts workers answered"
  elif [ -n "$hangs" ]; then # which step was saved last is not known; and it may pass
    why=${hangs#, }
  elif [ $other -gt 0 ]; then
    run=other
  elif [ -n "$broken" ]; then
    run=failed why=${broken#, }
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
    running | done | mixed) exit 0 ;;
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

main() {
  chatter=$(mktemp) # what commands say on stderr, shown where they fail
  trap 'forget_env; rm -f "$chatter"' EXIT
  parse "$@"
  if [ $dry = 0 ]; then account; fi
  case $verb in
    create | delete | run | supervise)
      show_plan | comment
      ;;
  esac
  case $verb in
    create) create_and_wait ;;
    setup) setup ;;
    push) push ;;
    run) look_for_hosts && { start || die 1 "not started on every worker; stop ends it on the others"; } ;;
    logs) show_logs ;;
    status) show_status ;;
    stop) stop ;;
    unlock) unlock ;;
    supervise)
      if [ "$creates" = 1 ]; then confirm "Create what is not there"; else confirm "Set it up and start"; fi
      if [ $dry = 1 ]; then supervise_dry; else supervise; fi
      ;;
    delete) delete ;;
  esac || exit 1
}
