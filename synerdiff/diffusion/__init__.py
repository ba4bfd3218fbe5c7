"""The model layer: what the profiler measures is what the real runner executes.

Light to import; torch and diffusers load with the modules that need them:

- `loading`: `load_model(name_or_path, device, dtype, resolution)`
- `model`: `DiffusionModel` (start, step, decode, chunks) and `SampleState`
- `chunking`: `Chunking` and `choose_cuts` (no torch); `decoder`: the exact atoms of a VAE decode
- `lora`, `merging`: LoRA files, and LoRAs in a UNet's weights, taken out again to the last bit
- `controlnet`, `split`: ControlNets, and a denoiser forward in two halves between which their residuals arrive
- `device`, `cuda_device`, `graphs`: lanes on a CPU or on CUDA streams, CUDA graphs per row bucket and per chunk
- `digits_data`, `digits_classifier`, `training`: the embedded model's images, its gate and how it was made
"""
