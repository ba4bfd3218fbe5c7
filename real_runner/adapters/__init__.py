"""LoRAs, ControlNets and split guidance on hardware: in the worker's process, or in processes beside it."""
