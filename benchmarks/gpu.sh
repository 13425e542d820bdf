#!/usr/bin/env bash
# What README.md's table wants of a GPU, without a network, each part in a time of its own.
#
#   benchmarks/gpu.sh steps FOLDER      rows 1 to 3 and 5 to 7
#   benchmarks/gpu.sh runs FOLDER       rows 8 to 11, and memory
#   benchmarks/gpu.sh headline FOLDER   300 epochs, and the fast config
#   QUICK=1 benchmarks/gpu.sh steps FOLDER      narrow and short, on a CPU: does it run?
#
# Each of the three ends within ten minutes.
#
# PYTHON (python) must have the packages, and PyTorch for row 5. Each part's output goes to the
# terminal and to FOLDER/PART.txt, below its command; one that fails or takes too long is said to,
# and the next begins.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
what=${1:?steps, runs or headline} folder=${2:?where the output goes}
mkdir -p "$folder" || exit 1
failed=0

part() { # NAME SECONDS ARGUMENT...: a module of benchmarks/
  local name=$1 seconds=$2
  shift 2
  echo "\$ python -m benchmarks.$*" | tee "$folder/$name.txt"
  if ! timeout "$seconds" "${PYTHON:-python}" -m "benchmarks.$1" "${@:2}" 2>&1 |
    tee -a "$folder/$name.txt"; then
    echo "$name failed, or took more than $seconds s" | tee -a "$folder/$name.txt"
    failed=1
  fi
}

quick=${QUICK:+yes}
case $what${quick:+-quick} in
  steps)
    part step-vgg16_bn 150 step --networks vgg16_bn
    part step-cnn 100 step --networks cnn
    part step-resnet 200 step --networks resnet18 resnet34 resnet50 --batch 128
    part trainer-vgg16_bn 70 trainer --config configs/cifar10.py --dtype bfloat16 --rounds 4
    part trainer-cnn 70 trainer --dtype bfloat16 --rounds 4
    ;;
  runs)
    part memory 60 memory --network vgg16_bn
    part startup 140 startup --networks cnn vgg16_bn --rounds 2
    part seeds-cnn 100 seeds --seeds 8 --rounds 1
    part seeds-vgg16_bn 110 seeds --network vgg16_bn --seeds 4 --rounds 1
    part host-pipeline 60 host_pipeline
    ;;
  headline) part headline 590 headline ;;
  steps-quick)
    part step 300 step --quick
    part trainer 120 trainer --width 4 --batch 32 --steps 10 --rounds 2
    ;;
  runs-quick)
    part memory 120 memory --width 4 --batch 32 --examples 2000 --rounds 2
    part startup 120 startup --rounds 1
    part seeds 240 seeds --seeds 2 --epochs 0.2 --rounds 1
    part host-pipeline 60 host_pipeline --pictures 64 --rounds 2
    ;;
  headline-quick) part headline 300 headline --quick ;;
  *)
    echo "gpu.sh: $what is none of steps, runs and headline" >&2
    exit 2
    ;;
esac
exit $failed
