"""llama.cpp's server with LoRA adapters, which each request turns on by their number:
python llama_worker.py MODEL.gguf PORT THREADS ADAPTER.gguf ...
"""

import sys
import threading

from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server

SLOTS, LONGEST = 32, 512

model, port, threads, *adapters = sys.argv[1:]
params = CommonParams()
params.model.path = model
params.port = int(port)
params.n_parallel, params.n_ctx = SLOTS, SLOTS * LONGEST
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
params.lora_adapters = [CommonAdapterLoraInfo(path) for path in adapters]
params.lora_init_without_apply = True
server = Server(params)
print("listening at", server.listening_address, flush=True)
threading.Event().wait()
