"""The model layer: what the profiler measures is what the real runner executes.

Light to import: only names here. torch and diffusers load with the modules that need them.

- `checkpoint`: `load_model(name_or_path, device, dtype, resolution, scheduler)`; `architectures`: random weights
- `model`: `DiffusionModel` (start, step, decode, chunks) and `SampleState`; `rows`: what one forward reads
- `denoisers`: a forward as a whole and in two halves; `decoder`: the exact atoms of a VAE decode, and chunkings
- `solvers`, `schedulers`: noise schedules per sample; `conditioning`: from a prompt to what the denoiser reads
- `execution`, `kernels`, `group_norm`: eager, graphs or compiled, and the levers that replace kernels
- `lora`, `merging`: LoRA files, and LoRAs in a UNet's weights, taken out again to the last bit; `controlnet`
- `stages`: steps and decodes as devices run them: CUDA graphs per row bucket and per chunk, blocks compiled
- `digits`: the embedded model's images and its gate
"""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
"""Per model that ships: its weights, if any, and its fidelity table."""
SHIPPED = {"digits": MODELS / "digits"}
SHIPPED_LORAS = MODELS / "digits" / "loras"
"""Trained for `digits`: `slanted`."""
SHIPPED_CONTROLNETS = {"outline": MODELS / "digits" / "controlnet-outline"}
"""Trained for `digits`."""
SCHEDULERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpm++2m": "DPMSolverMultistepScheduler"}
"""Short name -> diffusers class; every other scheduler goes by its class name."""
DTYPES = ("float32", "bfloat16", "float16")
"""Of weights, as torch names them."""
