"""Models that are large for the hardware: int8 weights, memory in advance, several processes, weights in shards.

Letters: B rows, T text tokens, p prompt tokens, d width of the model; a linear layer is (out, in).
"""

import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------- int8 weights


class Int8Product(torch.autograd.Function):
    """x W' for W = diag(scale) Q. Q is cast where it is used, in the backward pass again, and the cast never kept:
    plain F.linear(x, Q.to(x.dtype)) would keep every cast weight until the backward pass has gone by."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale  # (..., out)

    @staticmethod
    def backward(ctx, g):
        weight, scale = ctx.saved_tensors
        return (g * scale) @ weight.to(g.dtype), None, None  # (..., in)


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is int8, with a scale per output channel; symmetric, rounded to nearest."""

    def __init__(self, d_in, d_out, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(d_out), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(d_out), requires_grad=False) if bias else None

    def forward(self, x):
        y = Int8Product.apply(x, self.weight, self.scale)  # (..., out)
        return y if self.bias is None else y + self.bias

    @staticmethod
    def pack(name, weight):
        """The tensors that stand for `NAME.weight` (out, in) in a state dict: int8 weight and scale (out,)."""
        scale = (weight.float().abs().amax(dim=1) / 127).clamp_min(1e-12).to(weight.dtype)  # rounded first, then used
        packed = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return {name: packed, name.removesuffix("weight") + "scale": scale}


# ------------------------------------------------------------------------------------------- memory in advance


def step_memory(model, B, T, p, scored):
    """Bytes that a training step of B rows of T tokens, `scored` of them scored, keeps beside the weights.

    Per token and layer: both norms' inputs, the queries, all keys and values in sight, gate and up, and on CUDA what
    attention gives, on a CPU its weights; frozen linear layers keep nothing of their input. With `model.recompute` only
    a layer's input stays, and of one layer at a time the rest. Then the logits, in float32, about five times.
    """
    config, size, on_cpu = model.config, model.dtype.itemsize, model.device.type == "cpu"
    d, inner, c, layers = config.hidden_size, config.intermediate_size, config.head_dim, config.num_hidden_layers
    heads, groups, S = config.num_attention_heads, config.num_key_value_heads, p + T
    attention = heads * c + (2 * groups * c * S / T + heads * S if on_cpu else 2 * heads * c * S / T + heads * c)
    n = B * T + p  # the prompt's tokens once
    layer = n * (2 * d + attention + 2 * inner) * size
    kept = layers * n * d * size + layer if model.recompute else layers * layer
    return round(kept + 5 * 4 * scored * config.vocab_size)


def peak_memory(device):
    """The most bytes that this process has held so far: on a GPU there, else all its memory, as the system counts."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -------------------------------------------------------------------------------------------- several processes


def ranks():
    """The number of this process and how many there are: 0 and 1 unless torchrun started us."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start(device):
    """Join the processes that torchrun started, if it did. -> this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if ":" in device:
            raise ValueError(f"--device {device}: with torchrun each process takes its own; say cuda or cpu")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        # Its functions' default argument is the group there is when it is first imported, which torch does somewhere;
        # the group and its threads would outlive leave(), and a thread that works while Python ends aborts the process.
        from torch.distributed.nn import functional  # noqa: F401

        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def add_up(tensors):
    """Add each of the tensors over all processes, in place, in one message."""
    if ranks()[1] > 1:
        flat = torch.cat([t.flatten().float() for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))


def any_of(flag, device):
    """Whether the flag is set in any process."""
    if ranks()[1] == 1:
        return flag  # nothing to wait for
    flag = torch.tensor(float(flag), device=device)
    add_up([flag])
    return flag.item() > 0


def whole(tensor):
    """A weight as it is, put together where it is in shards; every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(model, dtype, device):
    """Spread the weights of a model on the meta device over all processes (FSDP2): each layer is gathered when it runs.

    -> a function from a whole tensor to this process's part of it, cut along its first dimension; of a mapped file only
    that part is read.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, Shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here works in place on them
    rank, n = ranks()
    mesh = init_device_mesh(torch.device(device).type, (n,))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)
    for method in ("front", "prefix", "hidden", "head", "generate"):
        register_fsdp_forward_method(model, method)

    def place(tensor):
        parts = tensor.chunk(n)
        mine = (parts[rank] if rank < len(parts) else tensor[:0]).to(device, dtype)
        return DTensor.from_local(mine, mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride())

    return place
