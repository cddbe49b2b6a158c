#!/usr/bin/env bash
# Run a command beside a real Slurm of one node and two GPUs that are none; the Slurm lives as long as the command.
#
#   tests/helpers/slurm.sh sinfo
#   tests/helpers/slurm.sh --install sinfo     installs Debian's slurm-wlm and munge first, where they are missing
#
# Ends with the command's exit code, or with 77 and one sentence on stderr where there can't be a Slurm here.
set -euo pipefail

cannot() {
    echo "There is no Slurm to test with: $1." >&2
    exit 77
}

missing() {
    for tool in munged slurmctld slurmd srun; do
        type -P $tool >/dev/null || echo $tool
    done
}

if [[ ${1-} == --install ]]; then
    shift
    if [[ -n $(missing) ]]; then
        [[ $(id -u) == 0 ]] || cannot "only root can install slurm-wlm and munge"
        type -P apt-get >/dev/null || cannot "this is no Debian or Ubuntu, which --install needs"
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
            slurm-wlm munge; } >/dev/null || cannot "apt-get could not install slurm-wlm and munge"
    fi
fi
[[ -z $(missing) ]] || cannot "$(missing | paste -sd' ') not found; as root, tests/helpers/slurm.sh --install gets them"
[[ $# -gt 0 ]] || set -- sinfo

folder=$(mktemp -d)
chmod 755 "$folder" # munge wants to be reached by everyone
export SLURM_CONF=$folder/slurm.conf
daemons=()

stop() {
    if [[ ${#daemons[@]} == 3 ]]; then
        scancel --quiet --user="$(id -un)" 2>/dev/null || true
        for _ in {1..50}; do [[ -n $(squeue --noheader 2>/dev/null) ]] && sleep 0.1 || break; done
    fi
    for ((n = ${#daemons[@]} - 1; n >= 0; n--)); do
        kill "${daemons[n]}" 2>/dev/null && wait "${daemons[n]}" || true
    done
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT TERM

# The ports are free now, and nobody else's a moment later but by bad luck.
read -r ctld_port slurmd_port < <(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(one.getsockname()[1] for one in held))')

# The node claims more than a small machine has: a profile's requests for cores and memory are met as they stand.
cat >"$SLURM_CONF" <<END
ClusterName=one-node
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$ctld_port
SlurmdPort=$slurmd_port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=86400
MpiDefault=none
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000000 Gres=gpu:2
PartitionName=gpu Nodes=localhost Default=YES
END
printf 'NodeName=localhost Name=gpu File=/dev/%s\n' null zero >"$folder/gres.conf"
mkdir "$folder/state" "$folder/spool" "$folder/bin"
# Snakemake takes SLURM_CONF from a job's srun, which on a cluster finds its configuration where it always is.
printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$(type -P srun)" >"$folder/bin/srun"
chmod +x "$folder/bin/srun"
(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")

munged --foreground --num-threads=1 --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" 2>"$folder/munge.err" &
daemons+=($!)
for _ in {1..100}; do [[ -S $folder/munge.socket ]] && break || sleep 0.1; done
slurmctld -D 2>/dev/null &
daemons+=($!)
slurmd -D -N localhost 2>/dev/null &
daemons+=($!)
for _ in {1..150}; do
    [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]] && break || sleep 0.2
done
if [[ $(sinfo --noheader --format=%T 2>/dev/null) != idle ]]; then
    tail -n 3 "$folder"/*.err "$folder"/*.log >&2
    cannot "its daemons did not come up, their last words are above"
fi
PATH=$folder/bin:$PATH "$@"
