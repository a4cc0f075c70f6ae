#!/usr/bin/env bash
# Train, export and score in one command; prints one summary and exits non-zero if a stage fails.
#
#   bash run_8xh100.sh                    8 GPUs: the record profile, 600 s. 1, 2 or 4 GPUs: the same batch and compute
#                                         by gradient accumulation. No GPU: the cpu profile, minutes on 2 cores.
#   PROFILE=smoke bash run_8xh100.sh      the whole chain in under a minute on 2 cores
#   SEED=42 TTT=sgd bash run_8xh100.sh    any knob of train_gpt.py or eval_sliding.py; what you set beats the profile
#   SEEDS="1337 42 2025" RECORD_ARGS='--name MyIdea --author "A. Name"' bash run_8xh100.sh
#                                         seeds one after another, an audit, the records folder and its check
#   RUN_ID=two bash run_8xh100.sh --nnodes=2 --node_rank=0 --master_addr=HOST
#                                         arguments are torchrun's own; on each node, in a folder that all nodes share
#
# DATA_PATH names a folder of shards; without it data/datasets/fineweb10B_sp<VOCAB_SIZE> is used if it exists, else a
# sample made from the documentation of the installed packages. PROFILE=record|1gpu|cpu|smoke overrides the detection.
set -euo pipefail

die() { echo "error: $*" >&2; exit 2; }
say() { echo "== $*"; }
default() { [[ -n ${!1+set} ]] || export "$1=$2"; }  # the user's environment wins

# Leaves in $PYTHON an interpreter that has everything the requirement files name; makes .venv, once, if there is none.
setup() {
  local modules=$1 skip='^$' options=(--clear) stamp
  shift
  PYTHON=$(command -v python3 || command -v python) || die "no python3 on PATH"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$PYTHON is older than Python 3.10"
  if "$PYTHON" -c "import $modules" 2>/dev/null; then return; fi
  # An installed torch, which may be the only one that fits the driver, is kept and completed.
  if "$PYTHON" -c 'import torch' 2>/dev/null; then
    skip='^torch=='
    options+=(--system-site-packages)
  fi
  stamp=.venv/installed-$(cat "$@" | cksum | cut -d ' ' -f 1)
  if [[ ! -f $stamp ]]; then
    say "setting up .venv from $*, once: minutes, if torch is among what is missing"
    if [[ ! -x .venv/bin/pip ]]; then
      "$PYTHON" -m venv "${options[@]}" .venv || die "cannot make .venv; on Debian: apt-get install python3-venv"
    fi
    cat "$@" | grep -v "$skip" | .venv/bin/python -m pip install --disable-pip-version-check -r /dev/stdin ||
      die "pip could not install $*"
    touch "$stamp"
  fi
  PYTHON=$PWD/.venv/bin/python
}

# Sets every knob of the profile $1 that the environment leaves open. Tests and tools read the small models from here.
set_profile() {
  case $1 in
    record) ;;  # the defaults of train_gpt.py
    1gpu) default MAX_WALLCLOCK_SECONDS $((4800 / ${NPROC:-1} / ${NODES:-1})) ;;  # the GPU-seconds of the record
    cpu)
      default DTYPE float32  # bfloat16 is several times slower on CPUs without AMX
      default NUM_LAYERS 3
      default MODEL_DIM 128
      default NUM_HEADS 4
      default NUM_KV_HEADS 2
      default SHARED_DIM 256
      default EXPERT_DIM 64
      default TRAIN_SEQ_LEN 256
      default TRAIN_BATCH_TOKENS 2048
      default MICRO_BATCH_TOKENS 8192
      default COMPILE 0  # compiling takes most of a minute, and eager steps are but 1.4 times as long
      default MAX_WALLCLOCK_SECONDS 120
      default LOOP_PASSES 1  # seconds bind here, not bytes
      default PARALLEL_START_LAYER 3
      default QK_GAIN_INIT 2
      default MATRIX_LR 0.03
      default EMBED_LR 0.05
      default MUON_MOMENTUM 0.95
      default MUON_WEIGHT_DECAY 0.02
      default EMBED_WEIGHT_DECAY 0
      default GRAD_CLIP_NORM 1
      default MIN_LR 0.05
      default EMA_DECAY 0.99
      default WARMDOWN_FRAC 0.7
      default EMBED_BITS 8  # the size is no limit here
      ;;
    smoke)
      default COMPILE 0
      default DTYPE float32
      default NUM_LAYERS 2
      default MODEL_DIM 64
      default NUM_HEADS 4
      default NUM_KV_HEADS 2
      default SHARED_DIM 128
      default EXPERT_DIM 32
      default TRAIN_SEQ_LEN 128
      default TRAIN_BATCH_TOKENS 1024
      default MICRO_BATCH_TOKENS 8192
      default LOOP_START 1
      default LOOP_END 1
      default PARALLEL_START_LAYER 1
      default ITERATIONS 40
      default GPTQ_BATCHES 8
      default EVAL_STRIDE 64
      ;;
    *) die "PROFILE=$1: expected record, 1gpu, cpu or smoke" ;;
  esac
}

