#!/usr/bin/env bash
# torchrun's agent on this node, and its ranks:  launch/torchrun.sh MODULE [OPTION …]
#
#   NPROC_PER_NODE  ranks on this node (needed): one for each GPU, or any number on CPUs
#   NNODES          nodes; 1 if not set. With more, type the same on each node, with the same
#   RDZV_ENDPOINT     HOST:PORT: one of the nodes and a free port there, where its agent keeps the rendezvous,
#   RDZV_ID           a word; runs that share an endpoint need different ones
#   LOCAL_ADDR        and, where other nodes do not know this one by its host name, its address
#   MAX_RESTARTS    how often the world may start again, from its newest checkpoint, after losing a rank; 0 if not set.
#                   To torchrun a user's mistake (exit code 2) is a loss too.
#   NUMA_BINDING    node: every rank runs on the cores nearest to its GPU, as torchrun finds them. For GPU nodes with
#                   several sockets, where the far socket's memory is slower to copy from; not for CPUs.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/env.sh
. "$here/env.sh"

: "${NPROC_PER_NODE:?is not set: the number of ranks on this node}"
if [[ "${NNODES:-1}" != 1 ]]; then
  : "${RDZV_ENDPOINT:?is not set: HOST:PORT at which the $NNODES nodes meet}"
fi

# One node keeps to itself: dbdist's own rendezvous (parallel/loopback.py) listens on 127.0.0.1, at a free port, where
# torchrun's listens on every interface. Several need c10d: the nodes need no numbers (their addresses order the ranks),
# and meet again after a restart.
if [[ "${NNODES:-1}" == 1 && -z "${RDZV_ENDPOINT:-}" ]]; then
  rendezvous=(--rdzv-backend=loopback)
else
  rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="${RDZV_ENDPOINT:-localhost:0}")
fi

# A session of its own: Ctrl-C comes here alone.
setsid torchrun \
  --nnodes="${NNODES:-1}" \
  --nproc-per-node="$NPROC_PER_NODE" \
  "${rendezvous[@]}" \
  --rdzv-id="${RDZV_ID:-dbdist}" \
  --max-restarts="${MAX_RESTARTS:-0}" \
  ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} \
  ${NUMA_BINDING:+--numa-binding="$NUMA_BINDING"} \
  -m "$@" &
agent=$!

# A first signal goes to the ranks, which finish their step, save and exit with 0, and so does this script. (torchrun
# itself passes signals on too, but kills what takes longer than 30 s, and ends with an error.) A second one ends all.
stop() {
  trap 'kill -TERM "$agent" 2>/dev/null || true' TERM INT USR1
  read -ra ranks <<<"$(cat /proc/"$agent"/task/*/children 2>/dev/null | tr '\n' ' ')"
  kill "-$1" "${ranks[@]:-$agent}" 2>/dev/null || true
}
trap 'stop TERM' TERM
trap 'stop INT' INT
trap 'stop USR1' USR1

while :; do
  code=0
  wait "$agent" || code=$?
  kill -0 "$agent" 2>/dev/null || exit "$code" # else the wait was cut short by a signal
done
