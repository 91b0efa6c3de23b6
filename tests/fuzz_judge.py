"""One input tried and judged: only promised errors, each on purpose and with words, and nothing changed."""

import linecache
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lora2qlora
import torch
from torch import Tensor, nn

PACKAGE = Path(lora2qlora.__file__).parent


@dataclass(frozen=True)
class Trial:
    """An input ready to be tried, and what must hold afterwards; the checks raise AssertionError."""

    call: Callable[[], object]
    promised: tuple[type[Exception], ...]
    digest: Callable[[], object]  # of all that an error must leave as it was
    accepted: Callable[[object], None] = lambda result: None
    refused: Callable[[Exception], None] = lambda error: None


@dataclass(frozen=True)
class Verdict:
    """`outcome` is "accepted" or the class of the error; `failure` the kind of fault, "" for none."""

    outcome: str
    failure: str = ""
    detail: str = ""


def judge(trial: Trial) -> Verdict:
    """Try one input."""
    before = trial.digest()
    try:
        result = trial.call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        return Verdict(type(error).__name__, *_after_error(trial, error, before))
    return Verdict("accepted", *_explain("accepted, but", trial.accepted, result))


def _after_error(trial: Trial, error: BaseException, before) -> tuple[str, str]:
    """(kind, detail) of what is wrong after an error, or two empty strings."""
    name, detail = type(error).__name__, f"{type(error).__name__}: {str(error)[:200]}"
    if not isinstance(error, trial.promised) or isinstance(error, RecursionError | NotImplementedError):
        return f"{name}, not promised, from {place(error)}", detail
    if trial.digest() != before:
        return f"changed before the {name} from {place(error)}", detail
    if not "".join(map(str, error.args)).strip():
        return f"{name} without a word from {place(error)}", detail
    if not isinstance(error, OSError) and not _is_on_purpose(error):
        return f"{name} by accident from {place(error)}", detail
    return _explain(f"after {name},", trial.refused, error)


def _explain(when: str, check: Callable[[object], None], argument) -> tuple[str, str]:
    try:
        check(argument)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        return f"{when} {type(error).__name__} at {Path(line.filename).name}:{line.lineno}", str(error)[:200]
    return "", ""


def place(error: BaseException) -> str:
    """Where an error comes from: the last frame in the package, or else the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


def _is_on_purpose(error: BaseException) -> bool:
    """Whether the last line that ran is a raise: an error of a type that happens to be promised is none."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return linecache.getline(frame.filename, frame.lineno).lstrip().startswith("raise")


def content(tensor: Tensor) -> tuple:
    """Dtype, shape and bytes of a tensor, equal where they are equal bit for bit."""
    form = (tensor.dtype, tuple(tensor.shape), tensor.layout, tensor.device.type)
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() > 10**6:
        return *form, id(tensor)
    flat = tensor.detach().reshape(-1)
    if flat.stride() != (1,):  # a view of bytes needs numbers side by side
        flat = torch.empty(len(flat), dtype=flat.dtype).copy_(flat)
    return *form, flat.view(torch.uint8).numpy().tobytes()


def model_digest(model: nn.Module) -> tuple:
    """All of a model that an error must leave alone: modules, tensors, what trains; and torch's generator."""
    modules = [
        (name, id(module), type(module), module.training, module.extra_repr(), tuple(vars(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    return modules, tensors_digest(model), torch.get_rng_state().numpy().tobytes()


def tensors_digest(model: nn.Module) -> list[tuple]:
    """Names, identities and contents of parameters and buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, id(tensor), tensor.requires_grad, *content(tensor)) for name, tensor in named]
