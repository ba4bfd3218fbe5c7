"""What both engines share: the worker, its samples, caches."""
