"""One file per family of denoisers: what the model layer calls of each."""
