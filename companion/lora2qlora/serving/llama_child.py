"""llama.cpp's server in a process of its own, which ends when its standard input does. Chapter 16.

Run as a script with its settings as JSON in the first argument. It prints the address and waits. Input ends
when the parent closes it and also when the parent is killed, so that no server is left behind.
"""

import json
import os
import sys


def main(settings: dict) -> None:
    """Start the server, print where it listens, wait for the end of the input."""
    import xllamacpp as llama

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp itself prints goes to the log
    server = llama.Server(_parameters(llama, settings))
    print(server.listening_address, file=out, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # at once: nobody waits for the answers that are being written


def _parameters(llama, settings: dict):
    """llama.cpp's parameters; `scale` is for requests that name no adapter, 0 gives them none."""
    params = llama.CommonParams()
    params.model.path = settings["model"]
    params.lora_adapters = [_adapter(llama, path, settings["scale"]) for path in settings["adapters"]]
    params.n_ctx = settings["context"] * settings["parallel"]
    params.n_parallel, params.port = settings["parallel"], settings["port"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.verbosity, params.warmup, params.ui, params.fit_params = 1, False, False, False
    if settings["exact"]:
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    return params


def _adapter(llama, path: str, scale: float):
    adapter = llama.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = path, scale
    return adapter


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
