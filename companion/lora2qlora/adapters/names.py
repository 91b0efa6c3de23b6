"""The names of modules in a model that something wraps: torch.compile, DataParallel, DDP, FSDP. Chapter 04.

A wrapper adds a segment to the names of all below it. In the model they are needed, to find a module; in a
file they would fit no other model.
"""

from torch import nn

# Wrappers of torch and DeepSpeed by class, with the attribute in which each keeps what it wraps.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # what torch.compile returns
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "DeepSpeedEngine": "module",
}
# These register parameters once, when they wrap: what is added later they neither average nor shard.
REGISTERING = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def wrapper(module: nn.Module) -> str | None:
    """The class that makes a module a wrapper, by its name; None for any other module."""
    for kind in type(module).__mro__:
        if kind.__name__ in WRAPPERS and kind.__module__.split(".")[0] in ("torch", "deepspeed"):
            return kind.__name__
    return None


def inside(module: nn.Module) -> str | None:
    """The name under which a wrapper keeps what it wraps; None for any other module."""
    return WRAPPERS.get(wrapper(module))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model below all wrappers around the whole of it."""
    while name := inside(model):
        model = getattr(model, name)
    return model


def bare_name(model: nn.Module, name: str) -> str:
    """The name of one of a model's modules without the segments of wrappers, as the bare model has it.

    A module that is called "module" in a model that nothing wraps keeps its name.
    """
    parts = []
    for part in name.split("."):
        if part != inside(model):
            parts.append(part)
        model = getattr(model, part)
    return ".".join(parts)


def all_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module, by its id: a shared one has several."""
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def above(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that hold the one of this name, from the model itself down."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def naming(name: str, function, *arguments):
    """Call the function; what it raises names the module that it was about."""
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error
