"""Which linear layers of a model are adapted: PEFT's rules for names. Chapter 04."""

from collections import Counter
from collections.abc import Collection

from torch import nn

from lora2qlora.adapters.names import bare_name, inside
from lora2qlora.adapters.patterns import Expression
from lora2qlora.adapters.readers import read_directly
from lora2qlora.lora import LoRALinear, is_linear

# What a new head is called where no model of transformers says which part of it is the base.
HEADS = """lm_head score classifier classification_head qa_outputs qa_classifier regression_head reward_head
    value_head v_head""".split()


def find_targets(model: nn.Module, targets: list[str] | str) -> list[str]:
    """The names of the linear layers that `targets` means, by the rule of `add_lora`; ValueError as there."""
    candidates = {bare_name(model, name): name for name in adaptable(model)}
    if targets == "all-linear":
        spared = heads(model)
        targets = [bare for bare, name in candidates.items() if id(model.get_submodule(name)) not in spared]
    elif isinstance(targets, str):
        raise ValueError(f'targets must be a list of suffixes or "all-linear"; pass ["{targets}"] for one')
    targets = set(targets)
    suffixes = {suffix for bare in candidates for suffix in _suffixes(bare)}
    if not targets or targets - suffixes:
        raise ValueError(no_target(targets - suffixes, model))
    names = [name for bare, name in candidates.items() if is_target(bare, targets)]
    check_targets(model, names)
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that can be adapted, by name: not the LM head, nor what is adapted already."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError("the model carries PEFT's own adapters: pass the base model that PEFT was given")
    get_heads = [getattr(module, "get_output_embeddings", lambda: None) for module in model.modules()]
    lm_heads = {id(get_head()) for get_head in get_heads}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in modules(model).items()
        if is_linear(module)
        and not isinstance(module, LoRALinear)
        and id(module) not in lm_heads
        and id(getattr(module, "weight", None)) not in embeddings
    }


def heads(model: nn.Module) -> set[int]:
    """The ids of all modules in a model's heads, which are new to each task: "all-linear" spares them.

    In a model of transformers these are the parts beside its base model that are no models themselves;
    there, and in what such a model is built into, also what is called as in HEADS.
    """
    found, base = set(), getattr(model, "base_model", None)
    for name, part in model.named_children():
        is_beside = isinstance(base, nn.Module) and base is not model and part is not base
        if name in HEADS or (is_beside and not hasattr(part, "base_model")):
            found |= {id(module) for module in part.modules()}
        elif base is None or hasattr(part, "base_model"):
            found |= heads(part)
    return found


def check_targets(model: nn.Module, names: list[str]) -> None:
    """ValueError where an adapter in the place of one of these layers would never be called."""
    for name in names:
        *above, last = name.split(".")
        if inside(model.get_submodule(".".join(above))) == last:
            raise ValueError(f"{name} is compiled or wrapped by itself: adapt it first, then wrap it")
    read = read_directly(model)
    refused = {name: read[id(m)] for name in names if id(m := model.get_submodule(name)) in read}
    if refused:
        readers, layers = sorted(set(refused.values())), sorted(_last_parts(refused))
        others = sorted(_last_parts(adaptable(model)) - set(layers))
        raise ValueError(
            f"{', '.join(readers)} multiplies with the weight of {', '.join(layers)} itself, so that what "
            f"stands in the layer's place would be passed by without a word: name other targets, of {others}"
        )


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules below the model by name, as if it carried no adapters: without the insides of those."""
    insides = tuple(f"{name}." for name in lora_layers(model))
    return {name: m for name, m in model.named_modules() if name and not name.startswith(insides)}


def is_target(name: str, targets: Collection[str] | Expression) -> bool:
    """PEFT's rule: a regular expression is for the whole name, a list holds names or suffixes."""
    if isinstance(targets, Expression):
        return targets.matches(name)
    return any(suffix in targets for suffix in _suffixes(name))


def no_target(wanted: Collection[str] | Expression, model: nn.Module) -> str:
    """What to say when nothing is named as wanted: the candidates, by the last part of their names."""
    candidates = sorted(_last_parts(adaptable(model)))
    named = wanted.pattern if isinstance(wanted, Expression) else sorted(map(str, wanted))
    said = f"no linear layer to adapt is named {named!s:.300}; the candidates are {candidates}"
    kinds = Counter(
        type(module).__name__
        for name, module in modules(model).items()
        if not is_linear(module) and any(p.ndim > 1 for p in module.parameters(recurse=False))
        if not candidates or is_target(bare_name(model, name), wanted)
    )
    if not kinds and candidates:
        return said
    found = ", ".join(f"{kind} x {count}" for kind, count in kinds.most_common()) or "no module"
    where = "so named is" if candidates else "matrices lie in"
    return (
        f"{said}; {where} {found}, but only what has in_features and out_features, as nn.Linear, is adapted"
    )


def _suffixes(name: str) -> list[str]:
    """The name and all that follows one of its dots."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _last_parts(names) -> set[str]:
    """The last part of each name; a name that ends in a number is kept whole."""
    return {name if name.split(".")[-1].isdigit() else name.split(".")[-1] for name in names}
