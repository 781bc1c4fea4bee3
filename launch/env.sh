# shellcheck shell=bash
# Environment for the ranks of any launcher: `. launch/env.sh`. What is set already stays. torchrun.sh and slurm.sbatch
# read this file themselves. Only what matters is here; else NCCL's and torch's own defaults hold.

# Threads of one rank. Unset, torchrun says 1, accelerate cores / ranks on CPUs, and under the DeepSpeed launcher every
# rank takes all cores. Another number rounds sums differently: keep it over a run's restarts.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Timeouts: parallel.timeout_s (600 s; --parallel.timeout_s) is how long a rank waits for another at the start, and may
# stand still. A collective fails after twice as long; on NCCL that ends its process, so that torchrun can start the
# world again: 1 after aborting NCCL, which is what torchrun sets; 3, torch's own default, without.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# A rank that takes longer than that to finish its step and save, after torchrun itself got a SIGTERM, is killed. Unset,
# torchrun says 30 (seconds).
#   export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120

# What NCCL could not do, and no more. INFO once on a new cluster: between H100 nodes its channels should go
# "via NET/IB/…/GDRDMA" (NIC to GPU memory); NET/Socket is the slow way, through host memory and TCP.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Nodes with several networks: name the interface by which all nodes reach each other. gloo (barriers, control data, all
# of a run on CPUs) otherwise takes the address that the host's own name resolves to; where /etc/hosts makes that
# 127.0.1.1, ranks on other nodes cannot connect. NCCL takes prefixes; its second = means exactly this name.
#   export GLOO_SOCKET_IFNAME=ens1f0 NCCL_SOCKET_IFNAME==ens1f0

# H100 nodes have an InfiniBand card for each GPU, beside cards for storage: those that may carry NCCL's data.
#   export NCCL_IB_HCA==mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_9,mlx5_10,mlx5_11
