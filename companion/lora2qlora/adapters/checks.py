"""What a whole model must be before its layers are replaced, or copied. Chapter 04."""

import copy
import gc
import weakref
from types import CodeType, FunctionType, ModuleType

from torch import nn

from lora2qlora.adapters.names import REGISTERING, above, naming, wrapper
from lora2qlora.lora import check_here


def check_model(model: nn.Module, bases: dict[str, nn.Module]) -> None:
    """ValueError where adapters over these bases would lie apart from the inputs, or never be averaged."""
    for module in model.modules():
        if (kind := wrapper(module)) in REGISTERING:
            raise ValueError(
                f"the model is wrapped in {kind}, which takes note of parameters once, when it wraps: "
                "add the adapters to the bare model, then wrap that"
            )
    has_numbers = any(not parameter.is_meta for parameter in model.parameters())
    for name, base in bases.items():
        naming(name, check_here, base, *above(model, name))
        tensors = [t for own in (base.parameters(), base.buffers()) for t in own]
        if has_numbers and any(tensor.is_meta for tensor in tensors):
            raise ValueError(f"{name} has no numbers yet, it is on the meta device: load its weights first")
        if any(hasattr(tensor, "device_mesh") for tensor in tensors):
            raise ValueError(f"{name} is sharded: add the adapters to the whole model, then shard that")


def independent_copy(model: nn.Module, memo: dict) -> nn.Module:
    """A deep copy, which takes what stands in `memo` by id and copies the rest; ValueError if it is none.

    A function is not copied, so that a forward that closes over a module, as a decorated bound method does,
    would run the original from within the copy. Bound methods and functools.partial are copied well.
    """
    originals = {
        id(thing) for things in (model.modules(), model.parameters(), model.buffers()) for thing in things
    }
    copied = copy.deepcopy(model, memo)
    seen = {id(module) for module in copied.modules()}  # each is looked at in its turn
    for name, module in copied.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and _reaches(value, originals, seen):
                raise ValueError(
                    f"{name or 'the model'} has a {key} that would run the original from within the copy: "
                    "remove it (accelerate's by remove_hook_from_submodules), copy, and set it on the copy"
                )
    return copied


def _reaches(value, wanted: set[int], seen: set[int]) -> bool:
    """Whether what a value refers to, and so on, is one of `wanted`; what was seen is not looked at again."""
    waiting = [value]
    for thing in waiting:  # grows while it is read
        if id(thing) in wanted:
            return True
        if id(thing) not in seen and not isinstance(thing, type | ModuleType):
            seen.add(id(thing))
            waiting.extend(_referents(thing))
    return False


def _referents(thing) -> list:
    """What a thing refers to; of a function's globals those that it names, of a weak reference its object."""
    if isinstance(thing, weakref.ref):
        return [thing()]
    if not isinstance(thing, FunctionType):
        return gc.get_referents(thing)
    known, named = thing.__globals__, []
    if not known.get("__name__", "").startswith("torch."):
        codes = [thing.__code__]
        for code in codes:  # and the functions written inside of it
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        named = [known[name] for code in codes for name in code.co_names if name in known]
    return [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, vars(thing), *named]