pick_profile() {
  local gpus argument numbers='^__(nnodes|node_rank|nproc_per_node)=([0-9]+)$'  # bash 3.2 wants it in a variable
  gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')  # none if CUDA_VISIBLE_DEVICES is empty
  for NPROC in 8 4 2 1; do if ((NPROC <= gpus)); then break; fi; done
  NODES=1 NODE_RANK=
  for argument in "$@"; do
    [[ $argument == *=* ]] || die "$argument: torchrun arguments are written --name=value here"
    [[ ${argument//-/_} =~ $numbers ]] || continue
    case ${BASH_REMATCH[1]} in
      nnodes) NODES=${BASH_REMATCH[2]} ;;
      node_rank) NODE_RANK=${BASH_REMATCH[2]} ;;
      *) NPROC=${BASH_REMATCH[2]} ;;
    esac
  done
  if ((NODES > 1)) && [[ -z $NODE_RANK ]]; then die "more than one node needs --node_rank=N"; fi
  if ((gpus && NPROC * NODES == 8)); then default PROFILE record; elif ((gpus)); then default PROFILE 1gpu; else default PROFILE cpu; fi
  set_profile "$PROFILE"
  if [[ $PROFILE == cpu || $PROFILE == smoke ]]; then NPROC=1; fi
}

pick_data() {
  local name size='_sp([0-9]+)$'
  if [[ -n ${DATA_PATH:-} ]]; then
    name=$(basename "$DATA_PATH")
    if [[ $name =~ $size ]]; then default VOCAB_SIZE "${BASH_REMATCH[1]}"; fi
  elif [[ ! -d data/datasets/fineweb10B_sp${VOCAB_SIZE:-8192} ]]; then
    [[ -n ${VOCAB_SIZE:-} || ! -d data/datasets/fineweb10B_sp1024 ]] ||
      die "no data/datasets/fineweb10B_sp8192; VOCAB_SIZE=1024 takes the fineweb10B_sp1024 that is there"
    [[ ${VOCAB_SIZE:-1024} == 1024 ]] || die "no data/datasets/fineweb10B_sp$VOCAB_SIZE, and the sample has VOCAB_SIZE=1024"
    say "making the sample, as there is no data/datasets/fineweb10B_sp${VOCAB_SIZE:-8192}"
    "$PYTHON" data/make_sample.py
    export VOCAB_SIZE=1024 DATA_PATH=data/datasets/sample_sp1024
    default TOKENIZER_PATH data/tokenizers/sample_1024_bpe.model
    echo "************************************************************************************************"
    echo "* NOT COMPARABLE with the leaderboard: trained and scored on the sample, package documentation *"
    echo "************************************************************************************************"
  fi
}

