"""Several processes, started by torchrun: who is who, sums over all of them, weights in shards."""

import os
import warnings

import torch
import torch.distributed as dist


def ranks():
    """The number of this process and how many there are: 0 and 1 unless torchrun started us."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def say(text):
    """Print a line, on the first process only."""
    if ranks()[0] == 0:
        print(text, flush=True)


def join_group(device):
    """Join the processes that torchrun started, if it did. Returns this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if ":" in device:
        raise ValueError(f"--device {device}: with torchrun say cuda or cpu")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # Import this module before the process group exists. Otherwise its default arguments keep the
    # group alive after leave_group(), and its threads can crash Python at exit.
    from torch.distributed.nn import functional  # noqa: F401

    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def leave_group():
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(tensors):
    """Add each of the tensors over all processes, in place, in one message."""
    if ranks()[1] == 1:
        return
    flat = torch.cat([t.flatten().float() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))


def own_share(items):
    """This process's part of a batch's items, and whether it is a surplus one.

    With more processes than items some have none. They take one, to be counted as nothing, and
    take part in the sums like the others.
    """
    rank, processes = ranks()
    mine = items[rank::processes]
    return mine or items[:1], not mine


def of_all_processes(values, n, device):
    """What the processes found for their shares of n items, in the items' order. -> n floats."""
    rank, processes = ranks()
    if processes == 1:
        return values
    found = torch.zeros(n, device=device)
    if rank < n:
        found[rank::processes] = torch.tensor(values, device=device)
    sum_over_processes([found])
    return found.tolist()


def wait_for_all():
    """Wait until every process has come here."""
    if ranks()[1] > 1:
        dist.barrier()


def any_process(flag, device):
    """Whether the flag is set in any process."""
    if ranks()[1] == 1:
        return flag
    total = torch.tensor(float(flag), device=device)
    sum_over_processes([total])
    return total.item() > 0


def gather_full(tensor):
    """A weight as a whole tensor, put together from its shards if it has any; all have to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(model, dtype, device):
    """Spread a model on the meta device over all processes (FSDP2): a layer is gathered to run.

    Returns a function from a whole tensor to this process's part of it, cut along its first
    dimension. Of a mapped file only that part is read.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, Shard

    # Nothing here works in place on these views.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    rank, n = ranks()
    mesh = init_device_mesh(torch.device(device).type, (n,))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)
    for method in ("prompted", "prefix", "hidden", "head", "generate"):
        register_fsdp_forward_method(model, method)

    def place(tensor):
        parts = tensor.chunk(n)
        mine = parts[rank] if rank < len(parts) else tensor[:0]
        mine = mine.to(device, dtype)
        shape = {"shape": tensor.shape, "stride": tensor.stride()}
        return DTensor.from_local(mine, mesh, [Shard(0)], **shape)

    return place