# One process needs no torchrun, and its errors then stay one line. A signal to this script alone reaches the stage.
launch() {
  local command=("$PYTHON") child status=0
  if ((${#TORCHRUN[@]})); then
    command+=(-m torch.distributed.run --nproc_per_node="$NPROC" "${TORCHRUN[@]}")
  elif ((NPROC > 1)); then
    command+=(-m torch.distributed.run --standalone --nproc_per_node="$NPROC")
  fi
  "${command[@]}" "$@" &
  child=$!
  trap 'kill -TERM "$child"' TERM
  trap 'kill -INT "$child"' INT
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait`, not yet the stage
    status=0
    wait "$child" || status=$?
  done
  trap - TERM INT
  return "$status"
}

train_and_score() {
  say "training: profile $PROFILE, $NODES x $NPROC process(es)," \
    "data ${DATA_PATH:-data/datasets/fineweb10B_sp${VOCAB_SIZE:-8192}}, run $RUN_ID"
  launch train_gpt.py
  say "scoring logs/$RUN_ID.ptz by sliding window"
  launch eval_sliding.py "logs/$RUN_ID.ptz"
  if ((${NODE_RANK:-0} == 0)); then "$PYTHON" records/runlog.py --summary "logs/$RUN_ID.txt"; fi
}

# What make_record.py would refuse after hours of training is refused before. Leaves its arguments in $RECORD.
plan_record() {
  local commit words word numbers='^[0-9]+( [0-9]+)*$'
  commit=$(git describe --always --dirty 2>/dev/null) || commit=unknown-dirty
  [[ $commit != *-dirty || ${RECORD_ARGS:-} == *--allow-commit* ]] ||
    die "SEEDS makes a record, and this tree is not a clean commit; commit first, or RECORD_ARGS='... --allow-commit'"
  [[ $SEEDS =~ $numbers && -z $(tr ' ' '\n' <<<"$SEEDS" | sort | uniq -d) ]] ||
    die "SEEDS=$SEEDS: expected different numbers with a space between them"
  words=$("$PYTHON" -c 'import shlex, sys; print(*shlex.split(sys.argv[1]), sep="\n")' "${RECORD_ARGS:---name TokenRouted}" 2>/dev/null) ||
    die "RECORD_ARGS=$RECORD_ARGS: a quote is not closed"
  RECORD=()
  while IFS= read -r word; do RECORD+=("$word"); done <<<"$words"
  if [[ $PROFILE == record ]]; then RECORD+=(--track 10min_16mb); fi
  "$PYTHON" records/make_record.py --dry-run "${RECORD[@]}"
}

make_record() {
  local logs=() seed said
  for seed in $SEEDS; do logs+=("logs/${group}_seed$seed.txt"); done
  say "auditing ${logs[0]%.txt}.ptz"
  "$PYTHON" eval_sliding.py --audit "${logs[0]%.txt}.ptz"
  say "making the records folder and checking it"
  said=$("$PYTHON" records/make_record.py "${RECORD[@]}" --logs "${logs[@]}")
  echo "$said"
  "$PYTHON" records/check_record.py "${said##*$'\n'}"
}

main() {
  local modules="torch, numpy, sentencepiece, zstandard, brotli, sympy, networkx" files=(requirements.txt) group
  TORCHRUN=("$@")
  # Relative to where the user stands, not to the repository.
  if [[ -n ${DATA_PATH:-} ]]; then
    [[ -d $DATA_PATH ]] || die "DATA_PATH=$DATA_PATH: no such folder"
    DATA_PATH=$(cd "$DATA_PATH" && pwd)
  fi
  if [[ -n ${TOKENIZER_PATH:-} && $TOKENIZER_PATH != /* ]]; then TOKENIZER_PATH=$PWD/$TOKENIZER_PATH; fi
  cd "$(dirname "${BASH_SOURCE[0]}")"
  if (($#)); then [[ -n ${RUN_ID:-} ]] || die "torchrun arguments need a RUN_ID, the same on every node"; fi
  if [[ -n ${SEEDS:-} ]]; then
    modules+=", matplotlib, scipy"
    files+=(tests/requirements.txt)
  fi
  exec 9>.lock
  if command -v flock >/dev/null; then flock 9; fi  # of two launchers here, the second finds .venv and data complete
  setup "$modules" "${files[@]}"
  pick_profile "$@"
  if [[ -n ${SEEDS:-} ]]; then plan_record; fi
  pick_data
  exec 9>&-
  [[ -n ${RUN_ID:-} ]] || export RUN_ID="$(date +%Y%m%d_%H%M%S)_$PROFILE"
  if [[ -z ${SEEDS:-} ]]; then
    train_and_score
    return
  fi
  group=$RUN_ID
  for SEED in $SEEDS; do
    RUN_ID=${group}_seed$SEED
    export SEED RUN_ID
    train_and_score
  done
  if ((${NODE_RANK:-0} == 0)); then make_record; fi
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi
